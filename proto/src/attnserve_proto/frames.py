"""Messages with room for tensors' elements, which are copied into them once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from attnserve_proto.attnserve.v1 import attention_pb2 as pb
from attnserve_proto.encoding import tag, varint

# Elements lie at multiples of this in a message: of the size of every dtype, and of what malloc
# aligns a message to.
ALIGNMENT = 16
REQUEST_PADDING = pb.AttendRequest.PADDING_FIELD_NUMBER

_TENSOR_DATA = pb.Tensor.DATA_FIELD_NUMBER


@dataclass(frozen=True, slots=True)
class Frame:
    """A message laid out with room for its tensors' elements.

    Attributes:
        pieces: what stands before each tensor's elements; without tensors, the message.
        rooms: (start, end) of each tensor's elements.
        end: where the message ends.
        tail: what stands behind the last tensor's elements.
    """

    pieces: tuple[bytes, ...]
    rooms: tuple[tuple[int, int], ...]
    end: int
    tail: bytes = b""

    def parts(self, elements: Sequence[Any]) -> list[Any]:
        """The message with these elements, in parts to join.

        Args:
            elements: contiguous, each of the bytes that its room has; anything whose memory
                `bytes.join` can read, arrays of NumPy among it.
        """
        if not self.rooms:
            return list(self.pieces)
        parts: list[Any] = []
        for piece, data in zip(self.pieces, elements, strict=True):
            parts += (piece, data)
        if self.tail:
            parts.append(self.tail)
        return parts

    def fill(self, elements: Sequence[Any]) -> bytes:
        """The message with these elements, copied once."""
        return b"".join(self.parts(elements))


def lay_out(
    head: bytes, tensors: Sequence[tuple[int, bytes, int]], padding: int, before: int = 0
) -> Frame:
    """Plan a message: `head`, then tensors whose elements lie at multiples of 16.

    Args:
        head: a serialised message without its tensors.
        tensors: (field number, serialised dtype and shape, bytes of elements) of each.
        padding: the number, below 16, of a `bytes` field that readers ignore.
        before: bytes that precede the message where it is sent; `rooms` and `end` count them.
    """
    pieces = []
    rooms = []
    at = before
    piece = head
    for number, header, size in tensors:
        inner = header + tag(_TENSOR_DATA) + varint(size)
        start = tag(number) + varint(len(inner) + size) + inner
        missing = -(at + len(piece) + len(start)) % ALIGNMENT
        if missing:
            piece += pad(padding, missing if missing > 1 else missing + ALIGNMENT)
        piece += start
        pieces.append(piece)
        rooms.append((at + len(piece), at + len(piece) + size))
        at = rooms[-1][1]
        piece = b""
    return Frame(tuple(pieces) or (head,), tuple(rooms), at if rooms else at + len(head))


def lay_out_within(
    before: bytes,
    number: int,
    head: bytes,
    tensors: Sequence[tuple[int, bytes, int]],
    padding: int,
) -> tuple[Frame, int]:
    """Plan a message within another one, as its field `number` after `before`; else as `lay_out`.

    How many bytes its length takes depends on the paddings in it, and those on how many bytes
    stand before it: it is laid out for each number of bytes until one fits.

    Returns:
        The plan of both, and where the inner message begins.
    """
    for width in count(1):
        start = len(before) + len(tag(number)) + width
        frame = lay_out(head, tensors, padding, start)
        inner = frame.end - start
        if inner >= 1 << 7 * width:
            continue
        missing = (1 << 7 * (width - 1)) - inner if width > 1 else 0
        # With one byte more before it, it needs less padding, and then a shorter length.
        tail = pad(padding, max(2, missing)) if missing > 0 else b""
        inner += len(tail)
        opening = before + tag(number) + varint(inner)
        pieces = (opening + frame.pieces[0], *frame.pieces[1:])
        if not frame.rooms:
            pieces, tail = (pieces[0] + tail,), b""
        return Frame(pieces, frame.rooms, start + inner, tail), start
    raise AssertionError  # a width fits


def pad(number: int, size: int) -> bytes:
    """A `bytes` field that takes `size` bytes, 2 to 129, tag and length included."""
    return tag(number) + varint(size - 2) + bytes(size - 2)
