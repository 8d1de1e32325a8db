"""What is returned besides the output never changes it, whichever variant that asks for."""

import numpy as np
import pytest
from attnserve_client import AttentionClient
from attnserve_export.reference import BIDIRECTIONAL, CAUSAL, attention_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HEADS, DIM = 4, 8
VARIANTS = ["", "fused", "blocked", "reference", "native"]

relaxed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
spoilt = st.sampled_from([0.0, np.nan, np.inf, -np.inf])


@relaxed
@given(
    variant=st.sampled_from(VARIANTS),
    asked=st.fixed_dictionaries(
        {
            name: st.booleans()
            for name in ("return_weights", "return_entropy", "return_mass_per_key")
        }
        | {"top_k": st.integers(0, 1), "mass_by_distance": st.integers(0, 1)}
    ),
    query_len=st.integers(1, 20),
    key_len=st.integers(1, 20),
    bias=st.sampled_from(["none", "random", "lowest", "all hidden"]),
    in_key=spoilt,
    in_value=spoilt,
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.needs_library
@pytest.mark.parametrize("model", ["causal", "half"])
def test_what_else_is_returned_never_changes_the_output(
    client: AttentionClient,
    model: str,
    variant: str,
    asked: dict[str, bool | int],
    query_len: int,
    key_len: int,
    bias: str,
    in_key: float,
    in_value: float,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    dtype = np.float16 if model == "half" else np.float32
    q, k, v = (
        generator.standard_normal((2, HEADS, length, DIM)).astype(dtype)
        for length in (query_len, key_len, key_len)
    )
    lengths = generator.integers(0, key_len + 1, 2)
    for row, length in enumerate(lengths):
        k[row, :, length:], v[row, :, length:] = in_key, in_value
    added = None
    if bias != "none":
        added = generator.standard_normal((1, HEADS, query_len, key_len)).astype(dtype)
        added[generator.random(added.shape) < 0.2] = -np.inf
        if bias != "random":
            added[:, :, 0] = np.finfo(dtype).min if bias == "lowest" else -np.inf
        if variant in ("fused", "blocked"):
            variant = ""
    if variant in ("fused", "blocked", "native"):  # which give no weights
        asked = asked | {"return_weights": False}
    given = {"key_lengths": lengths, "bias": added, "model": model}
    alone = client.attend(q, k, v, **given).output
    besides = client.attend(q, k, v, variant=variant, **given, **asked)
    scheme = CAUSAL if model == "causal" else BIDIRECTIONAL
    output, weights = attention_reference(q, k, v, key_lengths=lengths, bias=added, scheme=scheme)
    # Of FP16's lowest number scores keep a unit of 2^-7.
    tolerance = 1e-5 if model == "causal" else 2e-3 + (bias == "lowest") * 2**-7
    np.testing.assert_allclose(alone, output, atol=tolerance)
    np.testing.assert_allclose(besides.output, output, atol=tolerance)
    if besides.weights is not None:
        np.testing.assert_allclose(besides.weights, weights, atol=tolerance)
    if besides.entropy is not None:
        logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
        entropy = -(weights * logs).sum(-1)
        np.testing.assert_allclose(besides.entropy, entropy, atol=10 * tolerance)


@pytest.mark.needs_library
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("model", ["capped", "half"])
def test_a_bias_of_the_lowest_number_weighs_all_keys_alike(
    client: AttentionClient, model: str, weights: bool
) -> None:
    dtype = np.float16 if model == "half" else np.float32
    q = np.zeros((1, HEADS, 3, DIM), dtype)
    k, v = (np.random.default_rng(1).standard_normal((2, 1, HEADS, 7, DIM))).astype(dtype)
    bias = np.full((1, 1, 1, 7), np.finfo(dtype).min, dtype)
    result = client.attend(
        q, k, v, bias=bias, model=model, return_weights=weights, return_entropy=True
    )
    mean = np.broadcast_to(v.astype(np.float64).mean(axis=2, keepdims=True), q.shape)
    np.testing.assert_allclose(result.output, mean, atol=1e-3)
    np.testing.assert_allclose(result.entropy, np.log(7), atol=2e-3 if weights else 1e-5)
    if weights:
        np.testing.assert_allclose(result.weights, 1 / 7, atol=1e-3)
