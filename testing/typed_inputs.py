"""Tiny random checkpoints that read pictures, sounds and embeddings, and their exports."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from architectures import randomize, write_checkpoint

NAMES = ("vit", "whisper", "bert")


def write(name: str, folder: Path) -> None:
    """A ViT or a Whisper, with the file that says how its input is made, or a model of texts."""
    if name not in ("vit", "whisper"):
        write_checkpoint(name, folder)
        return
    torch.manual_seed(2)
    model = vit() if name == "vit" else whisper()
    randomize(model)
    model.save_pretrained(folder)
    if name == "vit":
        transformers.ViTImageProcessor(size={"height": 24, "width": 16}).save_pretrained(folder)
        return
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=8, hop_length=800, chunk_length=1, n_fft=1600
    )
    extractor.save_pretrained(folder)
    # Older files have the filters, too, which are computed from the rest.
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mel_filters": [[0.5]]}))


def vit() -> transformers.PreTrainedModel:
    """Of pictures of 24 x 16 pixels: 3 x 2 patches."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=[24, 16], patch_size=8,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False)


def whisper() -> transformers.PreTrainedModel:
    """Of 20 frames of 8 numbers: 10 tokens."""
    config = transformers.WhisperConfig(
        vocab_size=50, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=10, max_target_positions=24, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperModel(config)


def export(
    folder: Path, export_all: Callable[[list[list[str]]], None], names: Sequence[str] = NAMES
) -> None:
    """Write some to folder/checkpoints/NAME, and their versions 1 to folder/models.

    Models of texts take embeddings, too. Tests of several folders ask for the same, so that each is
    exported once.
    """
    commands = []
    for name in names:
        checkpoint = folder / "checkpoints" / name
        write(name, checkpoint)
        command = ["transformer", "--out", str(folder / "models"), "--name", name]
        more = [] if name in ("vit", "whisper") else ["--inputs-embeds"]
        commands.append([*command, "--checkpoint", str(checkpoint), *more])
    export_all(commands)
