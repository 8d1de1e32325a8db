"""Bad input of the Open Inference Protocol: each its own status, naming the field."""

from collections.abc import Callable

import grpc
import numpy as np
import pytest
from attnserve_server.app import AttentionServer
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
EXHAUSTED, PRECONDITION = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION

Change = Callable[[oip.ModelInferRequest], object]


def add(
    request: oip.ModelInferRequest, name: str, data: np.ndarray, datatype: str = ""
) -> oip.ModelInferRequest.InferInputTensor:
    known = {"float32": "FP32", "int64": "INT64", "float16": "FP16"}
    request.raw_input_contents.append(data.tobytes())
    return request.inputs.add(
        name=name, datatype=datatype or known[data.dtype.name], shape=data.shape
    )


def core() -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="causal")
    for name in ("query", "key", "value"):
        add(request, name, np.zeros((1, 4, 3, 8), np.float32))
    return request


def tokens(ids: object, mask: object = None, dtype: type = np.int64) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="bert")
    add(request, "input_ids", np.array(ids, dtype))
    if mask is not None:
        add(request, "attention_mask", np.array(mask, np.int64))
    return request


def changed(change: Change) -> oip.ModelInferRequest:
    request = core()
    change(request)
    return request


def parameter(name: str, **value: object) -> oip.ModelInferRequest:
    return changed(lambda r: r.parameters[name].CopyFrom(oip.InferParameter(**value)))


def asked(*names: str, **top_k: int) -> oip.ModelInferRequest:
    request = core()
    for name in names:
        request.outputs.add(name=name)
    for name, value in top_k.items():
        request.parameters[name].int64_param = value
    return request


def typed(datatype: str, **contents: list) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="causal")
    tensor = request.inputs.add(name="query", datatype=datatype, shape=[1, 4, 1, 8])
    tensor.contents.CopyFrom(oip.InferTensorContents(**contents))
    return request


def shared(**parameters: object) -> oip.ModelInferRequest:
    request = core()
    del request.raw_input_contents[0]
    for name, value in parameters.items():
        field = "string_param" if isinstance(value, str) else "int64_param"
        setattr(request.inputs[0].parameters[f"shared_memory_{name}"], field, value)
    return request


CASES = {
    "no model": (changed(lambda r: r.ClearField("model_name")), NOT_FOUND, "model: given ''"),
    "unknown model": (oip.ModelInferRequest(model_name="x"), NOT_FOUND, "model: given 'x'"),
    "unknown version": (
        changed(lambda r: setattr(r, "model_version", "7")), NOT_FOUND, "version: given '7'"
    ),
    "no inputs": (oip.ModelInferRequest(model_name="causal"), INVALID, "query: given nothing"),
    "unknown input": (
        changed(lambda r: add(r, "mask", np.zeros(1, np.float32))), INVALID,
        "inputs: given 'mask'; allowed: query, key, value, key_lengths, bias",
    ),
    "input twice": (
        changed(lambda r: add(r, "key", np.zeros(1, np.float32))), INVALID, "'key' twice"
    ),
    "too few raw contents": (
        changed(lambda r: r.raw_input_contents.pop()), INVALID, "raw_input_contents: given 2.*d: 3"
    ),
    "too many raw contents": (
        changed(lambda r: r.raw_input_contents.append(b"")), INVALID, "raw_input_contents: given 4"
    ),
    "raw and typed": (
        changed(lambda r: r.inputs[0].contents.fp32_contents.append(1)), INVALID,
        "query.contents: given elements, and raw_input_contents",
    ),
    "typed FP16": (typed("FP16", fp32_contents=[1.0]), INVALID, "FP16 travels raw"),
    "contents of another type": (
        typed("FP32", fp64_contents=[1.0]), INVALID, "given \\['fp64_contents'\\]; .*fp32_contents"
    ),
    "too few typed": (typed("FP32", fp32_contents=[1.0]), INVALID, "query.data: given 4 bytes"),
    "no typed": (typed("FP32"), INVALID, "query.contents: given nothing"),
    "unknown datatype": (
        changed(lambda r: setattr(r.inputs[0], "datatype", "FP8")), INVALID,
        "query.datatype: given 'FP8'; allowed: FP32, FP16, BF16, INT64",
    ),
    "wrong datatype": (
        changed(lambda r: setattr(r.inputs[0], "datatype", "FP16")), INVALID, "given FP16"
    ),
    "bytes and shape": (
        changed(lambda r: r.inputs[0].shape.__setitem__(2, 4)), INVALID, "query.data: given 384"
    ),
    "negative shape": (
        changed(lambda r: r.inputs[0].shape.__setitem__(2, -3)), INVALID, "query.shape.*at least 1"
    ),
    "overflowing shape": (
        changed(lambda r: r.inputs[0].shape.__setitem__(2, 2**62)), INVALID, "less than 2\\^63"
    ),
    "rank": (changed(lambda r: r.inputs[0].shape.pop()), INVALID, "query.shape.*rank 3"),
    "key lengths": (
        changed(lambda r: add(r, "key_lengths", np.array([4]))), INVALID, "key_lengths\\[0\\]"
    ),
    "unknown output": (asked("logits"), INVALID, "outputs: given 'logits'; allowed: output, weig"),
    "output twice": (asked("output", "output"), INVALID, "outputs: given 'output' twice"),
    "classification": (
        changed(
            lambda r: r.outputs.add(name="output").parameters["classification"].CopyFrom(
                oip.InferParameter(int64_param=1)
            )
        ), INVALID, "output.parameters: given 'classification'",
    ),
    "top_k missing": (asked("top_k_indices"), INVALID, "parameters\\['top_k'\\]: given 'nothing'"),
    "top_k unused": (asked("output", top_k=2), INVALID, "parameters\\['top_k'\\]: given 2"),
    "top_k too high": (asked("top_k_indices", top_k=4), INVALID, "top_k: given 4; allowed: 0..3"),
    "top_k far too high": (asked("top_k_indices", top_k=2**40), INVALID, "allowed: 0..4294967295"),
    "mass_by_distance missing": (asked("mass_by_distance"), INVALID, "'mass_by_distance'"),
    "scale a word": (parameter("scale", string_param="big"), INVALID, "'scale'.*'big'"),
    "scale true": (parameter("scale", bool_param=True), INVALID, "'scale'.*True"),
    "scale zero": (parameter("scale", double_param=0.0), INVALID, "scale: given 0"),
    "scale huge": (parameter("scale", double_param=1e300), INVALID, "scale: given inf"),
    "softcap NaN": (parameter("softcap", double_param=float("nan")), INVALID, "softcap: given nan"),
    "variant a number": (parameter("variant", int64_param=1), INVALID, "'variant'.*given 1"),
    "unknown variant": (parameter("variant", string_param="x"), NOT_FOUND, "variant: given 'x'"),
    "priority": (parameter("priority", uint64_param=4), INVALID, "'priority'.*0..3"),
    "timeout": (parameter("timeout", int64_param=-1), INVALID, "'timeout'"),
    "empty parameter": (parameter("timeout"), INVALID, "'timeout'.*given None"),
    "timeout over": (
        parameter("timeout", int64_param=1), grpc.StatusCode.DEADLINE_EXCEEDED, "deadline"
    ),
    "region without a name": (shared(byte_size=384), INVALID, "query.shared_memory_region"),
    "region unknown": (shared(region="r", byte_size=384), NOT_FOUND, "region: given 'r'"),
    "region's size a word": (
        shared(region="r", byte_size="x"), INVALID, "query.shared_memory_byte_size: given 'x'"
    ),
    "no ids": (oip.ModelInferRequest(model_name="bert"), INVALID, "input_ids: given nothing"),
    "ids of rank 1": (tokens([2, 3]), INVALID, "input_ids.shape: given \\[2\\]"),
    "ids of another type": (tokens([[2.0]], dtype=np.float32), INVALID, "input_ids.datatype"),
    "ids too long": (tokens([[2] * 21]), INVALID, "input_ids.shape.*\\[64, 20\\]"),
    "too many sequences": (tokens([[2]] * 65), INVALID, "input_ids.shape"),
    "id out of vocabulary": (tokens([[2, 3], [2, 40]]), INVALID, "input_ids\\[1, 1\\]: given 40"),
    "mask of another shape": (tokens([[2, 3]], [[1]]), INVALID, "attention_mask.shape"),
    "padding on the left": (
        tokens([[2, 3, 3, 3]], [[0, 1, 0, 1]]), INVALID, "attention_mask\\[0, 2\\]: given 0"
    ),
    "a gap in the mask": (
        tokens([[2, 3, 3]], [[1, 0, 1]]), INVALID, "attention_mask\\[0, 1\\]: given 0"
    ),
    "mask of twos": (tokens([[2, 3]], [[1, 2]]), INVALID, "attention_mask\\[0, 1\\]: given 2"),
    "an empty sequence": (tokens([[2], [2]], [[1], [0]]), INVALID, "attention_mask\\[1\\]"),
    "scale to a transformer": (
        (lambda r: r.parameters["scale"].CopyFrom(oip.InferParameter(double_param=1)) or r)(
            tokens([[2]])
        ), INVALID, "nothing for transformer",
    ),
    "query to a transformer": (
        (lambda r: add(r, "query", np.zeros(1, np.float32)) and r)(tokens([[2]])), INVALID,
        "inputs: given 'query'; allowed: input_ids, attention_mask",
    ),
    "unknown layer": (
        (lambda r: r.outputs.add(name="weights_3") and r)(tokens([[2]])), INVALID,
        "outputs: given 'weights_3'; allowed: last_hidden_state, weights_0",
    ),
    "output of a core from a transformer": (
        (lambda r: r.outputs.add(name="output") and r)(tokens([[2]])), INVALID, "given 'output'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(channel: grpc.Channel, case: str) -> None:
    request, code, message = CASES[case]
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    with pytest.raises(grpc.RpcError, match=message) as raised:
        stub.ModelInfer(request, timeout=10)
    assert raised.value.code() == code


def test_parameters_that_nobody_here_knows_are_ignored(channel: grpc.Channel) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = core()
    expected = stub.ModelInfer(request).raw_output_contents
    # As KServe's client sends it.
    request.parameters["binary_data_size"].int64_param = 1152
    request.parameters["sequence_id"].int64_param = 3
    request.inputs[0].parameters["binary_data_size"].int64_param = 384
    request.outputs.add(name="output").parameters["binary_data"].bool_param = True
    assert stub.ModelInfer(request).raw_output_contents == expected


def test_an_answer_too_large_for_a_message_is_refused_before_it_is_computed(
    channel: grpc.Channel, server: AttentionServer
) -> None:
    def computed() -> float:
        return float(sum(counts[-1] for counts in server.plane.variants()))

    before = computed()
    request = oip.ModelInferRequest(model_name="causal")
    for name in ("query", "key", "value"):
        add(request, name, np.zeros((1, 4, 600, 8), np.float32))
    request.outputs.add(name="weights")
    with pytest.raises(grpc.RpcError, match="response size: its tensors take 5760000") as raised:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert raised.value.code() == EXHAUSTED
    assert computed() == before


def test_bytes_that_are_no_request(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.RpcError, match="not the request of ModelInfer") as raised:
        call(b"\x3a\x7fabc")
    assert raised.value.code() == INVALID
    stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    good = oip.ModelInferRequest(model_name="x").SerializeToString()
    answers = [
        oip.ModelStreamInferResponse.FromString(answer)
        for answer in stream(iter([b"\x3a\x7fabc", good]))
    ]
    assert "not the request of ModelStreamInfer" in answers[0].error_message
    assert "model: given 'x'" in answers[1].error_message
