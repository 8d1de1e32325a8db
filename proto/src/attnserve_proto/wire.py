"""Tensors on the wire without the copies that protobuf's Python API makes.

Setting, serialising, parsing and reading a `bytes` field copies it each time. Here the small part
of a message goes through protobuf as usual, while the elements of its tensors are joined to it, or
found in it, as views. What comes out is ordinary protobuf (see "Encoding" in its documentation:
https://protobuf.dev/programming-guides/encoding/): any client or server reads and writes it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from attnserve_proto.attnserve.v1 import attention_pb2 as pb
from attnserve_proto.encoding import fields, read_varint, skip_varint, tag, varint
from attnserve_proto.frames import ALIGNMENT, pad

Buffer = bytes | bytearray | memoryview

_TENSOR_DATA = pb.Tensor.DATA_FIELD_NUMBER
_REQUEST_ID = pb.AttendStreamRequest.REQUEST_ID_FIELD_NUMBER
_CHUNK = pb.AttendStreamRequest.CHUNK_FIELD_NUMBER
_PUT_CHUNK = pb.PutTensorRequest.CHUNK_FIELD_NUMBER
_CHUNK_TENSOR = pb.TensorChunk.TENSOR_FIELD_NUMBER
_CHUNK_OFFSET = pb.TensorChunk.OFFSET_FIELD_NUMBER
_CHUNK_DATA = pb.TensorChunk.DATA_FIELD_NUMBER
_CHUNK_PADDING = pb.TensorChunk.PADDING_FIELD_NUMBER

# The tensor fields of each message, by number: those whose elements travel as views.
REQUEST_TENSORS: Mapping[int, str] = {
    field.number: field.name
    for field in pb.AttendRequest.DESCRIPTOR.fields
    if field.message_type is pb.Tensor.DESCRIPTOR
}
RESPONSE_TENSORS: Mapping[int, str] = {
    field.number: field.name
    for field in pb.AttendResponse.DESCRIPTOR.fields
    if field.message_type is pb.Tensor.DESCRIPTOR
}

MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One `TensorChunk` and the stream request it belongs to; `data` may be a view."""

    request_id: int
    tensor: int
    offset: int
    data: memoryview


def split(
    buffer: bytes, message_type: type[MessageT], tensor_fields: Mapping[int, str]
) -> tuple[MessageT, dict[str, memoryview]]:
    """Parse a message, leaving the elements of its tensors where they are.

    As `locate`, but gives views of `buffer` instead of places in it.
    """
    message, rooms = locate(buffer, message_type, tensor_fields)
    view = memoryview(buffer)
    return message, {name: view[start:end] for name, (start, end) in rooms.items()}


def locate(
    buffer: Buffer, message_type: type[MessageT], tensor_fields: Mapping[int, str]
) -> tuple[MessageT, dict[str, tuple[int, int]]]:
    """Parse a message but for the elements of its tensors, and say where those are.

    Args:
        buffer: a serialised `message_type`.
        message_type: the class to parse into.
        tensor_fields: number and name of its `Tensor` fields.

    Returns:
        The message, its tensors' `data` left out, and by field name where in `buffer` that data
        starts and ends. A tensor whose `data` was never set has no entry.

    Raises:
        DecodeError: `buffer` is not a serialised `message_type`.
    """
    view = memoryview(buffer)
    kept: list[Buffer] = []
    rooms: dict[str, tuple[int, int]] = {}
    for number, start, body, end in fields(view):
        name = tensor_fields.get(number)
        if name is None or body == start:
            kept.append(view[start:end])
            continue
        head = bytearray()
        for inner, inner_start, inner_body, inner_end in fields(view[body:end]):
            if inner == _TENSOR_DATA and inner_body != inner_start:
                rooms[name] = (body + inner_body, body + inner_end)
            else:
                head += view[body + inner_start : body + inner_end]
        kept += [tag(number), varint(len(head)), head]
    return message_type.FromString(b"".join(kept)), rooms


def encode_chunk(chunk: Chunk) -> bytes:
    """Serialise a chunk as an `AttendStreamRequest` or an `AttendStreamResponse`: both alike."""
    size = chunk.data.nbytes
    return b"".join((chunk_head(chunk.request_id, chunk.tensor, chunk.offset, size), chunk.data))


def chunk_head(request_id: int, tensor: int, offset: int, size: int) -> bytes:
    """What precedes the `size` bytes of a chunk in its message; they lie at a multiple of 16."""
    prefix = tag(_REQUEST_ID, 0) + varint(request_id)
    return _chunk_head(prefix, _CHUNK, tensor, offset, size)


def decode_chunk(buffer: bytes) -> Chunk | None:
    """Read a stream message that holds a chunk; None if it holds something else.

    Raises:
        DecodeError: `buffer` is not a serialised stream message.
    """
    view = memoryview(buffer)
    request_id = tensor = offset = 0
    data = view[:0]
    found = False
    for number, start, body, end in fields(view):
        if number == _REQUEST_ID and body == start:
            request_id = read_varint(view, skip_varint(view, start))[0]
        elif number == _CHUNK and body != start:
            found = True
            tensor, offset, data = _chunk(view[body:end])
        elif number in (_CHUNK - 1, _CHUNK + 1):
            return None
    return Chunk(request_id, tensor, offset, data) if found else None


def encode_put_chunk(chunk: Chunk) -> bytes:
    """Serialise a chunk as a `PutTensorRequest`."""
    head = _chunk_head(b"", _PUT_CHUNK, chunk.tensor, chunk.offset, chunk.data.nbytes)
    return b"".join((head, chunk.data))


def decode_put_chunk(buffer: bytes) -> Chunk | None:
    """Read a `PutTensorRequest` that holds a chunk; None if it holds something else.

    Raises:
        DecodeError: `buffer` is not a serialised `PutTensorRequest`.
    """
    view = memoryview(buffer)
    found = None
    for number, start, body, end in fields(view):
        if number == _PUT_CHUNK and body != start:
            found = Chunk(0, *_chunk(view[body:end]))
    return found


def _chunk(view: memoryview) -> tuple[int, int, memoryview]:
    """Tensor, offset and data of a serialised `TensorChunk`."""
    tensor = offset = 0
    data = view[:0]
    for number, start, body, end in fields(view):
        if number == _CHUNK_DATA and body != start:
            data = view[body:end]
        elif number == _CHUNK_TENSOR and body == start:
            tensor = read_varint(view, skip_varint(view, start))[0]
        elif number == _CHUNK_OFFSET and body == start:
            offset = read_varint(view, skip_varint(view, start))[0]
    return tensor, offset, data


def _chunk_head(prefix: bytes, number: int, tensor: int, offset: int, size: int) -> bytes:
    """`prefix`, then a chunk without its data as the field `number`."""
    start = tag(_CHUNK_TENSOR, 0) + varint(tensor) + tag(_CHUNK_OFFSET, 0) + varint(offset)
    end = tag(_CHUNK_DATA) + varint(size)
    prefix += tag(number)
    padding = b""
    # Padding may make the length before it longer: then it is chosen once more.
    for _ in range(2):
        inner = start + padding + end
        head = prefix + varint(len(inner) + size) + inner
        missing = (len(padding) - len(head)) % ALIGNMENT
        if missing == len(padding):
            break
        padding = pad(_CHUNK_PADDING, missing if missing > 1 else missing + ALIGNMENT)
    return prefix + varint(len(start + padding + end) + size) + start + padding + end


def cut(
    request_id: int, tensor: int, data: memoryview, chunk_bytes: int, start: int = 0
) -> Iterator[bytes]:
    """Cut bytes of one tensor, from `start` on, into serialised chunks.

    Args:
        request_id: of the stream.
        tensor: field number.
        data: the bytes.
        chunk_bytes: the most that a chunk holds.
        start: where in the tensor `data` begins.
    """
    for offset in range(0, data.nbytes, chunk_bytes):
        piece = data[offset : offset + chunk_bytes]
        yield encode_chunk(Chunk(request_id, tensor, start + offset, piece))
