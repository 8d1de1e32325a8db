"""Checkpoints that read pictures, sounds or embeddings: what is found out of them; graphs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
import typed_inputs
from architectures import randomize
from attnserve_export.cli import main
from attnserve_proto import manifest

Make = Callable[..., Path]


def clip_vision() -> torch.nn.Module:
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                      intermediate_size=24, image_size=24, patch_size=8)
    )  # fmt: skip


def dinov2_with_registers() -> torch.nn.Module:
    return transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8,
            num_register_tokens=3,
        )
    )  # fmt: skip


def export(model: torch.nn.Module, folder: Path, *options: str) -> manifest.Manifest:
    """Random parameters of a size at which each matters, exported."""
    torch.manual_seed(0)
    randomize(model)
    model.save_pretrained(folder / "checkpoint")
    arguments = ["transformer", "--out", str(folder), "--name", "m", *options]
    assert main([*arguments, "--checkpoint", str(folder / "checkpoint")]) == 0
    return manifest.read(folder / "m/1")


@pytest.mark.parametrize(
    ("make", "shape", "patches"),
    [
        (typed_inputs.vit, (3, 24, 16), (1, 3, 2)),
        (clip_vision, (3, 24, 24), (1, 3, 3)),
        (dinov2_with_registers, (3, 24, 24), (4, 3, 3)),
    ],
)
def test_a_picture_s_patches_are_its_tokens(
    make: Callable[[], torch.nn.Module],
    shape: tuple[int, ...],
    patches: tuple[int, int, int],
    tmp_path: Path,
) -> None:
    torch.manual_seed(1)
    model = make()
    found = export(model, tmp_path)
    transformer = found.transformer
    assert transformer is not None
    [entry] = transformer.inputs
    first, rows, columns = patches
    assert (entry.name, entry.dtype, entry.shape) == ("pixel_values", "FP32", shape)
    assert entry.patches == manifest.Patches(first=first, rows=rows, columns=columns)
    assert entry.tokens == first + rows * columns
    assert (transformer.takes_ids, transformer.vocab_size) == (False, 0)
    assert [attention.name for attention in transformer.attentions] == ["encoder"]
    # Plain ONNX Runtime, and transformers in eager attention.
    pixels = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "m/1/model.onnx"))
    hidden, query, key = session.run(
        ["last_hidden_state", "encoder_query_1", "encoder_key_1"], {"pixel_values": pixels}
    )
    eager = type(model).from_pretrained(tmp_path / "checkpoint", attn_implementation="eager")
    with torch.no_grad():
        expected = eager.eval()(torch.from_numpy(pixels), output_attentions=True)
    np.testing.assert_allclose(hidden, expected.last_hidden_state, atol=1e-4)
    scores = (
        torch.from_numpy(query @ key.swapaxes(2, 3)) * transformer.attentions[0].layers[1].scale
    )
    np.testing.assert_allclose(scores.softmax(-1), expected.attentions[1], atol=1e-4)


def test_whisper_is_an_encoder_over_frames_and_a_decoder_over_ids(
    tmp_path: Path, export_all: Callable[[list[list[str]]], None]
) -> None:
    typed_inputs.export(tmp_path, export_all, ["whisper"])
    said = json.loads((tmp_path / "checkpoints/whisper/preprocessor_config.json").read_text())
    assert said.pop("mel_filters")
    found = manifest.read(tmp_path / "models/whisper/1")
    transformer = found.transformer
    assert transformer is not None
    [entry] = transformer.inputs
    assert (entry.name, entry.shape) == ("input_features", (8, 20))
    assert (entry.tokens, entry.frames_per_token, entry.patches) == (10, 2, None)
    assert entry.preprocessor == said  # filters are computed from the rest
    assert transformer.takes_ids is False
    assert (transformer.vocab_size, transformer.max_seq_len) == (50, 24)
    assert transformer.decoder_start_token_id == 3
    names = [attention.name for attention in transformer.attentions]
    assert names == ["encoder", "decoder", "cross"]
    for variant in found.variants:
        assert variant.input_names == (
            "input_features",
            "decoder_input_ids",
            "decoder_attention_mask",
        )
        assert {"cross_weights_0", "encoder_last_hidden_state"} <= set(
            variant.verification.max_abs_error
        )


@pytest.mark.parametrize(
    "model_type",
    ["bert", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen3", "t5"))],
)
def test_text_models_take_embeddings_too_if_they_are_asked_to(
    model_type: str, tmp_path: Path, export_all: Callable[[list[list[str]]], None]
) -> None:
    typed_inputs.export(tmp_path, export_all, [model_type])
    found = manifest.read(tmp_path / "models" / model_type / "1")
    assert found.transformer is not None
    [entry] = found.transformer.inputs
    assert (entry.name, entry.shape, entry.tokens) == ("inputs_embeds", ("seq_len", 32), None)
    assert found.transformer.takes_ids
    inputs = {variant.name: variant.input_names[0] for variant in found.variants}
    assert inputs == {
        "fused": "input_ids",
        "fused_embeds": "inputs_embeds",
        "native": "input_ids",
        "native_embeds": "inputs_embeds",
    }
    # The parameters are there once.
    sizes = [path.stat().st_size for path in (tmp_path / "models" / model_type / "1").iterdir()]
    parameters = (tmp_path / "checkpoints" / model_type / "model.safetensors").stat().st_size
    assert max(sizes) < 1.5 * parameters + 100_000


def test_what_has_no_embeddings_or_no_size_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    typed_inputs.vit().save_pretrained(folder)
    arguments = ["transformer", "--out", str(tmp_path), "--name", "m", "--checkpoint", str(folder)]
    assert main([*arguments, "--inputs-embeds"]) == 2
    assert "--inputs-embeds: given for a model that takes pixel_values" in capsys.readouterr().err
    content = json.loads((folder / "config.json").read_text())
    (folder / "preprocessor_config.json").write_text("[]")
    assert main(arguments) == 2
    assert "preprocessor_config.json: allowed: a JSON object" in capsys.readouterr().err
    (folder / "preprocessor_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(content | {"image_size": 20}))
    assert main(arguments) == 2  # the parameters are of another size
    assert "checkpoint: " in capsys.readouterr().err
