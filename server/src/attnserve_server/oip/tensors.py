"""Open Inference Protocol: the tensors of a request, and the answer made of arrays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto.inference import open_inference_pb2 as oip
from google.protobuf.internal.containers import MessageMap

from attnserve_server import dtypes
from attnserve_server.dtypes import Array
from attnserve_server.errors import ExhaustedError, InvalidRequestError
from attnserve_server.messages import data
from attnserve_server.models.store import LoadedModel

# (region, offset, byte_size) to the bytes there, writable.
SharedView = Callable[[str, int, int], memoryview]
Parameters = MessageMap[str, oip.InferParameter]

# The dtypes that the protocol and this server have in common, and where typed elements of them are.
_DTYPES = {
    name: (number, dtypes.to_numpy(number))
    for name, number in pb.DataType.items()
    if number != pb.DATA_TYPE_UNSPECIFIED
}
_NAMES = {dtype: name for name, (_, dtype) in _DTYPES.items()}
_CONTENTS = {
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "BOOL": "bool_contents",
}
_SHARED = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


@dataclass(frozen=True, slots=True)
class InputTensor:
    """One input; `shared`: its elements lie in the caller's memory and may change at any time."""

    name: str
    dtype: "pb.DataType.ValueType"
    shape: tuple[int, ...]
    elements: memoryview
    shared: bool


@dataclass(frozen=True, slots=True)
class Output:
    """One output that is asked for; `place`: where in shared memory it goes, if anywhere."""

    name: str
    place: memoryview | None
    parameters: Parameters | None


def inputs(
    message: oip.ModelInferRequest, raw: Sequence[memoryview], shared: SharedView
) -> dict[str, InputTensor]:
    """The inputs of a request, by name.

    Args:
        message: the request, its `raw_input_contents` left out.
        raw: those contents.
        shared: looks into shared memory.

    Raises:
        RequestError: they are not as the protocol has them.
    """
    found: dict[str, InputTensor] = {}
    used = 0
    for tensor in message.inputs:
        name, datatype = tensor.name, tensor.datatype
        if name in found:
            raise InvalidRequestError.of("inputs", f"{name!r} twice", "each name once")
        if datatype not in _DTYPES:
            raise InvalidRequestError.of(f"{name}.datatype", repr(datatype), ", ".join(_DTYPES))
        place = _place(name, tensor.parameters, shared)
        typed = tensor.HasField("contents")
        if typed and (raw or place is not None):
            where = "raw_input_contents" if raw else "shared memory"
            raise InvalidRequestError.of(
                f"{name}.contents", f"elements, and {where}", "one of them"
            )
        if place is not None:
            elements = place
        elif typed:
            elements = _typed(tensor)
        else:
            if used >= len(raw):
                raise _wrong_count(message, len(raw))
            elements = raw[used]
            used += 1
        number, _ = _DTYPES[datatype]
        found[name] = InputTensor(name, number, tuple(tensor.shape), elements, place is not None)
    if used != len(raw):
        raise _wrong_count(message, len(raw))
    return found


def outputs(message: oip.ModelInferRequest, shared: SharedView) -> list[Output]:
    """The outputs that a request names, in its order.

    Raises:
        RequestError: a name comes twice, or its shared memory cannot be used.
    """
    found: dict[str, Output] = {}
    for tensor in message.outputs:
        if tensor.name in found:
            raise InvalidRequestError.of("outputs", f"{tensor.name!r} twice", "each name once")
        place = _place(tensor.name, tensor.parameters, shared)
        parameters = None if place is None else tensor.parameters
        found[tensor.name] = Output(tensor.name, place, parameters)
    return list(found.values())


def answer(
    request: oip.ModelInferRequest,
    model: LoadedModel,
    variant: str,
    asked: Sequence[Output],
    arrays: Mapping[str, Array],
    max_bytes: int,
) -> tuple[oip.ModelInferResponse, list[memoryview]]:
    """The answer without the elements of its outputs, and those; shared memory is written to.

    Args:
        request: that is answered.
        model, variant: that ran.
        asked: the outputs.
        arrays: those and perhaps more, by name.
        max_bytes: that the elements within the answer may take.

    Raises:
        InvalidRequestError: an output does not fit where it should go.
        ExhaustedError: the answer would be too large.
    """
    response = oip.ModelInferResponse(
        model_name=model.manifest.name,
        model_version=str(model.manifest.version),
        id=request.id,
    )
    response.parameters["variant"].string_param = variant
    raw = []
    for output in asked:
        array = arrays[output.name]
        header = response.outputs.add(
            name=output.name, datatype=_NAMES[array.dtype], shape=array.shape
        )
        if output.place is None or output.parameters is None:
            raw.append(data(array))
            continue
        if array.nbytes > output.place.nbytes:
            raise InvalidRequestError.of(
                f"{output.name}.shared_memory_byte_size",
                f"{output.place.nbytes} bytes",
                f"at least {array.nbytes} bytes, as shape {list(array.shape)} takes",
            )
        if not np.shares_memory(array, np.frombuffer(output.place, np.uint8)):
            output.place[: array.nbytes] = data(array)
        for name in _SHARED:
            if name in output.parameters:
                header.parameters[name].CopyFrom(output.parameters[name])
        header.parameters["shared_memory_byte_size"].int64_param = array.nbytes
        raw.append(memoryview(b""))  # contents are found by the position of the output
    size = sum(content.nbytes for content in raw)
    check_answer_size(size, max_bytes)
    return response, raw


def check_answer_size(size: int, max_bytes: int) -> None:
    """Refuse an answer that would be too large for one message.

    Raises:
        ExhaustedError: it is.
    """
    if size > max_bytes:
        raise ExhaustedError(
            f"response size: its tensors take {size} bytes; allowed in one message: {max_bytes} "
            "(--max-message-mib); have the outputs put into shared memory, or use AttendStream"
        )


def value(parameter: oip.InferParameter) -> bool | int | str | float | None:
    """What a parameter holds; None if nothing."""
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)


def _place(name: str, parameters: Parameters, shared: SharedView) -> memoryview | None:
    """The shared memory that a tensor's parameters name, if they do."""
    if not parameters:
        return None
    found = {given: value(parameter) for given, parameter in parameters.items() if given in _SHARED}
    if not found:
        return None
    region, byte_size, offset = (found.get(key) for key in _SHARED)
    if not isinstance(region, str) or not region:
        raise InvalidRequestError.of(
            f"{name}.{_SHARED[0]}", repr(region), "a registered name, as string_param"
        )
    for key, number in ((_SHARED[1], byte_size), (_SHARED[2], 0 if offset is None else offset)):
        if type(number) is not int:
            raise InvalidRequestError.of(f"{name}.{key}", repr(number), "a number, as int64_param")
    return shared(region, int(offset or 0), int(byte_size or 0))


def _typed(tensor: oip.ModelInferRequest.InferInputTensor) -> memoryview:
    field = _CONTENTS.get(tensor.datatype)
    given = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if field is None:
        raise InvalidRequestError.of(
            f"{tensor.name}.contents", given, f"raw_input_contents: {tensor.datatype} travels raw"
        )
    if given != [field]:
        raise InvalidRequestError.of(
            f"{tensor.name}.contents", given or "nothing", f"{field} for {tensor.datatype}"
        )
    _, dtype = _DTYPES[tensor.datatype]
    return data(np.fromiter(getattr(tensor.contents, field), dtype))


def _wrong_count(message: oip.ModelInferRequest, given: int) -> InvalidRequestError:
    wanted = sum(
        not tensor.HasField("contents") and _SHARED[0] not in tensor.parameters
        for tensor in message.inputs
    )
    return InvalidRequestError.of(
        "raw_input_contents",
        f"{given}",
        f"{wanted}, one for each input that has neither contents nor shared memory",
    )
