"""Parts of checkpoints: which there are, and what each makes, as transformers' own does."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import model_class_of, randomize, tiny_config, write_checkpoint
from attnserve_export.checkpoints.checkpoint import Checkpoint, load_model, read_checkpoint
from attnserve_export.checkpoints.export import run_in_torch
from attnserve_export.checkpoints.observing import observe
from attnserve_export.checkpoints.tracing import IMPLEMENTATION, Tracer
from attnserve_export.cli import main
from attnserve_export.errors import ExportError
from attnserve_proto import manifest
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=4)
PAIRS = st.tuples(st.integers(1, 30), st.integers(1, 40))
ENCODER_DECODERS = ("bart", "mbart", "marian", "pegasus", "blenderbot", "m2m_100", "t5")


@dataclass(frozen=True)
class Part:
    """A part as it is exported, in FP32, and as transformers has it, eager, in float64."""

    tracer: Tracer
    exact: Any


def part_of(folder: Path, part: str) -> Part:
    checkpoint = read_checkpoint(folder, part)
    whole = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    exact = whole.double().eval().get_submodule(checkpoint.family.path)
    return Part(tracer_of(checkpoint), exact)


def tracer_of(checkpoint: Checkpoint) -> Tracer:
    """By the first plan, which gives the model least."""
    model = load_model(checkpoint, IMPLEMENTATION)
    family = checkpoint.family
    plans = observe(
        model, checkpoint.config, takes=family.takes, two_stacks=family.two_stacks,
        vocab_size=checkpoint.vocab_size,
    )  # fmt: skip
    return Tracer(model, plans[0])


def ragged(lengths: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids that no token of padding is among, and which of them are no padding."""
    shape = (len(lengths), max(lengths))
    ids = np.random.default_rng(seed).integers(4, 90, shape)
    return ids, (np.arange(shape[1]) < np.asarray(lengths)[:, None]).astype(np.int64)


def ask(exact: Any, feeds: Mapping[str, np.ndarray]) -> Any:
    tensors = {name: torch.from_numpy(each) for name, each in feeds.items()}
    with torch.no_grad():
        return exact(
            **{n: t.double() if t.is_floating_point() else t for n, t in tensors.items()},
            output_attentions=True,
        )


def check_valid(found: np.ndarray, expected: torch.Tensor, mask: np.ndarray) -> None:
    np.testing.assert_allclose(found[mask > 0], expected.numpy()[mask > 0], atol=1e-4)


@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_an_encoder_alone_makes_what_it_makes_in_its_model(model_type: str, tmp_path: Path) -> None:
    write_checkpoint(model_type, tmp_path)
    part = part_of(tmp_path, "encoder")
    assert part.tracer.plan.kind == "encoder"

    @settings(max_examples=5)
    @given(lengths=LENGTHS)
    def check(lengths: list[int]) -> None:
        ids, mask = ragged(lengths, 0)
        feeds = {"input_ids": ids, "attention_mask": mask}
        found = run_in_torch(part.tracer, feeds)
        check_valid(found["last_hidden_state"], ask(part.exact, feeds).last_hidden_state, mask)

    check()


@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_a_decoder_alone_attends_to_the_states_that_it_is_given(
    model_type: str, tmp_path: Path
) -> None:
    write_checkpoint(model_type, tmp_path)
    check_decoder(part_of(tmp_path, "decoder"))


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_cross_attention_that_was_added_to_a_model_is_to_states(
    model_type: str, tmp_path: Path
) -> None:
    write_crossed(model_type, tmp_path)
    check_decoder(part_of(tmp_path, ""))


def write_crossed(model_type: str, folder: Path) -> None:
    """A checkpoint of a decoder that attends to another model's hidden states."""
    config = tiny_config(model_type)
    config.is_decoder = config.add_cross_attention = True
    torch.manual_seed(3)
    model = model_class_of(model_type)(config)
    randomize(model)
    model.save_pretrained(folder)


def check_decoder(part: Part) -> None:
    plan = part.tracer.plan
    assert (plan.kind, plan.attentions) == ("states-decoder", ("decoder", "cross"))
    width = plan.source.shape[1]

    @settings(max_examples=5)
    @given(pairs=st.lists(PAIRS, min_size=1, max_size=4))
    def check(pairs: list[tuple[int, int]]) -> None:
        (ids, mask), (_, states_mask) = (ragged(each, 1) for each in zip(*pairs, strict=True))
        shape = (*states_mask.shape, int(width))
        states = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        found = run_in_torch(
            part.tracer,
            {
                "encoder_hidden_states": states,
                "attention_mask": states_mask,
                "decoder_input_ids": ids,
                "decoder_attention_mask": mask,
            },
        )
        expected = ask(
            part.exact,
            {
                "encoder_hidden_states": states,
                "encoder_attention_mask": states_mask,
                "input_ids": ids,
                "attention_mask": mask,
            },
        )
        check_valid(found["last_hidden_state"], expected.last_hidden_state, mask)
        query, key = (torch.from_numpy(found[f"cross_{name}_1"]) for name in ("query", "key"))
        scores = query @ key.transpose(2, 3) * part.tracer.calls["cross"][1].scale
        scores = scores.masked_fill(torch.from_numpy(states_mask)[:, None, None] == 0, -torch.inf)
        weights = scores.softmax(-1).numpy().swapaxes(1, 2)
        check_valid(weights, expected.cross_attentions[1].transpose(1, 2), mask)

    check()


@pytest.mark.parametrize("model_type", ["clip", "siglip", "metaclip_2"])
def test_a_model_of_texts_and_pictures_has_two_towers(model_type: str, tmp_path: Path) -> None:
    write_checkpoint(model_type, tmp_path)
    text, vision = part_of(tmp_path, "text"), part_of(tmp_path, "vision")
    ids, mask = ragged((7, 1, 30), 0)
    found = run_in_torch(text.tracer, {"input_ids": ids, "attention_mask": mask})
    for row, length in enumerate((7, 1, 30)):
        expected = ask(text.exact, {"input_ids": ids[row : row + 1, :length]}).last_hidden_state
        np.testing.assert_allclose(
            found["last_hidden_state"][row, :length], expected[0].numpy(), atol=1e-4
        )
    assert vision.tracer.plan.source.patches is not None
    pixels = np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype(np.float32)
    found = run_in_torch(vision.tracer, {"pixel_values": pixels})
    expected = ask(vision.exact, {"pixel_values": pixels}).last_hidden_state
    np.testing.assert_allclose(found["last_hidden_state"], expected.numpy(), atol=1e-4)


def test_what_a_folder_says_that_it_has_is_what_is_read(tmp_path: Path) -> None:
    """A part that was saved alone, and a decoder that was trained without its encoder."""
    write_checkpoint("bart", tmp_path / "whole")
    whole = transformers.BartModel.from_pretrained(tmp_path / "whole")
    whole.encoder.save_pretrained(tmp_path / "encoder")
    whole.decoder.save_pretrained(tmp_path / "decoder")
    alone = transformers.BartForCausalLM(whole.config)
    alone.model.decoder.load_state_dict(whole.decoder.state_dict())
    alone.save_pretrained(tmp_path / "causal")
    read = {name: read_checkpoint(tmp_path / name) for name in ("encoder", "decoder", "causal")}
    taken = {name: checkpoint.family.takes for name, checkpoint in read.items()}
    assert taken == {
        "encoder": "input_ids",
        "decoder": "encoder_hidden_states",
        "causal": "input_ids",
    }
    for name, checkpoint in read.items():
        loaded = load_model(checkpoint, "eager").state_dict()
        own = (whole.encoder if name == "encoder" else whole.decoder).state_dict()
        for key, parameter in own.items():
            torch.testing.assert_close(loaded[key], parameter, rtol=0, atol=0)
    config = tmp_path / "whole/config.json"
    content = json.loads(config.read_text()) | {"is_encoder_decoder": False}
    config.write_text(json.dumps(content))
    assert read_checkpoint(tmp_path / "whole").family.path == "encoder"


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for model_type, part, allowed in (
        ("bert", "vision", "allowed: none: it has no parts"),
        ("clip", "decoder", "allowed: text or vision"),
        ("bart", "text", "allowed: encoder or decoder"),
    ):
        write_checkpoint(model_type, tmp_path / model_type)
        with pytest.raises(ExportError, match=f"--part: given {part} for a .*; {allowed}"):
            read_checkpoint(tmp_path / model_type, part)


def test_a_model_that_reads_two_things_at_once_says_which_parts_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint("clip", tmp_path / "clip")
    arguments = ["transformer", "--out", str(tmp_path), "--name", "m"]
    assert main([*arguments, "--checkpoint", str(tmp_path / "clip")]) == 2
    assert "--part text or vision" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("model_type", "part"),
    [
        ("bart", "encoder"),
        ("marian", "decoder"),
        ("gpt2", ""),
        ("roberta", ""),
        ("clip", "text"),
        ("siglip", "vision"),
    ],
)
def test_parts_are_exported(model_type: str, part: str, dtype: str, tmp_path: Path) -> None:
    (write_checkpoint if part else write_crossed)(model_type, tmp_path / "checkpoint")
    arguments = ["transformer", "--out", str(tmp_path), "--name", "m", "--dtype", dtype]
    arguments += ["--part", part] if part else []
    assert main([*arguments, "--checkpoint", str(tmp_path / "checkpoint")]) == 0
    check_verified(manifest.read(tmp_path / "m/1"), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("model_type", "option"),
    [("vit", ()), ("whisper", ()), ("bert", ("--inputs-embeds",)), ("t5", ("--inputs-embeds",))],
)
def test_tensors_are_read_by_models_of_half_the_size(
    model_type: str, option: tuple[str, ...], dtype: str, tmp_path: Path
) -> None:
    write_checkpoint(model_type, tmp_path / "checkpoint")
    arguments = ["transformer", "--out", str(tmp_path), "--name", "m", "--dtype", dtype, *option]
    assert main([*arguments, "--checkpoint", str(tmp_path / "checkpoint")]) == 0
    found = manifest.read(tmp_path / "m/1")
    check_verified(found, dtype)
    names = {variant.name for variant in found.variants}
    assert ("half_embeds" in names) == bool(option)


def check_verified(found: manifest.Manifest, dtype: str) -> None:
    assert found.dtype == dtype.upper()
    assert ("half" in {variant.name for variant in found.variants}) == (dtype != "fp32")
    for variant in found.variants:
        errors = variant.verification.max_abs_error
        assert all(error < 1e-4 for name, error in errors.items() if "weights" in name)
