"""Attend over real gRPC, against the float64 reference."""

import numpy as np
import pytest
from attnserve_client import AttentionClient
from attnserve_export.reference import CAUSAL, attention_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6

relaxed = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def tensors(
    batch: int, query_len: int, key_len: int, seed: int, *, kv_heads: int = HEADS, dv: int = DIM
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((batch, HEADS, query_len, DIM)).astype(np.float32),
        generator.standard_normal((batch, kv_heads, key_len, DIM)).astype(np.float32),
        generator.standard_normal((batch, kv_heads, key_len, dv)).astype(np.float32),
    )


@relaxed
@given(
    batch=st.integers(1, 4),
    query_len=st.integers(1, 70),
    key_len=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_shape_gives_what_the_reference_gives(
    client: AttentionClient,
    batch: int,
    query_len: int,
    key_len: int,
    seed: int,
    data: st.DataObject,
) -> None:
    q, k, v = tensors(batch, query_len, key_len, seed, kv_heads=KV_HEADS, dv=VALUE_DIM)
    lengths = data.draw(
        st.none() | st.lists(st.integers(0, key_len), min_size=batch, max_size=batch)
    )
    result = client.attend(
        q, k, v, model="grouped", key_lengths=lengths, return_weights=True, return_entropy=True,
        top_k=1, return_mass_per_key=True,
    )  # fmt: skip
    output, weights = attention_reference(q, k, v, key_lengths=lengths)
    tolerance = 2e-6 * np.sqrt(key_len)
    np.testing.assert_allclose(result.output, output, atol=tolerance)
    np.testing.assert_allclose(result.weights, weights, atol=tolerance)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    np.testing.assert_allclose(result.entropy, -(weights * logs).sum(-1), atol=1e-4)
    np.testing.assert_allclose(result.mass_per_key, weights.sum(-2), atol=1e-4)
    np.testing.assert_allclose(result.top_k_weights[..., 0], weights.max(-1), atol=tolerance)
    picked = np.take_along_axis(weights, result.top_k_indices, -1)
    np.testing.assert_allclose(picked[..., 0], weights.max(-1), atol=tolerance)


def test_causal_ignores_future_keys(client: AttentionClient) -> None:
    q, k, v = tensors(1, 9, 9, 1)
    before = client.attend(q, k, v, model="causal").output
    k[:, :, 5:], v[:, :, 5:] = 100.0, -100.0
    after = client.attend(q, k, v, model="causal").output
    np.testing.assert_array_equal(before[:, :, :5], after[:, :, :5])


def test_padding_keys_have_no_weight_and_no_say(client: AttentionClient) -> None:
    q, k, v = tensors(2, 5, 12, 2)
    lengths = np.array([7, 0])
    before = client.attend(q, k, v, model="causal", key_lengths=lengths, return_weights=True)
    k[0, :, 7:], v[0, :, 7:] = 50.0, -50.0
    after = client.attend(q, k, v, model="causal", key_lengths=lengths)
    assert not before.weights[0, :, :, 7:].any()
    np.testing.assert_allclose(before.output[0], after.output[0], atol=1e-6)
    assert not before.output[1].any()
    assert not before.weights[1].any()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 6, 9), (1, 4, 1, 9), (2, 1, 6, 1)])
def test_a_bias_broadcasts_and_minus_infinity_masks(client: AttentionClient, shape: tuple) -> None:
    q, k, v = tensors(2, 6, 9, 3)
    bias = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    if shape[-1] > 1:
        bias[..., 3] = -np.inf
    result = client.attend(q, k, v, model="causal", bias=bias, return_weights=True)
    output, weights = attention_reference(q, k, v, bias=bias, scheme=CAUSAL)
    np.testing.assert_allclose(result.output, output, atol=1e-5)
    np.testing.assert_allclose(result.weights, weights, atol=1e-5)


@pytest.mark.needs_library
def test_scale_and_softcap_of_a_request(client: AttentionClient) -> None:
    q, k, v = tensors(1, 8, 8, 5)
    result = client.attend(q, k, v, model="causal", scale=0.7, softcap=3.0)
    expected, _ = attention_reference(q, k, v, scheme=CAUSAL, scale=0.7, softcap=3.0)
    np.testing.assert_allclose(result.output, expected, atol=1e-5)
    assert result.variant == "native"
    forced = client.attend(q, k, v, model="causal", scale=0.7, softcap=3.0, variant="softcap")
    np.testing.assert_allclose(forced.output, expected, atol=1e-5)


def test_a_models_own_softcap_is_kept_unless_the_request_gives_another(
    client: AttentionClient,
) -> None:
    q, k, v = tensors(1, 8, 8, 5)
    for given_softcap, effective in ((None, 5.0), (5.0, 5.0), (2.0, 2.0)):
        result = client.attend(q, k, v, model="capped", softcap=given_softcap)
        expected, _ = attention_reference(q, k, v, softcap=effective)
        np.testing.assert_allclose(result.output, expected, atol=1e-5)
    result = client.attend(q, k, v, model="capped", variant="softcap")
    expected, _ = attention_reference(q, k, v, softcap=5.0)
    np.testing.assert_allclose(result.output, expected, atol=1e-5)


def test_half_precision_stays_half_on_the_wire(client: AttentionClient) -> None:
    q, k, v = (array.astype(np.float16) for array in tensors(2, 33, 33, 6))
    result = client.attend(q, k, v, model="half", return_weights=True)
    output, weights = attention_reference(q, k, v)
    assert result.output.dtype == result.weights.dtype == np.float16
    np.testing.assert_allclose(result.output, output, atol=2e-3)
    np.testing.assert_allclose(result.weights, weights, atol=2e-3)


@pytest.mark.needs_library
def test_weights_come_only_when_asked_for(client: AttentionClient) -> None:
    q, k, v = tensors(1, 4, 4, 7)
    plain = client.attend(q, k, v, model="causal")
    assert plain.variant == "native"
    assert plain.weights is None
    assert plain.entropy is None
    bare = client.attend(q, k, v, model="causal", return_output=False, return_entropy=True)
    assert bare.output is None
    assert bare.weights is None
    assert bare.entropy.shape == (1, HEADS, 4)


def test_variants_agree_and_can_be_forced(client: AttentionClient) -> None:
    q, k, v = tensors(1, 30, 30, 8)
    fused, reference = (
        client.attend(q, k, v, model="causal", variant=variant)
        for variant in ("fused", "reference")
    )
    assert (fused.variant, reference.variant) == ("fused", "reference")
    np.testing.assert_allclose(fused.output, reference.output, atol=1e-5)


def test_an_empty_version_is_the_highest_number(client: AttentionClient) -> None:
    q, k, v = tensors(1, 3, 3, 9, kv_heads=KV_HEADS, dv=VALUE_DIM)
    assert client.attend(q, k, v, model="grouped").version == "10"
    assert client.attend(q, k, v, model="grouped", version=1).version == "1"


def test_layers_take_hidden_states(client: AttentionClient) -> None:
    generator = np.random.default_rng(10)
    hidden = generator.standard_normal((2, 7, 32)).astype(np.float32)
    result = client.attend(hidden_states=hidden, model="self", return_weights=True)
    assert result.output.shape == (2, 7, 32)
    np.testing.assert_allclose(result.weights.sum(-1), 1, atol=1e-5)
    assert not np.triu(result.weights, 1).any()
    context = generator.standard_normal((2, 5, 24)).astype(np.float32)
    crossed = client.attend(
        hidden_states=hidden, context=context, model="cross", return_weights=True
    )
    assert crossed.output.shape == (2, 7, 32)
    assert crossed.weights.shape == (2, 4, 7, 5)


def test_every_answer_says_where_the_time_went(client: AttentionClient) -> None:
    timings = client.attend(*tensors(3, 64, 64, 11), model="causal").timings
    assert timings.batch_size == 3
    assert timings.compute > 0
    assert timings.deserialize > 0
