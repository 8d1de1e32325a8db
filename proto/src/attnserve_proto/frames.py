"""Messages with room for tensors' elements, which are copied into them once or written in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from attnserve_proto import buffers
from attnserve_proto.attnserve.v1 import attention_pb2 as pb
from attnserve_proto.encoding import tag, varint

Buffer = bytes | bytearray | memoryview

# Elements lie at multiples of this in a message: of the size of every dtype, and of what malloc
# aligns a message to.
ALIGNMENT = 16
REQUEST_PADDING = pb.AttendRequest.PADDING_FIELD_NUMBER
RESPONSE_PADDING = pb.AttendResponse.PADDING_FIELD_NUMBER

_TENSOR_DATA = pb.Tensor.DATA_FIELD_NUMBER


@dataclass(frozen=True, slots=True)
class Frame:
    """A message laid out with room for its tensors' elements.

    Attributes:
        size: of the whole message in bytes.
        pieces: what stands between the elements: (offset, bytes) of each.
        rooms: (start, end) of each tensor's elements.
        end: where the last tensor ends; what follows is the tail.
    """

    size: int
    pieces: tuple[tuple[int, bytes], ...]
    rooms: tuple[tuple[int, int], ...]
    end: int

    def fill(self, elements: Sequence[Buffer]) -> bytes:
        """The message with these elements, copied once."""
        if not self.rooms:
            return b"".join(piece for _, piece in self.pieces)
        message, view = buffers.blank(self.size)
        self.write_pieces(view)
        for (start, end), data in zip(self.rooms, elements, strict=True):
            view[start:end] = data
        return message

    def write_pieces(self, view: memoryview) -> None:
        """Write everything but elements and tail."""
        for offset, piece in self.pieces:
            view[offset : offset + len(piece)] = piece


def lay_out(
    head: bytes,
    tensors: Sequence[tuple[int, bytes, int]],
    padding: int,
    tail: int = 0,
    start: int = 0,
) -> Frame:
    """Plan a message: `head`, then tensors whose elements lie at multiples of 16, then a tail.

    Args:
        head: a serialised message without its tensors.
        tensors: (field number, serialised dtype and shape, bytes of elements) of each.
        padding: the number, below 16, of a `bytes` field that readers ignore.
        tail: bytes to leave free at the end.
        start: bytes that stand before it, which become no piece.
    """
    pieces = [(start, head)] if head else []
    rooms = []
    at = start + len(head)
    for number, header, size in tensors:
        inner = header + tag(_TENSOR_DATA) + varint(size)
        piece = tag(number) + varint(len(inner) + size) + inner
        missing = -(at + len(piece)) % ALIGNMENT
        if missing:
            piece = pad(padding, missing if missing > 1 else missing + ALIGNMENT) + piece
        pieces.append((at, piece))
        room = at + len(piece)
        at = room + size
        rooms.append((room, at))
    return Frame(at + tail, tuple(pieces), tuple(rooms), at)


def lay_out_within(
    before: bytes,
    number: int,
    head: bytes,
    tensors: Sequence[tuple[int, bytes, int]],
    padding: int,
) -> Frame:
    """Plan a message within another one, as its field `number` after `before`; else as `lay_out`.

    How many bytes its length takes depends on the paddings in it, and those on how many bytes
    stand before it: it is laid out for each number of bytes until one fits.
    """
    for width in count(1):
        start = len(before) + len(tag(number)) + width
        frame = lay_out(head, tensors, padding, start=start)
        inner, pieces = frame.size - start, frame.pieces
        if inner >= 1 << 7 * width:
            continue
        missing = (1 << 7 * (width - 1)) - inner if width > 1 else 0
        if missing > 0:
            # With one byte more before it, it needs less padding, and then a shorter length.
            filling = pad(padding, max(2, missing))
            pieces, inner = (*pieces, (frame.size, filling)), inner + len(filling)
        opening = before + tag(number) + varint(inner)
        return Frame(start + inner, ((0, opening), *pieces), frame.rooms, frame.end)
    raise AssertionError  # a width fits


def pad(number: int, size: int) -> bytes:
    """A `bytes` field that takes `size` bytes, 2 to 129, tag and length included."""
    return tag(number) + varint(size - 2) + bytes(size - 2)
