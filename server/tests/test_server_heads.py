"""Weights and diagnostics of heads, over more than one block, against the float64 reference."""

import numpy as np
import pytest
from attnserve_export.reference import Scheme, attention_reference
from attnserve_proto.manifest import TransformerAttention, TransformerLayer
from attnserve_server.tokens import heads
from attnserve_server.tokens.work import HeadsWanted

DISTANCES, FIRST = 40, 3
ATTENTION = TransformerAttention(
    name="decoder",
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mask="causal",
    layers=(TransformerLayer(0.4),),
)
EVERYTHING = HeadsWanted(
    attention=ATTENTION,
    layers=[0],
    heads=[0, 1],
    weights=True,
    entropy=True,
    effective_context=True,
    mass_by_distance=DISTANCES,
    mass_on_first=FIRST,
)


@pytest.mark.parametrize(
    ("query_len", "key_len", "causal", "window", "biased", "sinks"),
    [
        (700, 700, True, None, False, None),
        (700, 700, True, 33, False, None),
        (700, 700, True, 1, False, None),
        (700, 700, True, 650, True, [1.0, -3.0]),
        (600, 600, False, None, True, None),
        (900, 350, False, None, False, [30.0, 0.0]),
        (350, 900, False, None, True, None),
        (1, 1, True, 5, True, [0.5, -40.0]),
    ],
)
def test_heads_say_what_the_reference_says(
    query_len: int,
    key_len: int,
    causal: bool,
    window: int | None,
    biased: bool,
    sinks: list[float] | None,
) -> None:
    generator = np.random.default_rng(query_len + key_len)
    query = generator.standard_normal((2, query_len, 8)).astype(np.float32)
    key = generator.standard_normal((2, key_len, 8)).astype(np.float32)
    bias = None
    if biased:
        bias = generator.standard_normal((2, query_len + key_len - 1)).astype(np.float32)
    given = None if sinks is None else np.array(sinks, np.float32)
    reach = heads.Reach(causal, window)
    found = list(heads.blocks(query, key, 0.4, reach, bias, given, with_entropy=True))
    assert len(found) > 1 or query_len == 1
    said = heads.say(found, 2, query_len, key_len, EVERYTHING)

    apart = np.arange(key_len)[None, :] - np.arange(query_len)[:, None]
    _, weights = attention_reference(
        query[None],
        key[None],
        key[None],
        bias=None if bias is None else bias[None][:, :, apart + query_len - 1],
        sinks=sinks,
        scheme=Scheme(left=None if window is None else window - 1, right=0 if causal else None),
        scale=0.4,
    )
    weights = weights[0]
    np.testing.assert_allclose(said["weights"], weights, atol=2e-6)
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(axis=-1)
    np.testing.assert_allclose(said["entropy"], entropy, atol=2e-5)
    np.testing.assert_allclose(said["effective_context"], np.exp(entropy), rtol=2e-5)
    np.testing.assert_allclose(said["mass_on_first"], weights[..., :FIRST].sum(axis=-1), atol=2e-6)
    bins = np.minimum(np.abs(apart), DISTANCES - 1)
    masses = [np.bincount(bins.ravel(), head.ravel(), DISTANCES) for head in weights]
    np.testing.assert_allclose(said["mass_by_distance"], masses, rtol=2e-5, atol=1e-4)

    # From weights that a graph gives, all at once, it is the same.
    whole = heads.say(
        [heads.Block(0, 0, weights.astype(np.float32))], 2, query_len, key_len, EVERYTHING
    )
    for name, array in said.items():
        np.testing.assert_allclose(whole[name], array, rtol=1e-4, atol=1e-4)


def test_a_window_is_all_that_is_computed() -> None:
    query = np.zeros((1, 5000, 4), np.float32)
    reach = heads.Reach(True, 100)
    for block in heads.blocks(query, query, 1.0, reach, None, with_entropy=False):
        assert block.weights.shape[2] <= block.weights.shape[1] + 99
