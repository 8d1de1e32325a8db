"""Results to answers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire

from attnserve_server.dtypes import Array
from attnserve_server.engine.work import AttendWork, SequenceOutput, TokensWork
from attnserve_server.wire import tensors

_FIELD = {name: number for number, name in wire.RESPONSE_TENSORS.items()}

# Tensors smaller than this travel within a stream's `response` message.
_INLINE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Clock:
    """Moments of one request, in nanoseconds of a monotonic clock, and its wait in seconds."""

    arrived: int
    validated: int
    computed: int
    waited: float

    def timings(self, now: int, batch_size: int) -> pb.Timings:
        """As the wire has them, with `now` as the end."""
        queue = round(self.waited * 1e6)
        return pb.Timings(
            deserialize=(self.validated - self.arrived) // 1000,
            queue=queue,
            compute=max(0, (self.computed - self.validated) // 1000 - queue),
            serialize=(now - self.computed) // 1000,
            batch_size=batch_size,
        )


def attend_response(work: AttendWork, timings: pb.Timings) -> pb.AttendResponse:
    """An answer without its tensors."""
    return pb.AttendResponse(
        model=work.model.manifest.name,
        version=str(work.model.manifest.version),
        variant=work.variant.name,
        timings=timings,
    )


def attend_unary(response: pb.AttendResponse, arrays: Mapping[str, Array]) -> bytes:
    """An answer with its tensors, serialised."""
    parts = [(_FIELD[n], tensors.header(a), tensors.data(a)) for n, a in arrays.items()]
    return wire.join(response, parts)


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


def stream_error(request_id: int, code: int, message: str) -> bytes:
    """A failed request within a stream."""
    error = pb.Error(code=code, message=message)
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
