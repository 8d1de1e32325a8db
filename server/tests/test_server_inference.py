"""The Open Inference Protocol as tritonclient speaks it."""

import asyncio
import queue
import re
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from attnserve_client import AttentionClient
from attnserve_export.reference import CAUSAL, attention_reference
from attnserve_server.app import AttentionServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6


@pytest.fixture(scope="module")
def infer_client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> service_pb2_grpc.GRPCInferenceServiceStub:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensors(batch: int, query_len: int, key_len: int, seed: int, **sizes: int) -> dict:
    generator = np.random.default_rng(seed)
    kv_heads, value_dim = sizes.get("kv_heads", HEADS), sizes.get("value_dim", DIM)
    shapes = {
        "query": (batch, HEADS, query_len, DIM),
        "key": (batch, kv_heads, key_len, DIM),
        "value": (batch, kv_heads, key_len, value_dim),
    }
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def inputs(arrays: dict) -> list[triton.InferInput]:
    made = []
    for name, array in arrays.items():
        made.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        made[-1].set_data_from_numpy(array)
    return made


def outputs(*names: str) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name) for name in names]


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 3),
    query_len=st.integers(1, 40),
    key_len=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_gives_what_the_reference_gives(
    infer_client: triton.InferenceServerClient,
    batch: int,
    query_len: int,
    key_len: int,
    seed: int,
) -> None:
    arrays = tensors(batch, query_len, key_len, seed, kv_heads=KV_HEADS, value_dim=VALUE_DIM)
    lengths = np.random.default_rng(seed).integers(0, key_len + 1, batch)
    result = infer_client.infer(
        "grouped", inputs({**arrays, "key_lengths": lengths}), request_id="seven"
    )
    expected, _ = attention_reference(*arrays.values(), key_lengths=lengths)
    np.testing.assert_allclose(result.as_numpy("output"), expected, atol=2e-6 * key_len**0.5)
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("grouped", "10", "seven")
    assert [output.name for output in response.outputs] == ["output"]
    assert response.parameters["variant"].string_param


def test_a_request_like_an_earlier_one_is_answered_anew(
    infer_client: triton.InferenceServerClient,
) -> None:
    # Alike in every byte but the elements: the server does not check it again.
    for seed in range(4):
        arrays = tensors(2, 6, 9, seed)
        lengths = np.random.default_rng(seed).integers(0, 10, 2)
        result = infer_client.infer(
            "causal",
            inputs({**arrays, "key_lengths": lengths}),
            outputs=outputs("entropy", "output"),
            request_id=str(seed % 2),
        )
        output, weights = attention_reference(*arrays.values(), key_lengths=lengths, scheme=CAUSAL)
        np.testing.assert_allclose(result.as_numpy("output"), output, atol=1e-5)
        logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
        np.testing.assert_allclose(result.as_numpy("entropy"), -(weights * logs).sum(-1), atol=1e-4)
        assert [found.name for found in result.get_response().outputs] == ["entropy", "output"]
        assert result.get_response().id == str(seed % 2)
    # Its elements are checked each time.
    with pytest.raises(InferenceServerException, match=r"key_lengths\[1\]: given 10"):
        infer_client.infer(
            "causal",
            inputs({**arrays, "key_lengths": np.array([1, 10])}),
            outputs=outputs("entropy", "output"),
            request_id="1",
        )


def test_everything_that_can_be_asked_for(infer_client: triton.InferenceServerClient) -> None:
    arrays = tensors(2, 6, 9, 1)
    bias = np.random.default_rng(2).standard_normal((1, HEADS, 1, 9), np.float32)
    names = ["top_k_weights", "mass_per_key", "weights", "entropy", "output", "top_k_indices"]
    result = infer_client.infer(
        "causal",
        inputs({**arrays, "bias": bias}),
        outputs=outputs(*names, "mass_by_distance"),
        parameters={"scale": 0.5, "top_k": 2, "mass_by_distance": 3},
        priority=1,
        timeout=60_000_000,
    )
    output, weights = attention_reference(*arrays.values(), bias=bias, scheme=CAUSAL, scale=0.5)
    np.testing.assert_allclose(result.as_numpy("output"), output, atol=1e-5)
    np.testing.assert_allclose(result.as_numpy("weights"), weights, atol=1e-5)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    np.testing.assert_allclose(result.as_numpy("entropy"), -(weights * logs).sum(-1), atol=1e-4)
    np.testing.assert_allclose(result.as_numpy("mass_per_key"), weights.sum(-2), atol=1e-4)
    heaviest = np.sort(weights, -1)[..., :-3:-1]
    np.testing.assert_allclose(result.as_numpy("top_k_weights"), heaviest, atol=1e-5)
    picked = np.take_along_axis(weights, result.as_numpy("top_k_indices"), -1)
    np.testing.assert_allclose(picked, heaviest, atol=1e-5)
    distances = result.as_numpy("mass_by_distance")
    assert distances.shape == (2, HEADS, 3)
    diagonal = np.diagonal(weights, axis1=-2, axis2=-1).sum(-1)
    np.testing.assert_allclose(distances[..., 0], diagonal, atol=1e-4)
    assert [each.name for each in result.get_response().outputs] == [*names, "mass_by_distance"]


def test_only_what_is_asked_for_comes(infer_client: triton.InferenceServerClient) -> None:
    result = infer_client.infer("causal", inputs(tensors(1, 4, 4, 3)), outputs=outputs("entropy"))
    assert [output.name for output in result.get_response().outputs] == ["entropy"]
    assert result.as_numpy("entropy").shape == (1, HEADS, 4)
    assert result.as_numpy("output") is None


def test_a_variant_and_a_version_can_be_named(infer_client: triton.InferenceServerClient) -> None:
    arrays = tensors(1, 5, 5, 4, kv_heads=KV_HEADS, value_dim=VALUE_DIM)
    result = infer_client.infer(
        "grouped", inputs(arrays), model_version="1", parameters={"variant": "reference"}
    )
    response = result.get_response()
    assert response.model_version == "1"
    assert response.parameters["variant"].string_param == "reference"


def test_half_precision_travels_raw(infer_client: triton.InferenceServerClient) -> None:
    arrays = {name: array.astype(np.float16) for name, array in tensors(2, 9, 9, 5).items()}
    result = infer_client.infer("half", inputs(arrays))
    expected, _ = attention_reference(*arrays.values())
    assert result.as_numpy("output").dtype == np.float16
    np.testing.assert_allclose(result.as_numpy("output"), expected, atol=2e-3)


def test_typed_contents_are_taken_too(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    arrays = tensors(2, 3, 4, 6)
    request = oip.ModelInferRequest(model_name="causal")
    for name, array in arrays.items():
        tensor = request.inputs.add(name=name, datatype="FP32", shape=array.shape)
        tensor.contents.fp32_contents.extend(array.ravel())
    tensor = request.inputs.add(name="key_lengths", datatype="INT64", shape=[2])
    tensor.contents.int64_contents.extend([4, 2])
    response = stub.ModelInfer(request)
    expected, _ = attention_reference(*arrays.values(), key_lengths=[4, 2], scheme=CAUSAL)
    output = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(expected.shape)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_layers_take_hidden_states(
    infer_client: triton.InferenceServerClient, client: AttentionClient
) -> None:
    generator = np.random.default_rng(7)
    hidden = generator.standard_normal((2, 7, 32), np.float32)
    context = generator.standard_normal((2, 5, 24), np.float32)
    result = infer_client.infer("cross", inputs({"hidden_states": hidden, "context": context}))
    expected = client.attend(hidden_states=hidden, context=context, model="cross").output
    np.testing.assert_allclose(result.as_numpy("output"), expected, atol=1e-6)


def test_transformers_take_padded_tokens(
    infer_client: triton.InferenceServerClient, client: AttentionClient
) -> None:
    ids = np.array([[2, 5, 6, 7, 3], [2, 3, 0, 0, 0]], np.int64)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], np.int64)
    result = infer_client.infer(
        "bert",
        inputs({"input_ids": ids, "attention_mask": mask}),
        outputs=outputs("weights_2", "last_hidden_state", "weights_0"),
    )
    expected = client.attend_tokens(
        [[2, 5, 6, 7, 3], [2, 3]], model="bert", return_weights=True, layers=[0, 2]
    )
    hidden = result.as_numpy("last_hidden_state")
    assert hidden.shape == (2, 5, 24)
    for row, length in enumerate((5, 2)):
        np.testing.assert_allclose(hidden[row, :length], expected.hidden[row], atol=1e-5)
        for index, layer in enumerate((0, 2)):
            weights = result.as_numpy(f"weights_{layer}")[row]
            np.testing.assert_allclose(
                weights[:, :length, :length], expected.weights[row][index], atol=1e-5
            )
            assert not weights[:, :, length:].any()
    assert not hidden[1, 2:].any()
    alone = infer_client.infer("bert", inputs({"input_ids": ids[:1]}))
    np.testing.assert_allclose(alone.as_numpy("last_hidden_state"), hidden[:1], atol=1e-5)


def test_padding_may_be_on_the_left(
    infer_client: triton.InferenceServerClient, client: AttentionClient
) -> None:
    """Positions count from the first token, as transformers' `generate` has it."""
    ids = np.array([[0, 2, 7, 3, 0], [2, 9, 8, 7, 3], [0, 0, 0, 0, 5]], np.int64)
    mask = np.array([[0, 1, 1, 1, 0], [1] * 5, [0, 0, 0, 0, 1]], np.int64)
    result = infer_client.infer(
        "bert",
        inputs({"input_ids": ids, "attention_mask": mask}),
        outputs=outputs("weights_1", "last_hidden_state"),
    )
    expected = client.attend_tokens(
        [row[seen > 0] for row, seen in zip(ids, mask, strict=True)],
        model="bert",
        return_weights=True,
        layers=[1],
    )
    hidden, weights = result.as_numpy("last_hidden_state"), result.as_numpy("weights_1")
    for row, seen in enumerate(mask.astype(bool)):
        np.testing.assert_allclose(hidden[row, seen], expected.hidden[row], atol=1e-5)
        assert not hidden[row, ~seen].any()
        own = weights[row][:, seen][:, :, seen]
        np.testing.assert_allclose(own, expected.weights[row][0], atol=1e-5)
        np.testing.assert_allclose(weights[row].sum(axis=(1, 2)), own.sum(axis=(1, 2)), atol=1e-5)


def test_the_async_client_has_many_requests_under_way(address: str) -> None:
    async def run() -> None:
        async with triton_aio.InferenceServerClient(address) as opened:
            assert await opened.is_model_ready("causal")
            cases = [tensors(1, 4 + seed, 4 + seed, seed) for seed in range(4)]
            calls = [opened.infer("causal", inputs(arrays)) for arrays in cases]
            for arrays, result in zip(cases, await asyncio.gather(*calls), strict=True):
                expected, _ = attention_reference(*arrays.values(), scheme=CAUSAL)
                np.testing.assert_allclose(result.as_numpy("output"), expected, atol=1e-5)

    asyncio.run(run())


def test_the_async_client_streams(address: str) -> None:
    cases = [tensors(1, length, length, length) for length in (80, 2, 40)]

    async def requests() -> AsyncIterator[dict]:
        for number, arrays in enumerate(cases):
            yield {
                "model_name": "causal",
                "inputs": inputs(arrays),
                "request_id": str(number),
            }

    async def run() -> list[triton.InferResult]:
        async with triton_aio.InferenceServerClient(address) as opened:
            answers = [answer async for answer in opened.stream_infer(requests())]
            assert not any(error for _, error in answers)
            return [result for result, _ in answers]

    results = asyncio.run(run())
    assert [result.get_response().id for result in results] == ["0", "1", "2"]
    for arrays, result in zip(cases, results, strict=True):
        expected, _ = attention_reference(*arrays.values(), scheme=CAUSAL)
        np.testing.assert_allclose(result.as_numpy("output"), expected, atol=1e-5)


def test_a_stream_answers_in_order_and_outlives_errors(
    infer_client: triton.InferenceServerClient,
) -> None:
    answers: queue.SimpleQueue = queue.SimpleQueue()
    infer_client.start_stream(lambda result, error: answers.put((result, error)))
    cases = [tensors(1, length, length, length) for length in (300, 1, 200, 2, 3, 100, 4)]
    for number, arrays in enumerate(cases):
        # A request in the middle fails.
        model = "causal" if number != 3 else "nope"
        infer_client.async_stream_infer(
            model, inputs(arrays), request_id=str(number), enable_empty_final_response=True
        )
    for number, arrays in enumerate(cases):
        result, error = answers.get(timeout=20)
        if number == 3:
            assert "model: given 'nope'" in error.message()
            continue
        assert error is None
        response = result.get_response()
        assert response.id == str(number)
        assert response.parameters["triton_final_response"].bool_param
        expected, _ = attention_reference(*arrays.values(), scheme=CAUSAL)
        np.testing.assert_allclose(result.as_numpy("output"), expected, atol=1e-5)
    infer_client.stop_stream()
    assert answers.empty()


def test_a_failed_request_of_a_stream_says_which_it_was(
    stub: service_pb2_grpc.GRPCInferenceServiceStub,
) -> None:
    sent = oip.ModelInferRequest(model_name="causal", id="a7")
    (answer,) = stub.ModelStreamInfer(iter([sent]))
    assert answer.error_message.startswith("query: given nothing")
    assert answer.infer_response.id == "a7"
    assert answer.infer_response.parameters["triton_final_response"].bool_param


def test_a_stream_may_be_cancelled(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, infer_client: triton.InferenceServerClient
) -> None:
    hold = threading.Event()

    def requests() -> Iterator[oip.ModelInferRequest]:
        yield oip.ModelInferRequest(model_name="causal")
        hold.wait(20)

    call = stub.ModelStreamInfer(requests())
    assert next(call).error_message
    call.cancel()
    hold.set()
    with pytest.raises(grpc.RpcError) as raised:
        next(call)
    assert raised.value.code() == grpc.StatusCode.CANCELLED
    assert infer_client.is_server_ready()


def test_the_server_and_its_models_describe_themselves(
    infer_client: triton.InferenceServerClient,
) -> None:
    assert infer_client.is_server_live()
    assert infer_client.is_server_ready()
    assert infer_client.is_model_ready("grouped", "1")
    assert not infer_client.is_model_ready("grouped", "2")
    assert not infer_client.is_model_ready("nope")
    server = infer_client.get_server_metadata()
    assert server.name == "attnserve"
    assert {"statistics", "model_repository", "system_shared_memory"} <= set(server.extensions)
    model = infer_client.get_model_metadata("grouped")
    assert list(model.versions) == ["1", "10"]
    shapes = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in model.inputs}
    assert shapes == {
        "query": ("FP32", [-1, HEADS, -1, DIM]),
        "key": ("FP32", [-1, KV_HEADS, -1, DIM]),
        "value": ("FP32", [-1, KV_HEADS, -1, VALUE_DIM]),
        "key_lengths": ("INT64", [-1]),
        "bias": ("FP32", [-1, -1, -1, -1]),
        "sinks": ("FP32", [HEADS]),
        "cu_seqlens_q": ("INT64", [-1]),
        "cu_seqlens_k": ("INT64", [-1]),
    }
    assert [tensor.name for tensor in model.outputs] == [
        "output", "weights", "entropy", "top_k_indices", "top_k_weights", "mass_per_key",
        "mass_by_distance", "log_sum_exp",
    ]  # fmt: skip
    bert = infer_client.get_model_metadata("bert")
    taken = ["input_ids", "attention_mask", "token_type_ids"]
    assert [tensor.name for tensor in bert.inputs] == taken
    assert [tensor.name for tensor in bert.outputs] == [
        "last_hidden_state", "weights_0", "weights_1", "weights_2",
    ]  # fmt: skip


def test_what_is_described_is_what_comes(infer_client: triton.InferenceServerClient) -> None:
    described = infer_client.get_model_metadata("grouped").outputs
    result = infer_client.infer(
        "grouped",
        inputs(tensors(2, 5, 7, 8, kv_heads=KV_HEADS, value_dim=VALUE_DIM)),
        outputs=outputs(*(tensor.name for tensor in described)),
        parameters={"top_k": 3, "mass_by_distance": 4},
    )
    for tensor, came in zip(described, result.get_response().outputs, strict=True):
        assert tensor.datatype == came.datatype
        assert len(tensor.shape) == len(came.shape)
        for size, real in zip(tensor.shape, came.shape, strict=True):
            assert size in (-1, real)


def test_a_models_configuration(infer_client: triton.InferenceServerClient) -> None:
    config = infer_client.get_model_config("half").config
    assert (config.name, config.backend, config.max_batch_size) == ("half", "onnxruntime", 64)
    query = config.input[0]
    assert (query.name, query.data_type, list(query.dims)) == ("query", 10, [HEADS, -1, DIM])
    assert [port.name for port in config.input if port.optional] == [
        "key_lengths", "bias", "sinks", "cu_seqlens_q", "cu_seqlens_k",
    ]  # fmt: skip
    assert config.parameters["num_heads"].string_value == str(HEADS)
    assert not config.model_transaction_policy.decoupled
    assert infer_client.get_model_config("half", as_json=True)["config"]["name"] == "half"


def test_statistics_count_what_happened(infer_client: triton.InferenceServerClient) -> None:
    def counts() -> oip.ModelStatistics:
        (found,) = infer_client.get_inference_statistics("self").model_stats
        return found

    before = counts()
    hidden = np.zeros((3, 4, 32), np.float32)
    for _ in range(2):
        infer_client.infer("self", inputs({"hidden_states": hidden}))
    with pytest.raises(InferenceServerException):
        infer_client.infer("self", inputs({"hidden_states": hidden[..., :5]}))
    after = counts()
    assert after.inference_count - before.inference_count == 6
    assert after.execution_count - before.execution_count == 2
    assert after.inference_stats.success.count - before.inference_stats.success.count == 2
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert after.last_inference > 1_700_000_000_000
    parts = after.inference_stats
    together = parts.queue.ns + parts.compute_input.ns + parts.compute_infer.ns
    assert together + parts.compute_output.ns == pytest.approx(parts.success.ns, abs=2000)
    (batch,) = (batch for batch in after.batch_stats if batch.batch_size == 3)
    assert batch.compute_infer.count == 2
    one = infer_client.get_inference_statistics("grouped", "1").model_stats
    assert [(entry.name, entry.version) for entry in one] == [("grouped", "1")]
    assert len(infer_client.get_inference_statistics("grouped").model_stats) == 2
    everything = infer_client.get_inference_statistics().model_stats
    assert ("grouped", "1") in [(entry.name, entry.version) for entry in everything]
    with pytest.raises(InferenceServerException, match="model: given 'nope'"):
        infer_client.get_inference_statistics("nope")


def test_requests_are_counted_by_method(
    infer_client: triton.InferenceServerClient, server: AttentionServer
) -> None:
    infer_client.infer("causal", inputs(tensors(1, 2, 2, 9)))
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    assert re.search(r'requests_total\{code="OK",method="ModelInfer"\} [1-9]', text)


@pytest.mark.parametrize("call", ["get_cuda_shared_memory_status"])
def test_what_this_server_lacks_says_so(
    infer_client: triton.InferenceServerClient, call: str
) -> None:
    with pytest.raises(InferenceServerException, match="this server") as raised:
        getattr(infer_client, call)()
    assert raised.value.status() == "StatusCode.UNIMPLEMENTED"


def test_reflection_describes_the_service_though_its_pool_is_its_own(channel: grpc.Channel) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    database = ProtoReflectionDescriptorDatabase(channel)
    assert "inference.GRPCInferenceService" in database.get_services()
    for symbol, file in (
        # Not tritonclient's grpc_service.proto, which is in the default pool of this process.
        ("inference.ModelInferRequest", "inference/open_inference.proto"),
        ("attnserve.v1.AttendRequest", "attnserve/v1/attention.proto"),
        ("grpc.health.v1.HealthCheckRequest", "grpc_health/v1/health.proto"),
    ):
        assert database.FindFileContainingSymbol(symbol).name == file


def test_the_documentations_example_runs(address: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "open-inference-protocol.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    assert "127.0.0.1:8001" in code
    names: dict = {}
    exec(code.replace("127.0.0.1:8001", address), names)
    assert names["result"].as_numpy("top_k_indices").shape == (1, HEADS, 128, 5)
