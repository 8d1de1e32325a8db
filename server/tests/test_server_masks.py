"""Who sees whom, as requests say it: boolean masks, prefixes and packed sequences."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from attnserve_client import AsyncAttentionClient, AttentionClient, InvalidArgumentError
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.models import seeded, seeded_multihead
from attnserve_export.reference import (
    BIDIRECTIONAL,
    CAUSAL,
    attention_reference,
    packed_reference,
)
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from handmade import attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
relaxed = settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Tensors = tuple[np.ndarray, np.ndarray, np.ndarray]


def tensors(
    batch: int, query_len: int, key_len: int, seed: int, *, grouped: bool = False
) -> Tensors:
    generator = np.random.default_rng(seed)
    kv_heads, value_dim = (KV_HEADS, VALUE_DIM) if grouped else (HEADS, DIM)
    return (
        generator.standard_normal((batch, HEADS, query_len, DIM), np.float32),
        generator.standard_normal((batch, kv_heads, key_len, DIM), np.float32),
        generator.standard_normal((batch, kv_heads, key_len, value_dim), np.float32),
    )


def eager(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """PyTorch's attention in float64; 0 for queries that see nothing."""
    exact = (torch.from_numpy(array).double() for array in (q, k, v))
    mask = torch.tensor(visible)
    output = torch.nn.functional.scaled_dot_product_attention(*exact, mask, enable_gqa=True)
    return torch.where(mask.any(dim=-1, keepdim=True), output, 0).numpy()


@relaxed
@given(
    batch=st.integers(1, 3),
    query_len=st.integers(1, 60),
    key_len=st.integers(1, 150),
    full=st.sets(st.sampled_from(range(4))),
    share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    variant=st.sampled_from(["", "native", "reference", "softcap"]),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.needs_library
def test_any_boolean_mask_is_pytorchs(
    client: AttentionClient,
    batch: int,
    query_len: int,
    key_len: int,
    full: set[int],
    share: float,
    variant: str,
    seed: int,
) -> None:
    q, k, v = tensors(batch, query_len, key_len, seed, grouped=True)
    whole = (batch, HEADS, query_len, key_len)
    shape = [size if axis in full else 1 for axis, size in enumerate(whole)]
    mask = np.random.default_rng(seed).random(shape) < share
    more: dict[str, Any] = {"softcap": 1e6} if variant == "softcap" else {}
    result = client.attend(q, k, v, model="grouped", bias=mask, variant=variant, **more)
    expected = eager(q, k, v, np.broadcast_to(mask, whole))
    np.testing.assert_allclose(result.output, expected, atol=3e-6 * key_len**0.5)


@pytest.mark.parametrize("asked", [{}, {"return_weights": True}])
def test_a_boolean_mask_joins_the_models_own(client: AttentionClient, asked: dict) -> None:
    q, k, v = tensors(2, 9, 9, 1)
    mask = np.random.default_rng(2).random((2, 1, 9, 9)) < 0.5
    said = client.attend(
        q, k, v, model="causal", bias=mask, key_lengths=[9, 4], return_entropy=True,
        return_mass_per_key=True, top_k=2, mass_by_distance=3, **asked,
    )  # fmt: skip
    output, weights = attention_reference(q, k, v, mask=mask, key_lengths=[9, 4], scheme=CAUSAL)
    np.testing.assert_allclose(said.output, output, atol=1e-5)
    np.testing.assert_allclose(said.mass_per_key, weights.sum(axis=2), atol=1e-4)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    np.testing.assert_allclose(said.entropy, -(weights * logs).sum(-1), atol=1e-4)
    picked = np.take_along_axis(weights, said.top_k_indices, -1)
    np.testing.assert_allclose(picked, -np.sort(-weights, axis=-1)[..., :2], atol=1e-5)
    if asked:
        np.testing.assert_allclose(said.weights, weights, atol=1e-5)


def test_half_precision_and_layers_take_boolean_masks(client: AttentionClient) -> None:
    q, k, v = (array.astype(np.float16) for array in tensors(1, 20, 20, 3))
    mask = np.tri(20, dtype=bool)[None, None]
    output, _ = attention_reference(q, k, v, mask=mask)
    for variant in ("", "reference"):
        said = client.attend(q, k, v, model="half", bias=mask, variant=variant)
        np.testing.assert_allclose(said.output, output, atol=2e-3)
    hidden = np.random.default_rng(4).standard_normal((2, 7, 32), np.float32)
    mask = np.random.default_rng(5).random((2, HEADS, 7, 7)) < 0.5
    native = client.attend(hidden_states=hidden, model="self", bias=mask).output
    added = np.where(mask, 0, -np.inf).astype(np.float32)
    written = client.attend(hidden_states=hidden, model="self", bias=added, variant="reference")
    np.testing.assert_allclose(native, written.output, atol=1e-5)


@relaxed
@given(length=st.integers(1, 70), seed=st.integers(0, 2**32 - 1), weights=st.booleans())
def test_any_prefix_is_seen_by_all_queries(
    client: AttentionClient, length: int, seed: int, weights: bool
) -> None:
    generator = np.random.default_rng(seed)
    q, k, v = tensors(3, length, length, seed)
    prefixes, lengths = generator.integers(0, length + 1, (2, 3))
    said = client.attend(
        q, k, v, model="causal", prefix_lengths=prefixes, key_lengths=lengths,
        return_weights=weights, return_entropy=True,
    )  # fmt: skip
    rows, keys = np.arange(length)[:, None], np.arange(length)
    visible = (keys <= rows) | (keys < prefixes[:, None, None, None])
    visible &= keys < lengths[:, None, None, None]
    expected = eager(q, k, v, np.broadcast_to(visible, (3, HEADS, length, length)))
    np.testing.assert_allclose(said.output, expected, atol=3e-6 * length**0.5)


def starts(generator: np.random.Generator, count: int, tokens: int) -> np.ndarray:
    return np.concatenate([[0], np.sort(generator.integers(0, tokens + 1, count - 1)), [tokens]])


@relaxed
@given(
    count=st.integers(1, 7),
    query_len=st.integers(1, 90),
    key_len=st.none() | st.integers(1, 90),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.needs_library
def test_any_packed_sequences_are_computed_by_themselves(
    client: AttentionClient, count: int, query_len: int, key_len: int | None, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    q, k, v = tensors(1, query_len, key_len or query_len, seed)
    queries = starts(generator, count, query_len)
    given: dict[str, Any] = {"cu_seqlens_q": queries.astype(np.int32)}
    keys = queries
    if key_len is not None:
        keys = given["cu_seqlens_k"] = starts(generator, count, key_len)
    given["prefix_lengths"] = generator.integers(0, 9, count).clip(max=k.shape[2])
    said = client.attend(q, k, v, model="causal", **given, return_mass_per_key=True)
    output, weights, _ = packed_reference(
        q, k, v, queries, keys, prefix_lengths=given["prefix_lengths"], scheme=CAUSAL
    )
    assert said.variant == "packed"
    np.testing.assert_allclose(said.output, output, atol=3e-6 * k.shape[2] ** 0.5)
    np.testing.assert_allclose(said.mass_per_key, weights.sum(axis=2), atol=1e-4)


@pytest.mark.needs_library
def test_packed_sequences_are_diagnosed_one_by_one(client: AttentionClient) -> None:
    q, k, v = tensors(1, 30, 30, 6)
    packed = client.attend(
        q, k, v, model="causal", cu_seqlens_q=[0, 11, 11, 30], return_entropy=True, top_k=2,
        mass_by_distance=5, return_output=False,
    )  # fmt: skip
    assert packed.mass_by_distance.shape == (3, HEADS, 5)
    assert not packed.mass_by_distance[1].any()
    for row, (first, last) in ((0, (0, 11)), (2, (11, 30))):
        one = (array[:, :, first:last] for array in (q, k, v))
        alone = client.attend(
            *one, model="causal", return_entropy=True, top_k=2, mass_by_distance=5
        )
        np.testing.assert_array_equal(packed.entropy[:, :, first:last], alone.entropy)
        np.testing.assert_array_equal(packed.mass_by_distance[row], alone.mass_by_distance[0])
        weighty = alone.top_k_weights > 0
        np.testing.assert_array_equal(
            packed.top_k_indices[:, :, first:last][weighty], alone.top_k_indices[weighty] + first
        )


@pytest.mark.needs_library
def test_weights_of_packed_sequences_are_those_of_each(client: AttentionClient) -> None:
    q, k, v = tensors(1, 30, 30, 9)
    starts = [0, 11, 11, 30]
    output, weights, log_sum_exp = packed_reference(q, k, v, starts, starts, scheme=CAUSAL)
    said = client.attend(
        q, k, v, model="causal", cu_seqlens_q=starts, return_weights=True, return_entropy=True,
        return_log_sum_exp=True, mass_by_distance=4,
    )  # fmt: skip
    assert said.variant == "packed_weights"
    np.testing.assert_array_equal(said.cu_seqlens_k, starts)
    for found, expected in ((said.output, output), (said.weights, weights)):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(said.log_sum_exp, log_sum_exp, atol=1e-5)
    assert said.mass_by_distance.shape == (3, HEADS, 4)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    np.testing.assert_allclose(said.entropy, -(weights * logs).sum(axis=-1), atol=1e-5)
    np.testing.assert_allclose(
        said.mass_by_distance.sum(axis=-1), np.array([[11, 0, 19]] * HEADS).T, rtol=1e-5
    )
    forced = client.attend(
        q, k, v, model="causal", cu_seqlens_q=starts, variant="packed_weights", mass_by_distance=4
    )
    np.testing.assert_array_equal(forced.mass_by_distance, said.mass_by_distance)


@relaxed
@given(
    count=st.integers(1, 5),
    query_len=st.integers(1, 60),
    key_len=st.integers(1, 60),
    model=st.sampled_from(["self", "cross"]),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.needs_library
def test_layers_take_packed_sequences(
    client: AttentionClient, count: int, query_len: int, key_len: int, model: str, seed: int
) -> None:
    cross, generator = model == "cross", np.random.default_rng(seed)
    hidden = generator.standard_normal((1, query_len, 32), np.float32)
    context = generator.standard_normal((1, key_len, 24), np.float32)
    queries = keys = starts(generator, count, query_len)
    given: dict[str, Any] = {"hidden_states": hidden, "cu_seqlens_q": queries}
    if cross:
        keys = starts(generator, count, key_len)
        given |= {"context": context, "cu_seqlens_k": keys}
    said = client.attend(model=model, return_weights=True, **given)
    # What conftest.py writes.
    if cross:
        multihead = seeded_multihead(32, 4, 24, bias_terms=True, seed=3)
        layer = AttentionLayer.of_multihead(multihead, "cross").double()
    else:
        config = LayerConfig(attention(4, 8, mask="causal"), embed_dim=32, context_dim=None)
        layer = seeded(AttentionLayer, config, 3).double()
    with torch.no_grad():
        exact = [torch.from_numpy(each).double() for each in (hidden, context if cross else hidden)]
        q, k, v = (heads.numpy() for heads in layer.heads(*exact))
        output, weights, _ = packed_reference(
            q, k, v, queries, keys, scheme=BIDIRECTIONAL if cross else CAUSAL
        )
        merged = layer.merge(torch.from_numpy(output)).numpy()
    np.testing.assert_allclose(said.output, merged, atol=1e-4)
    np.testing.assert_allclose(said.weights, weights, atol=1e-5)


@pytest.mark.needs_library
def test_streams_and_asyncio_take_them_too(client: AttentionClient, address: str) -> None:
    q, k, v = tensors(1, 40, 40, 7)
    given: dict[str, Any] = {"cu_seqlens_q": [0, 3, 40], "prefix_lengths": [2, 20]}
    given["bias"] = np.random.default_rng(8).random((1, HEADS, 40, 40)) < 0.7
    output, _, _ = packed_reference(
        q, k, v, [0, 3, 40], [0, 3, 40], mask=given["bias"], prefix_lengths=[2, 20], scheme=CAUSAL
    )
    with client.stream() as stream:
        results = [stream.submit(q, k, v, model="causal", **given) for _ in range(2)]
        for result in results:
            np.testing.assert_allclose(result.result().output, output, atol=1e-5)

    async def once() -> np.ndarray:
        async with AsyncAttentionClient(address) as opened:
            return (await opened.attend(q, k, v, model="causal", **given)).output

    np.testing.assert_allclose(asyncio.run(once()), output, atol=1e-5)


@pytest.mark.needs_library
def test_the_open_inference_protocol_takes_them_too(address: str) -> None:
    q, k, v = tensors(1, 12, 12, 9)
    mask = np.random.default_rng(10).random((1, 1, 12, 12)) < 0.7
    arrays = {"query": q, "key": k, "value": v, "bias": mask}
    arrays |= {"cu_seqlens_q": np.array([0, 5, 12]), "prefix_lengths": np.array([5, 1])}
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    output, _, _ = packed_reference(
        q, k, v, [0, 5, 12], [0, 5, 12], mask=mask, prefix_lengths=[5, 1], scheme=CAUSAL
    )
    with triton.InferenceServerClient(address) as infer:
        result = infer.infer("causal", inputs)
        np.testing.assert_allclose(result.as_numpy("output"), output, atol=1e-5)
        inputs[4].set_data_from_numpy(np.array([0, 13, 12]))
        with pytest.raises(InferenceServerException, match=r"cu_seqlens_q\[1\]: given 13; "):
            infer.infer("causal", inputs)


WRONG = {
    "starts fall": ({"cu_seqlens_q": [0, 7, 3, 9]}, r"cu_seqlens_q\[2\]: given 3; allowed: 7..9"),
    "starts begin late": ({"cu_seqlens_q": [1, 9]}, r"cu_seqlens_q\[0\]: given 1; allowed: 0"),
    "starts end early": ({"cu_seqlens_q": [0, 8]}, r"cu_seqlens_q\[1\]: given 8; allowed: 9"),
    "starts go beyond": ({"cu_seqlens_q": [0, 10, 9]}, r"cu_seqlens_q\[1\]: given 10; allowed: 0"),
    "one start": ({"cu_seqlens_q": [0]}, r"cu_seqlens_q.shape: given \[1\]; allowed: \[N \+ 1\]"),
    "unlike starts": (
        {"cu_seqlens_q": [0, 9], "cu_seqlens_k": [0, 1, 9]}, r"cu_seqlens_k.shape: given \[3\]",
    ),
    "keys alone": ({"cu_seqlens_k": [0, 9]}, "cu_seqlens_k: given a tensor; allowed: nothing"),
    "lengths too": ({"cu_seqlens_q": [0, 9], "key_lengths": [9]}, "key_lengths: given a tensor"),
    "prefixes of rows": (
        {"cu_seqlens_q": [0, 4, 9], "prefix_lengths": [1]}, r"prefix_lengths.shape: given \[1\]",
    ),
    "a long prefix": ({"prefix_lengths": [10]}, r"prefix_lengths\[0\]: given 10; allowed: 0..9"),
    "a negative prefix": ({"prefix_lengths": [-1]}, r"prefix_lengths\[0\]: given -1"),
    "a mask of integers": (
        {"bias": np.ones((1, 1, 9, 9), np.int32)}, "bias.dtype: given INT32; allowed: FP32 or BOOL",
    ),
    "a small mask": ({"bias": np.ones((1, 1, 9, 8), bool)}, r"bias.shape: given \[1, 1, 9, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_is_refused(client: AttentionClient, given: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        client.attend(*tensors(1, 9, 9, 11), model="causal", **given)


def test_several_rows_and_unlike_lengths_are_not_packed(client: AttentionClient) -> None:
    with pytest.raises(InvalidArgumentError, match="batch B: given 2; allowed: 1 with cu_seqlens"):
        client.attend(*tensors(2, 9, 9, 12), model="causal", cu_seqlens_q=[0, 9])
    with pytest.raises(InvalidArgumentError, match="cu_seqlens_k: given nothing"):
        client.attend(*tensors(1, 9, 8, 12), model="causal", cu_seqlens_q=[0, 9])


def test_a_byte_that_is_no_truth_value_is_refused(channel: grpc.Channel) -> None:
    q, k, v = tensors(1, 2, 3, 13)
    request = pb.AttendRequest(
        model="causal",
        bias=pb.Tensor(dtype=pb.BOOL, shape=[1, 1, 2, 3], data=bytes([1, 0, 1, 1, 1, 7])),
        **{
            name: pb.Tensor(dtype=pb.FP32, shape=array.shape, data=array.tobytes())
            for name, array in (("query", q), ("key", k), ("value", v))
        },
    )
    with pytest.raises(
        grpc.RpcError, match=r"bias\[0, 0, 1, 2\]: given a byte of 7; allowed: 0 or 1"
    ):
        pb_grpc.AttentionServiceStub(channel).Attend(request)


UNABLE: dict[str, tuple[str, dict, str]] = {
    "no prefixes": ("grouped", {"prefix_lengths": [1]}, "it takes no prefix_lengths"),
    "not packed": ("causal", {"variant": "packed"}, "it needs cu_seqlens_q"),
    "not for packed": (
        "causal", {"variant": "native", "cu_seqlens_q": [0, 9]}, "it takes no cu_seqlens_q",
    ),
}  # fmt: skip


@pytest.mark.needs_library
@pytest.mark.parametrize(("model", "given", "message"), UNABLE.values(), ids=UNABLE.keys())
def test_what_a_model_cannot_do_is_refused(
    client: AttentionClient, model: str, given: dict, message: str
) -> None:
    arrays = tensors(1, 9, 9, 14, grouped=model == "grouped")
    with pytest.raises(Exception, match=message):
        client.attend(*arrays, model=model, **given)


@pytest.mark.parametrize("name", ["prefix_lengths", "cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("given", [[0.5], np.ones(2, np.float32), np.array([True])])
def test_the_sdk_names_an_argument_of_a_wrong_type(
    client: AttentionClient, name: str, given: Any
) -> None:
    with pytest.raises(TypeError, match=f"{name}: given .* allowed: .* integers"):
        client.attend(*tensors(1, 2, 2, 15), model="causal", **{name: given})
