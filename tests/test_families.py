"""Every family of checkpoints, from random configurations: exported, served, asked over gRPC, and
compared with Hugging Face transformers, eager, on the same padded batch."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from attnserve_client import AttentionClient, TokensResult
from attnserve_export.cli import main
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LENGTHS, TARGET_LENGTHS = (5, 31, 1, 18), (9, 2, 27, 1)
VOCABULARY = 60

FAMILIES = (
    "bert", "roberta", "xlm-roberta", "distilbert", "gpt2", "llama", "mistral", "qwen2", "qwen3",
    "gpt_oss", "t5", "bart",
)  # fmt: skip
ENCODER_DECODERS = ("t5", "bart")

# In the quick run.
QUICK = ("roberta", "gpt2", "qwen2", "gpt_oss", "t5", "bart")

# Attributes of `Shape` in conftest.py.
SHAPES = st.fixed_dictionaries(
    {
        "layers": st.tuples(st.integers(1, 3), st.integers(1, 2)),
        "heads": st.sampled_from((2, 4, 6)),
        "sharing": st.sampled_from((1, 2)),
        "head_dim": st.sampled_from((2, 6, 8, 16)),
        "window": st.integers(1, 40),
        "rope": st.sampled_from(("default", "linear", "llama3", "yarn")),
        "odd": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)

Serving = Callable[[Path], AbstractContextManager[str]]


@pytest.mark.parametrize("family", QUICK)
def test_hidden_states_and_every_map_are_those_of_transformers(
    family: str, families: tuple[Path, str]
) -> None:
    folder, address = families
    compare(family, folder / family, address, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_configuration_of_a_family(
    family: str, make_checkpoint: Callable[..., None], serving: Serving
) -> None:
    @settings(
        max_examples=5,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(shape=SHAPES)
    def check(shape: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_checkpoint(family, folder / "checkpoint", **shape)
            arguments = ["transformer", "--out", str(folder / "models"), "--name", "drawn"]
            assert main([*arguments, "--checkpoint", str(folder / "checkpoint")]) == 0
            with serving(folder / "models") as address:
                compare("drawn", folder / "checkpoint", address, family)

    check()


def compare(model: str, checkpoint: Path, address: str, family: str) -> None:
    """A ragged batch through all variants of a model, and through transformers with padding."""
    sequences = random_ids(LENGTHS, 0)
    targets = random_ids(TARGET_LENGTHS, 1) if family in ENCODER_DECODERS else None
    expected = eager_outputs(load(checkpoint), sequences, targets)
    with AttentionClient(address) as client:
        described = client.get_model(model)
        assert {variant.name for variant in described.variants} >= {"fused"}
        for variant in described.variants:
            for attention in described.attentions:
                result = client.attend_tokens(
                    sequences,
                    model=model,
                    variant=variant.name,
                    targets=targets,
                    attention=attention.name,
                    return_weights=True,
                    return_entropy=True,
                    return_effective_context=True,
                    mass_by_distance=6,
                    mass_on_first=2,
                )
                assert result.variant == variant.name
                check_hidden(result, expected)
                maps = expected[maps_name(attention.name, targets is not None)]
                assert attention.num_layers == len(maps)
                check_attention(result, maps)


def random_ids(lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    # Not the token that pads: RoBERTa gives it no position.
    return [generator.integers(2, VOCABULARY, length).tolist() for length in lengths]


def load(checkpoint: Path) -> Any:
    return transformers.AutoModel.from_pretrained(checkpoint, attn_implementation="eager").eval()


def eager_outputs(
    model: Any, sequences: list[list[int]], targets: list[list[int]] | None
) -> dict[str, Any]:
    """What transformers gives, by its own names, with its own masks."""
    feeds = {}
    for prefix, batch in (("", sequences), ("decoder_", targets)):
        if batch is not None:
            longest = max(map(len, batch))
            rows = [ids + [1] * (longest - len(ids)) for ids in batch]
            mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch]
            feeds |= {f"{prefix}input_ids": rows, f"{prefix}attention_mask": mask}
    with torch.no_grad():
        return model(
            **{name: torch.tensor(rows) for name, rows in feeds.items()}, output_attentions=True
        )


def maps_name(attention: str, two_stacks: bool) -> str:
    return f"{attention}_attentions" if two_stacks else "attentions"


def check_hidden(result: TokensResult, expected: Any) -> None:
    for row, hidden in enumerate(result.hidden):
        states = expected.last_hidden_state[row, : len(hidden)]
        np.testing.assert_allclose(hidden, states, atol=1e-4)
    for row, hidden in enumerate(result.encoder_hidden or []):
        states = expected.encoder_last_hidden_state[row, : len(hidden)]
        np.testing.assert_allclose(hidden, states, atol=1e-4)
    assert (result.encoder_hidden is None) == ("encoder_last_hidden_state" not in expected)


def check_attention(result: TokensResult, maps: Sequence[torch.Tensor]) -> None:
    for row, weights in enumerate(result.weights):
        query_len, key_len = weights.shape[2:]
        exact = torch.stack(list(maps))[:, row, :, :query_len, :key_len].numpy()
        np.testing.assert_allclose(weights, exact, atol=1e-4)
        logs = np.log(exact, out=np.zeros_like(exact), where=exact > 0)
        entropy = -(exact * logs).sum(axis=-1)
        np.testing.assert_allclose(result.entropy[row], entropy, atol=1e-4)
        np.testing.assert_allclose(result.effective_context[row], np.exp(entropy), rtol=1e-3)
        first = exact[..., :2].sum(axis=-1)
        np.testing.assert_allclose(result.mass_on_first[row], first, atol=1e-4)
        apart = np.abs(np.arange(key_len) - np.arange(query_len)[:, None])
        bins = [(exact * (np.minimum(apart, 5) == n)).sum(axis=(-1, -2)) for n in range(6)]
        np.testing.assert_allclose(
            result.mass_by_distance[row], np.stack(bins, axis=-1), atol=1e-4 * query_len
        )
