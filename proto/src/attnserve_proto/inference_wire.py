"""Messages of the Open Inference Protocol with their tensors' bytes left in place, as in `wire`."""

from collections.abc import Sequence

from attnserve_proto.encoding import fields, tag, varint
from attnserve_proto.inference import open_inference_pb2 as pb
from attnserve_proto.wire import Buffer

_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_RAW_OUTPUT = tag(pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER)
_INFER_RESPONSE = tag(pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER)


def split(buffer: bytes) -> tuple[pb.ModelInferRequest, list[memoryview]]:
    """Parse a request, leaving its `raw_input_contents` where they are.

    As `locate`, but gives views of `buffer` instead of places in it.
    """
    message, rooms = locate(buffer)
    view = memoryview(buffer)
    return message, [view[start:end] for start, end in rooms]


def locate(buffer: bytes) -> tuple[pb.ModelInferRequest, list[tuple[int, int]]]:
    """Parse a request but for its `raw_input_contents`, and say where those are.

    Returns:
        The request without them, and where in `buffer` each of them starts and ends.

    Raises:
        DecodeError: `buffer` is not a serialised `ModelInferRequest`.
    """
    view = memoryview(buffer)
    kept: list[memoryview] = []
    rooms: list[tuple[int, int]] = []
    kept_from = 0
    for number, start, body, end in fields(view):
        if number == _RAW_INPUT and body != start:
            kept.append(view[kept_from:start])
            rooms.append((body, end))
            kept_from = end
    kept.append(view[kept_from:])
    return pb.ModelInferRequest.FromString(b"".join(kept)), rooms


def join(response: pb.ModelInferResponse, raw: Sequence[Buffer]) -> bytes:
    """Serialise a response with `raw` as its `raw_output_contents`."""
    return join_serialised(response.SerializeToString(), raw)


def join_serialised(response: bytes, raw: Sequence[Buffer]) -> bytes:
    """As `join`, of a response that is serialised already."""
    return b"".join(_parts(response, raw))


def join_stream(response: pb.ModelInferResponse, raw: Sequence[Buffer]) -> bytes:
    """As `join`, wrapped into a `ModelStreamInferResponse`."""
    parts = _parts(response.SerializeToString(), raw)
    size = sum(memoryview(part).nbytes for part in parts)
    return b"".join((_INFER_RESPONSE, varint(size), *parts))


def _parts(response: bytes, raw: Sequence[Buffer]) -> list[Buffer]:
    parts: list[Buffer] = [response]
    for content in raw:
        parts += (_RAW_OUTPUT + varint(memoryview(content).nbytes), content)
    return parts
