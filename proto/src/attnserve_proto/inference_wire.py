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

    Returns:
        The request without them, and each of them as a view of `buffer`.

    Raises:
        DecodeError: `buffer` is not a serialised `ModelInferRequest`.
    """
    view = memoryview(buffer)
    kept: list[memoryview] = []
    raw: list[memoryview] = []
    kept_from = 0
    for number, start, body, end in fields(view):
        if number == _RAW_INPUT and body != start:
            kept.append(view[kept_from:start])
            raw.append(view[body:end])
            kept_from = end
    kept.append(view[kept_from:])
    return pb.ModelInferRequest.FromString(b"".join(kept)), raw


def join(response: pb.ModelInferResponse, raw: Sequence[Buffer]) -> bytes:
    """Serialise a response with `raw` as its `raw_output_contents`."""
    return b"".join(_parts(response, raw))


def join_stream(response: pb.ModelInferResponse, raw: Sequence[Buffer]) -> bytes:
    """As `join`, wrapped into a `ModelStreamInferResponse`."""
    parts = _parts(response, raw)
    size = sum(memoryview(part).nbytes for part in parts)
    return b"".join((_INFER_RESPONSE, varint(size), *parts))


def _parts(response: pb.ModelInferResponse, raw: Sequence[Buffer]) -> list[Buffer]:
    parts: list[Buffer] = [response.SerializeToString()]
    for content in raw:
        parts += (_RAW_OUTPUT + varint(memoryview(content).nbytes), content)
    return parts
