"""Messages with room for tensors' elements, which are copied into them once or written in place."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    head: bytes, tensors: Sequence[tuple[int, bytes, int]], padding: int, tail: int = 0
) -> Frame:
    """Plan a message: `head`, then tensors whose elements lie at multiples of 16, then a tail.

    Args:
        head: a serialised message without its tensors.
        tensors: (field number, serialised dtype and shape, bytes of elements) of each.
        padding: the number, below 16, of a `bytes` field that readers ignore.
        tail: bytes to leave free at the end.
    """
    pieces = [(0, head)] if head else []
    rooms = []
    at = len(head)
    for number, header, size in tensors:
        inner = header + tag(_TENSOR_DATA) + varint(size)
        piece = tag(number) + varint(len(inner) + size) + inner
        missing = -(at + len(piece)) % ALIGNMENT
        if missing:
            piece = pad(padding, missing if missing > 1 else missing + ALIGNMENT) + piece
        pieces.append((at, piece))
        start = at + len(piece)
        at = start + size
        rooms.append((start, at))
    return Frame(at + tail, tuple(pieces), tuple(rooms), at)


def pad(number: int, size: int) -> bytes:
    """A `bytes` field that takes `size` bytes, 2 to 129, tag and length included."""
    return tag(number) + varint(size - 2) + bytes(size - 2)
