"""Answers to unary requests, whose tensors are computed where they are sent from, or shared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from attnserve_proto import attention_pb2 as pb
from attnserve_proto import buffers, wire
from attnserve_proto.encoding import embedded
from attnserve_proto.frames import RESPONSE_PADDING, Frame, lay_out, pad

from attnserve_server.dtypes import Array
from attnserve_server.engine.models import LoadedModel
from attnserve_server.wire import answers
from attnserve_server.wire.tensors import Region, TensorSpec

_FIELD = {name: number for number, name in wire.RESPONSE_TENSORS.items()}
_TIMINGS = pb.AttendResponse.TIMINGS_FIELD_NUMBER
# Room for timings: five fields of at most eleven bytes, and what tells how many follow.
_TAIL_BYTES = 64


class Answer(Protocol):
    """One answer under way."""

    into: dict[str, Array]
    """Its tensors, to be filled."""

    def finish(self, timings: pb.Timings) -> bytes:
        """The message, once its tensors are filled."""


@dataclass(frozen=True, slots=True)
class MessageFrame:
    """An answer that holds its tensors, but for their elements and its timings."""

    frame: Frame
    results: tuple[TensorSpec, ...]

    def begin(self) -> Answer:
        """Make room for one answer."""
        return _InMessage(self)


@dataclass(frozen=True, slots=True)
class SharedFrame:
    """An answer whose tensors lie in shared memory, but for its timings.

    Attributes:
        region: where they lie.
        starts: of each tensor, bytes from there.
    """

    message: bytes
    results: tuple[TensorSpec, ...]
    region: Region
    starts: tuple[int, ...]

    def begin(self, view: memoryview) -> Answer:
        """Begin one answer; `view` is of the region."""
        return _Shared(self, view)


def message_frame(model: LoadedModel, variant: str, results: Sequence[TensorSpec]) -> MessageFrame:
    """Lay out an answer that holds its tensors.

    Args:
        model, variant: that will run.
        results: its tensors.
    """
    head = answers.head(model, variant).SerializeToString()
    parts = [
        (
            _FIELD[spec.name],
            pb.Tensor(dtype=spec.wire_dtype, shape=spec.shape).SerializeToString(),
            spec.byte_size,
        )
        for spec in results
    ]
    return MessageFrame(lay_out(head, parts, RESPONSE_PADDING, _TAIL_BYTES), tuple(results))


def shared_frame(
    model: LoadedModel,
    variant: str,
    results: Sequence[TensorSpec],
    region: Region,
    starts: Sequence[int],
) -> SharedFrame:
    """Lay out an answer whose tensors lie in shared memory.

    Args:
        model, variant: that will run.
        results: its tensors.
        region: where they go.
        starts: of each tensor, bytes from there.
    """
    response = answers.head(model, variant)
    for spec, start in zip(results, starts, strict=True):
        getattr(response, spec.name).CopyFrom(
            pb.Tensor(
                dtype=spec.wire_dtype,
                shape=spec.shape,
                shared_memory=pb.SharedMemoryRegion(
                    name=region.name, offset=region.offset + start, byte_size=spec.byte_size
                ),
            )
        )
    return SharedFrame(response.SerializeToString(), tuple(results), region, tuple(starts))


class _InMessage:
    def __init__(self, prepared: MessageFrame) -> None:
        self._frame = prepared.frame
        self._message, self._view = buffers.blank(prepared.frame.size)
        self.into: dict[str, Array] = {
            spec.name: spec.view(self._view[start:end])
            for spec, (start, end) in zip(prepared.results, prepared.frame.rooms, strict=True)
        }

    def finish(self, timings: pb.Timings) -> bytes:
        self._frame.write_pieces(self._view)
        tail = embedded(_TIMINGS, timings.SerializeToString())
        tail += pad(RESPONSE_PADDING, _TAIL_BYTES - len(tail))
        self._view[self._frame.end :] = tail
        return self._message


class _Shared:
    def __init__(self, prepared: SharedFrame, view: memoryview) -> None:
        self._message = prepared.message
        self.into: dict[str, Array] = {
            spec.name: spec.view(view[start : start + spec.byte_size])
            for spec, start in zip(prepared.results, prepared.starts, strict=True)
        }

    def finish(self, timings: pb.Timings) -> bytes:
        return self._message + embedded(_TIMINGS, timings.SerializeToString())
