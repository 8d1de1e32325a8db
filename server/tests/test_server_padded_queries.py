"""Self-attention layers: padded tokens are no queries, whatever they hold and whoever asks."""

from typing import Any

import numpy as np
import pytest
from attnserve_client import AttendResult, AttentionClient

LENGTHS = [5, 12, 4, 8]
TOKENS, EMBED, HEADS, DISTANCES = 12, 32, 4, 4
SAID: dict[str, Any] = {
    "model": "self",
    "return_entropy": True,
    "return_mass_per_key": True,
    "mass_by_distance": DISTANCES,
    "top_k": 2,
}


def hidden_states(padding: float) -> np.ndarray:
    hidden = np.random.default_rng(1).standard_normal((len(LENGTHS), TOKENS, EMBED), np.float32)
    for row, length in enumerate(LENGTHS):
        hidden[row, length:] = padding
    return hidden


def check(found: AttendResult, alone: AttendResult, row: int, length: int) -> None:
    """What is said of a padded sequence is what is said of it alone."""
    for name in ("entropy", "top_k_weights"):
        whole, own = getattr(found, name)[row], getattr(alone, name)[0]
        np.testing.assert_allclose(whole[:, :length], own, atol=1e-5, err_msg=name)
        assert not whole[:, length:].any()
    np.testing.assert_allclose(
        found.mass_per_key[row, :, :length], alone.mass_per_key[0], atol=1e-5
    )
    assert not found.mass_per_key[row, :, length:].any()
    np.testing.assert_allclose(found.mass_by_distance[row], alone.mass_by_distance[0], atol=1e-5)
    np.testing.assert_allclose(found.output[row, :length], alone.output[0], atol=1e-5)


@pytest.mark.needs_library
@pytest.mark.parametrize("padding", [0.0, 3.0, np.nan, np.inf])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("masked", ["", "by query and key", "by key", "by head"])
def test_padding_is_in_no_sum(
    client: AttentionClient, padding: float, weights: bool, masked: str
) -> None:
    hidden, given = hidden_states(padding), {}
    shapes = {
        "by query and key": (1, 1, TOKENS, TOKENS),
        "by key": (len(LENGTHS), 1, 1, TOKENS),
        "by head": (1, HEADS, TOKENS, TOKENS),
    }
    if masked:
        mask = np.random.default_rng(2).random(shapes[masked]) < 0.6
        given["bias"] = mask | (np.arange(TOKENS) == 0)
    found = client.attend(
        hidden_states=hidden, key_lengths=LENGTHS, return_weights=weights, **given, **SAID
    )
    for row, length in enumerate(LENGTHS):
        own = {}
        if masked:
            bias = given["bias"]
            bias = bias[min(row, bias.shape[0] - 1)][None]
            own["bias"] = bias[:, :, : length if bias.shape[2] > 1 else 1, :length]
        alone = client.attend(
            hidden_states=hidden[row : row + 1, :length], return_weights=weights, **own, **SAID
        )
        check(found, alone, row, length)


@pytest.mark.needs_library
def test_requests_that_run_together_keep_their_own_lengths(client: AttentionClient) -> None:
    hidden = hidden_states(np.nan)
    with client.stream() as stream:
        futures = [
            stream.submit(hidden_states=hidden[row : row + 1], key_lengths=[length], **SAID)
            for row, length in enumerate(LENGTHS)
        ]
        results = [future.result() for future in futures]
    for row, (length, found) in enumerate(zip(LENGTHS, results, strict=True)):
        alone = client.attend(hidden_states=hidden[row : row + 1, :length], **SAID)
        check(found, alone, 0, length)


def test_of_cross_attention_all_queries_count(client: AttentionClient) -> None:
    generator = np.random.default_rng(3)
    hidden = generator.standard_normal((1, 6, EMBED), np.float32)
    context = generator.standard_normal((1, 9, 24), np.float32)
    context[:, 4:] = np.nan
    found = client.attend(
        hidden_states=hidden, context=context, key_lengths=[4], **{**SAID, "model": "cross"}
    )
    np.testing.assert_allclose(found.mass_per_key.sum(axis=-1), 6, rtol=1e-5)
