"""Results to answers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attnserve_proto import attention_pb2 as pb
from attnserve_proto import buffers, wire
from attnserve_proto.encoding import embedded

from attnserve_server.dtypes import Array
from attnserve_server.engine.models import LoadedModel
from attnserve_server.engine.work import AttendWork, SequenceOutput, TokensWork
from attnserve_server.wire import tensors
from attnserve_server.wire.tensors import TensorSpec

_FIELD = {name: number for number, name in wire.RESPONSE_TENSORS.items()}

# Tensors smaller than this travel within a stream's `response` message.
_INLINE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Clock:
    """When what happened to one request.

    Attributes:
        arrived, validated: nanoseconds of `time.perf_counter_ns()`.
        waited, computed: seconds.
        sequences: that ran together.
        leads: whether this request counts for the execution.
    """

    arrived: int
    validated: int
    waited: float
    computed: float
    sequences: int
    leads: bool

    def timings(self, now: int) -> pb.Timings:
        """As the wire has them, with `now` as the end."""
        queue, compute = round(self.waited * 1e6), round(self.computed * 1e6)
        return pb.Timings(
            deserialize=(self.validated - self.arrived) // 1000,
            queue=queue,
            compute=compute,
            serialize=max(0, (now - self.validated) // 1000 - queue - compute),
            batch_size=self.sequences,
        )


def attend_response(work: AttendWork, timings: pb.Timings) -> pb.AttendResponse:
    """An answer without its tensors."""
    response = head(work.model, work.variant.name)
    response.timings.CopyFrom(timings)
    return response


def head(model: LoadedModel, variant: str) -> pb.AttendResponse:
    """An answer without its tensors and timings."""
    return pb.AttendResponse(
        model=model.manifest.name, version=str(model.manifest.version), variant=variant
    )


def attend_stream(
    request_id: int, response: pb.AttendResponse, arrays: Mapping[str, Array], chunk_bytes: int
) -> Iterator[bytes]:
    """An answer as stream messages: the response, then each large tensor in chunks."""
    in_order = sorted(arrays, key=_FIELD.__getitem__)
    large = [name for name in in_order if arrays[name].nbytes > _INLINE_BYTES]
    for name in in_order:
        array = arrays[name]
        tensor = tensors.header(array) if name in large else tensors.message(array)
        if name in large:
            tensor.chunked.byte_size = array.nbytes
        getattr(response, name).CopyFrom(tensor)
    yield pb.AttendStreamResponse(request_id=request_id, response=response).SerializeToString()
    for name in large:
        yield from wire.cut(request_id, _FIELD[name], tensors.data(arrays[name]), chunk_bytes)


def stream_announcement(request_id: int, response: pb.AttendResponse, tensor: TensorSpec) -> bytes:
    """An answer whose one tensor follows in chunks, as a stream message."""
    header = pb.Tensor(dtype=tensor.wire_dtype, shape=tensor.shape)
    header.chunked.byte_size = tensor.byte_size
    getattr(response, tensor.name).CopyFrom(header)
    return pb.AttendStreamResponse(request_id=request_id, response=response).SerializeToString()


class OutputChunk:
    """One chunk of an answer, computed where it is sent from.

    Args:
        request_id: of the stream.
        tensor: whose elements it holds.
        offset, size: bytes from the start of the tensor.

    Attributes:
        message: the whole stream message.
        room: its elements, to be filled.
    """

    def __init__(self, request_id: int, tensor: TensorSpec, offset: int, size: int) -> None:
        head = wire.chunk_head(request_id, _FIELD[tensor.name], offset, size)
        self.message, view = buffers.blank(len(head) + size)
        view[: len(head)] = head
        self.room = view[len(head) :]


def stream_response(request_id: int, response: bytes) -> bytes:
    """A whole answer, serialised as `AttendResponse`, as one stream message."""
    head = pb.AttendStreamResponse(request_id=request_id).SerializeToString()
    return head + embedded(pb.AttendStreamResponse.RESPONSE_FIELD_NUMBER, response)


def stream_error(request_id: int, code: int, message: str, retry_after: float | None) -> bytes:
    """A failed request within a stream; `retry_after` in seconds."""
    error = pb.Error(code=code, message=message, retry_after=round((retry_after or 0) * 1e6))
    return pb.AttendStreamResponse(request_id=request_id, error=error).SerializeToString()


def tokens_response(
    work: TokensWork, outputs: list[SequenceOutput], timings: pb.Timings
) -> pb.AttendTokensResponse:
    """The answer to a token request."""
    response = pb.AttendTokensResponse(
        model=work.model.manifest.name,
        version=str(work.model.manifest.version),
        variant=work.variant.name,
        timings=timings,
    )
    heads, tokenizer = work.wanted.heads, work.model.tokenizer
    if heads is not None:
        response.attention = heads.attention.name
        response.layers.extend(heads.layers)
        response.heads.extend(heads.heads)
    for row, output in enumerate(outputs):
        sequence = response.sequences.add(
            ids=work.source.sequences[row], truncated=work.source.truncated[row]
        )
        if work.target is not None:
            sequence.target_ids.extend(work.target.sequences[row])
            sequence.target_truncated = work.target.truncated[row]
        if tokenizer is not None:
            sequence.tokens.extend(map(tokenizer.token, sequence.ids))
            sequence.target_tokens.extend(map(tokenizer.token, sequence.target_ids))
        for name, array in output.arrays.items():
            getattr(sequence, name).CopyFrom(tensors.message(array))
    return response
