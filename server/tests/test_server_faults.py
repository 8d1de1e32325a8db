"""Inputs that public reports say others fail at, in every way of calling and by every variant.

What is padding reaches no result, a finite bias is a number, a boolean mask is PyTorch's, and of a
tokenizer's mask nothing is read another way than it is meant.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attend_ways import WAYS
from attnserve_client import AttentionClient
from attnserve_export.reference import CAUSAL, attention_reference

HEADS, DIM, TOKENS = 4, 8, 8
LOWEST = np.finfo(np.float32).min
DIAGNOSED: dict[str, Any] = {"return_entropy": True, "return_mass_per_key": True}


def tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng()
    return {
        name: generator.standard_normal((2, HEADS, TOKENS, DIM), np.float32)
        for name in ("query", "key", "value")
    }


def spoilt_padding() -> dict[str, np.ndarray]:
    made = tensors() | {"key_lengths": np.array([5, TOKENS])}
    made["key"][0, :, 5:], made["value"][0, :, 5:] = np.nan, np.inf
    return made


def lowest_bias() -> dict[str, np.ndarray]:
    """A row all of the lowest number, as transformers once masked padding."""
    bias = np.zeros((1, 1, TOKENS, TOKENS), np.float32)
    bias[:, :, 3] = LOWEST
    return tensors() | {"query": np.zeros((2, HEADS, TOKENS, DIM), np.float32), "bias": bias}


def boolean_bias() -> dict[str, np.ndarray]:
    mask = np.random.default_rng().random((2, 1, TOKENS, TOKENS)) < 0.5
    return tensors() | {"bias": mask}


CASES = {
    "NaN and Inf behind key_lengths": spoilt_padding,
    "a bias of finfo.min": lowest_bias,
    "a boolean bias": boolean_bias,
}
# Those that take the case's tensors; without a name, the server's pick.
VARIANTS = {
    "NaN and Inf behind key_lengths": ("", "fused", "blocked", "reference", "native"),
    "a bias of finfo.min": ("", "reference", "native"),
    "a boolean bias": ("", "reference", "native"),
}


@pytest.mark.needs_library
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_right_value_in_every_way(address: str, tmp_path: Path, case: str, way: str) -> None:
    given = CASES[case]()
    masked: dict[str, Any] = {"key_lengths": given.get("key_lengths")}
    bias = given.get("bias")
    masked["mask" if bias is not None and bias.dtype == bool else "bias"] = bias
    output, weights = attention_reference(
        *(given[name] for name in ("query", "key", "value")), scheme=CAUSAL, **masked
    )
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    right = {
        "output": output,
        "weights": weights,
        "entropy": -(weights * logs).sum(axis=-1),
        "mass_per_key": weights.sum(axis=2),
    }
    if case == "a bias of finfo.min":  # what the table of the reports says
        mean = given["value"][:, :, :4].mean(axis=2, dtype=np.float64)
        np.testing.assert_allclose(output[:, :, 3], mean)
        np.testing.assert_allclose(right["entropy"][:, :, 3], np.log(4))
    for variant in VARIANTS[case]:
        for besides in ({}, {"return_weights": True}, {"return_weights": True, **DIAGNOSED}):
            if variant in ("fused", "blocked", "native") and "return_weights" in besides:
                continue  # they give no weights
            asked = {"model": "causal", "variant": variant, **besides}
            said = WAYS[way](address, given, asked, tmp_path)
            assert set(said) == {"output", *(n.removeprefix("return_") for n in besides)}
            for name, found in said.items():
                np.testing.assert_allclose(
                    found, right[name], atol=2e-5, err_msg=f"{variant} {name}"
                )


IDS = [[0, 2, 7, 3, 0], [2, 9, 8, 7, 3], [0, 0, 0, 0, 5], [2, 3, 0, 0, 0]]
MASK = [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_tokenizers_padding_is_left_out_on_either_side(
    client: AttentionClient, kind: Callable[[Any], Any]
) -> None:
    rows = [
        [number for number, seen in zip(*row, strict=True) if seen]
        for row in zip(IDS, MASK, strict=True)
    ]
    expected = client.attend_tokens(rows, model="bert", layers=[1])
    for mask in (MASK, [[bool(seen) for seen in row] for row in MASK]):
        encoding = {"input_ids": kind(IDS), "attention_mask": kind(mask)}
        found = client.attend_tokens(encoding, model="bert", layers=[1])
        assert found.ids == rows
        for name in ("hidden", "weights"):
            for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
                np.testing.assert_array_equal(one, other)


BETWEEN = {
    "between tokens": ([[1] * 4, [1, 0, 1, 1]], r"\[1, 1\]: given 0; allowed: ones for tokens"),
    "twice": ([[0, 1, 1, 0], [1, 0, 0, 1]], r"\[1, 1\]: given 0; allowed: ones for tokens, side"),
    "twos": ([[1, 2, 1, 1], [1] * 4], r"\[0, 1\]: given 2; allowed: ones for tokens"),
    "none": ([[1] * 4, [0] * 4], r"\[1\] given without ones; allowed: one or more"),
}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize(("mask", "message"), BETWEEN.values(), ids=BETWEEN.keys())
def test_a_mask_with_zeros_between_tokens_is_refused(
    client: AttentionClient, kind: Callable[[Any], Any], mask: list[list[int]], message: str
) -> None:
    ids = kind([[2, 5, 6, 3]] * 2)
    with pytest.raises(ValueError, match=rf"^inputs: attention_mask{message}"):
        client.attend_tokens({"input_ids": ids, "attention_mask": kind(mask)}, model="bert")
