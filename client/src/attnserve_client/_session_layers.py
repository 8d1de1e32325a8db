"""AttendLayer of Decode: from arrays to bytes, and from what is answered to arrays."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import buffers, encoding, wire
from attnserve_proto.frames import Frame, lay_out_within
from google.protobuf.message import DecodeError

from attnserve_client import _arguments as arguments
from attnserve_client import _errors, _tensors
from attnserve_client._answers import timings_from
from attnserve_client._results import Array, LayerResult
from attnserve_client._session_messages import METHOD, read

_REQUEST_ID = encoding.tag(pb.DecodeRequest.REQUEST_ID_FIELD_NUMBER, 0)
_ATTEND_LAYER = pb.DecodeRequest.ATTEND_LAYER_FIELD_NUMBER
_STEP_ID = encoding.tag(pb.AttendLayer.STEP_ID_FIELD_NUMBER, 0)
_LAYER = encoding.tag(pb.AttendLayer.LAYER_FIELD_NUMBER, 0)
_BEGIN = pb.AttendLayer.BEGIN_FIELD_NUMBER
_RETURNS = pb.AttendLayer.RETURNS_FIELD_NUMBER
_PADDING = pb.AttendLayer.PADDING_FIELD_NUMBER
_TENSORS = {
    field.name: field.number
    for field in pb.AttendLayer.DESCRIPTOR.fields
    if field.message_type is pb.Tensor.DESCRIPTOR
}

_ATTENDED = pb.DecodeResponse.ATTENDED_FIELD_NUMBER
# What begins an answer of the server.
_ANSWER_ID = encoding.tag(pb.DecodeResponse.REQUEST_ID_FIELD_NUMBER, 0)
ANSWERED = {
    pb.AttendedLayer.OUTPUT_FIELD_NUMBER: "output",
    pb.AttendedLayer.LOG_SUM_EXP_FIELD_NUMBER: "log_sum_exp",
    pb.AttendedLayer.ENTROPY_FIELD_NUMBER: "entropy",
}
_ANSWER_PADDING = pb.AttendedLayer.PADDING_FIELD_NUMBER
# Rank and shape of tensors, for messages.
_ALLOWED = {"hidden_states": (2, "[T, embed_dim]")}
_HEADS = (3, "[T, heads, dim]")


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
        first = self.parts[0].shape
        return first if len(self.parts) == 1 else (sum(self.lengths), *first[1:])

    @property
    def nbytes(self) -> int:
        """Of all parts together."""
        return sum(part.nbytes for part in self.parts)


def rows(value: Any, name: str) -> Rows:
    """Take one packed array, or a list of one array for each session.

    Raises:
        TypeError: as `as_array`.
        ValueError: a wrong rank, or arrays that cannot be packed.
    """
    given = value if isinstance(value, list | tuple) else (value,)
    parts = tuple([_tensors.as_array(part, name) for part in given])
    if not parts:
        raise ValueError(f"{name}: no arrays; allowed: one for each session, or one packed")
    rank, allowed = _ALLOWED.get(name, _HEADS)
    first = parts[0]
    for part in parts:
        if part.ndim != rank:
            raise ValueError(f"{name}: shape {list(part.shape)}; allowed: {allowed}")
        if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
            raise ValueError(
                f"{name}: {list(part.shape)} of {part.dtype} beside {list(first.shape)} of "
                f"{first.dtype}; allowed: equal heads, dim and dtype"
            )
    return Rows(parts)


def returns_of(
    return_output: bool,
    return_log_sum_exp: bool,
    return_entropy: bool,
    return_weights_of: Sequence[int],
) -> bytes:
    """What a layer is asked for, as a field of `AttendLayer`."""
    named: tuple[int, ...] = ()
    if not isinstance(return_weights_of, tuple) or return_weights_of:
        named = tuple(arguments.integers("return_weights_of", return_weights_of))
    flags = (return_output, return_log_sum_exp, return_entropy)
    try:
        return _returns_of(*flags, named)
    except TypeError:  # what cannot be looked up is of a wrong type: this says which
        return _returns_of.__wrapped__(*flags, named)


@lru_cache(maxsize=256, typed=True)
def _returns_of(
    return_output: bool,
    return_log_sum_exp: bool,
    return_entropy: bool,
    return_weights_of: tuple[int, ...],
) -> bytes:
    message = pb.LayerReturns(
        no_output=not arguments.flag("return_output", return_output),
        log_sum_exp=arguments.flag("return_log_sum_exp", return_log_sum_exp),
        entropy=arguments.flag("return_entropy", return_entropy),
        weights_of=return_weights_of,
    )
    return encoding.embedded(_RETURNS, message.SerializeToString())


def begin_of(begin: pb.BeginStep) -> bytes:
    """A step's beginning, as a field of `AttendLayer`."""
    return encoding.embedded(_BEGIN, begin.SerializeToString())


class LayerPlan:
    """How requests of one kind are laid out, and their answers: those of the next layer are alike.

    Safe to share between threads.

    Attributes:
        returns: what is asked for.
    """

    def __init__(
        self, returns: bytes, kinds: "tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]"
    ) -> None:
        self.returns = pb.AttendLayer.FromString(returns).returns
        self._tensors = [
            (
                _TENSORS[name],
                _tensors.header(dtype, shape).SerializeToString(),
                math.prod(shape) * dtype.itemsize,
            )
            for name, dtype, shape in kinds
        ]
        self._frames: dict[tuple[int, int], tuple[Frame, int]] = {}
        self._answers: dict[int, _Layout] = {}

    def message(
        self, request_id: int, step_id: int, layer: int, options: bytes, tensors: Sequence[Rows]
    ) -> bytes:
        """A request: `options` is what it has besides, as fields."""
        before = _REQUEST_ID + encoding.varint(request_id)
        head = _STEP_ID + encoding.varint(step_id) + _LAYER + encoding.varint(layer) + options
        sizes = len(before), len(head)
        laid_out = self._frames.get(sizes)
        if laid_out is None:
            laid_out = lay_out_within(
                bytes(sizes[0]), _ATTEND_LAYER, bytes(sizes[1]), self._tensors, _PADDING
            )
            self._frames[sizes] = laid_out
        frame, start = laid_out
        # The frame has blanks for what differs from layer to layer.
        first = frame.pieces[0]
        parts: list[Any] = [before, first[sizes[0] : start], head, first[start + sizes[1] :]]
        for index, each in enumerate(tensors):
            if index > 0:
                parts.append(frame.pieces[index])
            parts += each.parts
        parts.append(frame.tail)
        return b"".join(parts)

    def read(self, received: bytes) -> "Attended":
        """An answer that nobody else holds: its arrays lie in it, writable.

        A server lays them all out alike, so one that has the same bytes as the one before it, but
        for id, elements and what follows those, is not taken apart again.

        Raises:
            AttnserveError: that it says; INTERNAL if it is no answer.
        """
        at = _after_id(received)
        layout = self._answers.get(at)
        if layout is None or not layout.fits(received):
            try:
                layout = _layout_of(received)
            except DecodeError as error:
                raise _errors.InternalError(f"cannot be read: {error}", method=METHOD) from None
            if layout.tail > 0:
                self._answers[at] = layout
        return layout.read(received)


def layer_of(received: bytes) -> "Attended":
    """An answer, taken apart anew; as `LayerPlan.read`."""
    try:
        return _layout_of(received).read(received)
    except DecodeError as error:
        raise _errors.InternalError(f"cannot be read: {error}", method=METHOD) from None


@lru_cache(maxsize=256)
def plan_of(
    returns: bytes, kinds: "tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]"
) -> LayerPlan:
    """The plan of requests with such tensors; `returns` as `returns_of` gives it."""
    return LayerPlan(returns, kinds)


@dataclass(frozen=True, slots=True)
class Attended:
    """An answer.

    Attributes:
        message: it, but for its tensors' elements.
        arrays: its tensors, by field name.
    """

    message: pb.AttendedLayer
    arrays: Mapping[str, Array]

    def result(self, starts: tuple[int, ...]) -> LayerResult:
        """What a caller gets; `starts` as `LayerResult` has it."""
        message = self.message
        return LayerResult(
            output=self.arrays.get("output"),
            log_sum_exp=self.arrays.get("log_sum_exp"),
            entropy=self.arrays.get("entropy"),
            weights=[_tensors.copy_of(tensor, tensor.data) for tensor in message.weights],
            starts=starts,
            step_ended=message.step_ended,
            timings=timings_from(message.timings),
        )


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the answers to requests of one kind have in common, whose ids take as many bytes.

    Attributes:
        size: bytes of the whole.
        pieces: (offset, bytes) of what stands before the elements of each tensor.
        arrays: field name, shape, dtype and offset of the tensors.
        tail: where all that is not said of tensors begins; 0: it is not all behind them.
        message: if so, the whole but for its tensors' elements.
    """

    size: int
    pieces: tuple[tuple[int, bytes], ...]
    arrays: "tuple[tuple[str, tuple[int, ...], np.dtype[Any], int], ...]"
    tail: int
    message: pb.AttendedLayer

    def fits(self, received: bytes) -> bool:
        """Whether an answer is laid out so."""
        if len(received) != self.size:
            return False
        return all(received.startswith(piece, offset) for offset, piece in self.pieces)

    def read(self, received: bytes) -> Attended:
        """An answer that is laid out so."""
        memory = buffers.adopt(received)
        arrays = {}
        for name, shape, dtype, offset in self.arrays:
            array: Array = np.ndarray(shape, dtype, memory, offset)
            arrays[name] = array if array.flags.aligned else array.copy()
        message = self.message
        if self.tail > 0:
            message = pb.AttendedLayer.FromString(received[self.tail :])
        return Attended(message, arrays)


def _layout_of(received: bytes) -> _Layout:
    """How an answer is laid out; raises the error that it is, if it is one."""
    view = memoryview(received)
    body = None
    for number, start, inside, end in encoding.fields(view):
        if number == _ATTENDED and inside != start:
            body = inside, end
    if body is None:
        read(received)
        raise DecodeError("it does not answer a layer")
    first, last = body
    message, rooms = wire.locate(view[first:last], pb.AttendedLayer, ANSWERED)
    arrays = []
    pieces = []
    at = _after_id(received)
    for name, (start, end) in sorted(rooms.items(), key=lambda room: room[1]):
        shape, dtype = _tensors.kind(getattr(message, name))
        if end - start != math.prod(shape) * dtype.itemsize:
            raise DecodeError(f"{name}: {end - start} bytes for {dtype} of shape {shape}")
        arrays.append((name, shape, dtype, first + start))
        pieces.append((at, received[at : first + start]))
        at = first + end
    known = {*ANSWERED, _ANSWER_PADDING}
    before = [n for n, _, _, end in encoding.fields(view[first:last]) if first + end <= at]
    behind = len(arrays) > 0 and last == len(received) and known.issuperset(before)
    tail = at if behind and not message.weights else 0
    return _Layout(len(received), tuple(pieces), tuple(arrays), tail, message)


def _after_id(received: bytes) -> int:
    """Where an answer goes on after its id; 0 if it does not begin with it."""
    if received[:1] != _ANSWER_ID:
        return 0
    at = 1
    while at < len(received) and received[at] > 0x7F:
        at += 1
    return at + 1
