"""Messages of Decode: requests from arrays, answers to arrays."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import buffers, encoding, wire
from attnserve_proto.frames import Frame, lay_out_within

from attnserve_client import _tensors
from attnserve_client._answers import timings_from
from attnserve_client._results import Array, LayerResult, SessionLayer

METHOD = "Decode"
HASH_BYTES = 32

CACHE_TYPES: "Mapping[str | None, pb.CacheType.ValueType]" = {
    None: pb.CACHE_AS_MODEL,
    "fp32": pb.CACHE_FP32,
    "fp16": pb.CACHE_FP16,
    "bf16": pb.CACHE_BF16,
    "int8": pb.CACHE_INT8,
    "fp8": pb.CACHE_FP8,
}

_REQUEST_ID = pb.DecodeRequest.REQUEST_ID_FIELD_NUMBER
_ATTEND_LAYER = pb.DecodeRequest.ATTEND_LAYER_FIELD_NUMBER
_LAYER_TENSORS = {
    "query": pb.AttendLayer.QUERY_FIELD_NUMBER,
    "key": pb.AttendLayer.KEY_FIELD_NUMBER,
    "value": pb.AttendLayer.VALUE_FIELD_NUMBER,
}
_LAYER_PADDING = pb.AttendLayer.PADDING_FIELD_NUMBER
_ATTENDED = pb.DecodeResponse.ATTENDED_FIELD_NUMBER
_ATTENDED_TENSORS = {
    pb.AttendedLayer.OUTPUT_FIELD_NUMBER: "output",
    pb.AttendedLayer.LOG_SUM_EXP_FIELD_NUMBER: "log_sum_exp",
    pb.AttendedLayer.ENTROPY_FIELD_NUMBER: "entropy",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of the server.

    Attributes:
        request_id: of the request that it answers.
        message: the whole message, unless it is a layer's.
        attended: of a layer, but for its tensors' elements.
        arrays: of a layer, by field name: they lie in what was received.
    """

    request_id: int
    message: pb.DecodeResponse
    attended: pb.AttendedLayer | None
    arrays: Mapping[str, Array]


_EMPTY = pb.DecodeResponse()


def read(received: bytes) -> Answer:
    """An answer that nobody else holds: its arrays lie in it, writable.

    Raises:
        DecodeError: it is no `DecodeResponse`.
    """
    view = memoryview(received)
    request_id, body = 0, None
    for number, start, inside, end in encoding.fields(view):
        if number == _ATTENDED and inside != start:
            body = inside, end
        elif number == _REQUEST_ID and inside == start:
            request_id, _ = encoding.read_varint(view, encoding.skip_varint(view, start))
    if body is None:
        return Answer(request_id, pb.DecodeResponse.FromString(received), None, {})
    first, last = body
    attended, rooms = wire.locate(view[first:last], pb.AttendedLayer, _ATTENDED_TENSORS)
    whole = buffers.adopt(received)
    arrays = {}
    for name, (start, end) in rooms.items():
        shape, dtype = _tensors.kind(getattr(attended, name))
        arrays[name] = _tensors.lying_in(shape, dtype, whole[first + start : first + end])
    return Answer(request_id, _EMPTY, attended, arrays)


def layer_result(answer: Answer, starts: tuple[int, ...]) -> LayerResult:
    """A layer's result; `starts` as `LayerResult` has it."""
    attended = answer.attended or pb.AttendedLayer()
    return LayerResult(
        output=answer.arrays.get("output"),
        log_sum_exp=answer.arrays.get("log_sum_exp"),
        entropy=answer.arrays.get("entropy"),
        starts=starts,
        step_ended=attended.step_ended,
        timings=timings_from(attended.timings),
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one tensor of a layer, packed, or of each session in an array of its own."""

    parts: tuple[Array, ...]

    @property
    def lengths(self) -> list[int]:
        """Rows of each part."""
        return [part.shape[0] for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all parts together."""
        return (sum(self.lengths), *self.parts[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Of all parts together."""
        return sum(part.nbytes for part in self.parts)


def rows(value: Any, name: str) -> Rows:
    """Take one packed array, or a list of one array for each session.

    Raises:
        TypeError: as `as_array`.
        ValueError: a rank other than 3, or arrays that cannot be packed.
    """
    parts = tuple(
        _tensors.as_array(part, name)
        for part in (value if isinstance(value, list | tuple) else (value,))
    )
    for part in parts:
        if part.ndim != 3:
            raise ValueError(f"{name}: shape {list(part.shape)}; allowed: [T, heads, dim]")
        if part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype:
            raise ValueError(
                f"{name}: {list(part.shape)} of {part.dtype} beside {list(parts[0].shape)} of "
                f"{parts[0].dtype}; allowed: equal heads, dim and dtype"
            )
    if not parts:
        raise ValueError(f"{name}: no arrays; allowed: one for each session, or one packed")
    return Rows(parts)


def attend_layer(request_id: int, head: bytes, tensors: Mapping[str, Rows]) -> bytes:
    """An `AttendLayer` request: `head` is it without its tensors, serialised."""
    before = encoding.tag(_REQUEST_ID, 0) + encoding.varint(request_id)
    kinds = tuple(
        (_LAYER_TENSORS[name], each.parts[0].dtype, each.shape, each.nbytes)
        for name, each in tensors.items()
    )
    frame, start = _frame(len(before), len(head), kinds)
    first = frame.pieces[0]
    parts: list[Any] = [before, first[len(before) : start], head, first[start + len(head) :]]
    for index, each in enumerate(tensors.values()):
        if index > 0:
            parts.append(frame.pieces[index])
        parts += (_tensors.data(part) for part in each.parts)
    parts.append(frame.tail)
    return b"".join(parts)


@lru_cache(maxsize=256)
def _frame(
    before: int, head: int, kinds: tuple[tuple[int, "np.dtype[Any]", tuple[int, ...], int], ...]
) -> tuple[Frame, int]:
    """A request laid out, with blanks for what differs from layer to layer."""
    parts = [
        (number, _tensors.header(dtype, shape).SerializeToString(), size)
        for number, dtype, shape, size in kinds
    ]
    return lay_out_within(bytes(before), _ATTEND_LAYER, bytes(head), parts, _LAYER_PADDING)


@lru_cache(maxsize=256)
def returns(return_output: bool, return_log_sum_exp: bool, return_entropy: bool) -> pb.LayerReturns:
    """What a layer is asked for. Shared: not to be changed."""
    return pb.LayerReturns(
        no_output=not return_output, log_sum_exp=return_log_sum_exp, entropy=return_entropy
    )


def open_sessions(
    count: int,
    model: str,
    version: str,
    num_layers: int,
    max_tokens: int,
    layers: Sequence[SessionLayer] | None,
    cache_dtype: str | None,
    reserved_tokens: int,
    cross_tokens: int,
    prefix_hashes: Iterable[bytes],
    lease: float | None,
) -> pb.OpenSessions:
    """Build an opening of `count` equal sessions.

    Raises:
        ValueError: `cache_dtype` is none that there is, or a hash is not of 32 bytes.
    """
    if cache_dtype not in CACHE_TYPES:
        allowed = ", ".join(name for name in CACHE_TYPES if name)
        raise ValueError(f"cache_dtype: {cache_dtype!r}; allowed: {allowed}, or None: as the model")
    new = pb.NewSession(
        max_tokens=max_tokens,
        reserved_tokens=reserved_tokens,
        cross_tokens=cross_tokens,
        prefix_hashes=joined_hashes(prefix_hashes),
    )
    return pb.OpenSessions(
        model=model,
        version=version,
        num_layers=num_layers,
        layers=[
            pb.LayerSpec(window=layer.window, kept_first=layer.kept_first, cross=layer.cross)
            for layer in layers or ()
        ],
        cache_type=CACHE_TYPES[cache_dtype],
        lease=microseconds(lease),
        sessions=[new] * count,
    )


def joined_hashes(hashes: Iterable[bytes]) -> bytes:
    """Hashes of pages as they travel.

    Raises:
        ValueError: one is not of 32 bytes.
    """
    each = list(hashes)
    for one in each:
        if len(one) != HASH_BYTES:
            raise ValueError(f"prefix_hashes: one of {len(one)} bytes; allowed: {HASH_BYTES}")
    return b"".join(each)


def import_messages(
    request_id: int,
    chunks: Iterator[bytes],
    max_tokens: int,
    reserved_tokens: int,
    lease: float | None,
) -> Iterator[bytes]:
    """The requests of an import. `chunks`: what an export gave."""
    index, data = 0, next(chunks)
    while True:
        following = next(chunks, None)
        request = pb.ImportSession(
            chunk=pb.SessionChunk(index=index, data=data, last=following is None)
        )
        if index == 0:
            request.max_tokens = max_tokens
            request.reserved_tokens = reserved_tokens
            request.lease = microseconds(lease)
        message = pb.DecodeRequest(request_id=request_id, import_session=request)
        yield message.SerializeToString()
        if following is None:
            return
        index, data = index + 1, following


def microseconds(lease: float | None) -> int:
    """A lease as it travels; None: the server's default."""
    return round((lease or 0) * 1e6)
