"""Answers of `attend`: results whose arrays lie in the bytes that came."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import buffers, encoding, wire
from google.protobuf.message import DecodeError

from attnserve_client import _tensors
from attnserve_client._results import Array, AttendResult, Timings

# Shape and dtype of tensors, by field name.
Kinds = Mapping[str, tuple[tuple[int, ...], "np.dtype[Any]"]]

# Where each packed sequence begins, in queries and in keys, [N + 1] each; None: nothing is packed.
Starts = tuple[Array, Array] | None

_TIMINGS = pb.AttendResponse.TIMINGS_FIELD_NUMBER
_PADDING = pb.AttendResponse.PADDING_FIELD_NUMBER
# What begins those fields.
_TIMINGS_TAG, _PADDING_TAG = encoding.tag(_TIMINGS)[0], encoding.tag(_PADDING)[0]


@dataclass(frozen=True, slots=True)
class Region:
    """Shared memory that tensors of an answer lie in, and where in the whole it begins."""

    memory: Array
    offset: int


class AnswerReader:
    """Reads the answers to requests of one kind. Safe to share between threads.

    A server lays them all out alike, so one that has the same bytes as the one before it, but for
    elements and timings, is not parsed again.
    """

    def __init__(self) -> None:
        self._layout: _Layout | None = None

    def read(
        self, message: bytes, start: int = 0, stop: int | None = None, region: Region | None = None
    ) -> tuple[AttendResult, Kinds]:
        """Read an answer.

        Args:
            message: that nobody else holds.
            start, stop: where in it the `AttendResponse` lies; None is to the end.
            region: what its tensors lie in, if not in the message.

        Returns:
            The result, whose arrays lie where their elements came, writable; and what it lacks: the
            tensors whose elements follow in chunks.

        Raises:
            DecodeError: that is no answer.
        """
        stop = len(message) if stop is None else stop
        layout = self._layout
        timings = layout.timings_of(message, start, stop) if layout is not None else None
        if layout is None or timings is None:
            view = memoryview(message)[start:stop]
            response, rooms = wire.locate(view, pb.AttendResponse, wire.RESPONSE_TENSORS)
            layout, timings = _layout_of(view, response, rooms), timings_from(response.timings)
            if layout.timings_of(message, start, stop) == timings:
                self._layout = layout
        return layout.result(message, start, region, timings), layout.chunked


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the answers to requests of one kind have in common.

    Attributes:
        names: model, version and variant.
        pieces: (offset, bytes) of all but elements, timings and what follows these.
        arrays: field name, shape, dtype and offset of the tensors in the message or the region.
        chunked: of those whose elements follow in chunks.
        end: where the timings begin.
    """

    names: tuple[str, str, str]
    pieces: tuple[tuple[int, bytes], ...]
    arrays: "tuple[tuple[str, tuple[int, ...], np.dtype[Any], int], ...]"
    chunked: Kinds
    end: int

    def timings_of(self, message: bytes, start: int, stop: int) -> Timings | None:
        """The timings of an answer that is laid out so, after which comes padding at the most.

        None if this one is not.
        """
        at = start + self.end
        end = _end_of(message, at, stop, _TIMINGS_TAG)
        if end != stop and _end_of(message, end, stop, _PADDING_TAG) != stop:
            return None
        for offset, piece in self.pieces:
            if not message.startswith(piece, start + offset):
                return None
        return timings_from(pb.Timings.FromString(message[at + 2 : end]))

    def result(
        self, message: bytes, start: int, region: Region | None, timings: Timings
    ) -> AttendResult:
        """The result of an answer that is laid out so."""
        if region is None:
            memory: Any = buffers.adopt(message)
            base = start
        else:
            memory, base = region.memory, -region.offset
        arrays = {}
        for name, shape, dtype, offset in self.arrays:
            array: Array = np.ndarray(shape, dtype, memory, base + offset)
            arrays[name] = array if array.flags.aligned else array.copy()
        model, version, variant = self.names
        return AttendResult(model, version, variant, timings, **arrays)


def _layout_of(
    answer: memoryview, response: pb.AttendResponse, rooms: Mapping[str, tuple[int, int]]
) -> _Layout:
    arrays = []
    chunked = {}
    for name in wire.RESPONSE_TENSORS.values():
        tensor: pb.Tensor = getattr(response, name)
        content = tensor.WhichOneof("content")
        if content == "chunked":
            chunked[name] = _tensors.kind(tensor)
            continue
        if content == "shared_memory":
            at, byte_size = tensor.shared_memory.offset, tensor.shared_memory.byte_size
        elif name in rooms:
            at, byte_size = rooms[name][0], rooms[name][1] - rooms[name][0]
        else:
            continue
        shape, dtype = _tensors.kind(tensor)
        if byte_size != math.prod(shape) * dtype.itemsize:
            raise DecodeError(f"{name}: {byte_size} bytes for {dtype} of shape {shape}")
        arrays.append((name, shape, dtype, at))
    # What comes after the last field that is neither timings nor padding.
    ends = [0]
    ends += [end for n, _, _, end in encoding.fields(answer) if n not in (_TIMINGS, _PADDING)]
    pieces = []
    at = 0
    for first, last in [*sorted(rooms.values()), (ends[-1], ends[-1])]:
        pieces.append((at, bytes(answer[at:first])))
        at = last
    names = (response.model, response.version, response.variant)
    return _Layout(names, tuple(pieces), tuple(arrays), chunked, at)


def with_starts(result: AttendResult, starts: Starts) -> AttendResult:
    """A result that says how what it is of was packed, as the request did."""
    if starts is None:
        return result
    return replace(result, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])


def timings_from(message: pb.Timings) -> Timings:
    """Where the server spent its time."""
    return Timings(
        message.deserialize, message.queue, message.compute, message.serialize, message.batch_size
    )


def _end_of(message: bytes, start: int, stop: int, tag: int) -> int:
    """Where the field that starts there ends; beyond `stop` for another, or above 127 bytes."""
    if start + 2 <= stop and message[start] == tag and message[start + 1] < 128:
        return start + 2 + message[start + 1]
    return stop + 1
