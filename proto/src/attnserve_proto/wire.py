"""Tensors on the wire without the copies that protobuf's Python API makes.

Setting, serialising, parsing and reading a `bytes` field copies it each time. Here the small part
of a message goes through protobuf as usual, while the elements of its tensors are joined to it, or
found in it, as views. What comes out is ordinary protobuf (see "Encoding" in its documentation:
https://protobuf.dev/programming-guides/encoding/): any client or server reads and writes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from attnserve_proto.attnserve.v1 import attention_pb2 as pb
from attnserve_proto.encoding import fields as _fields
from attnserve_proto.encoding import read_varint as _read_varint
from attnserve_proto.encoding import skip_varint as _skip_varint
from attnserve_proto.encoding import tag as _tag
from attnserve_proto.encoding import varint as _varint

Buffer = bytes | bytearray | memoryview

_TENSOR_DATA = pb.Tensor.DATA_FIELD_NUMBER
_REQUEST_ID = pb.AttendStreamRequest.REQUEST_ID_FIELD_NUMBER
_CHUNK = pb.AttendStreamRequest.CHUNK_FIELD_NUMBER
_CHUNK_TENSOR = pb.TensorChunk.TENSOR_FIELD_NUMBER
_CHUNK_OFFSET = pb.TensorChunk.OFFSET_FIELD_NUMBER
_CHUNK_DATA = pb.TensorChunk.DATA_FIELD_NUMBER

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


def join(message: Message, tensors: Sequence[tuple[int, pb.Tensor, Buffer]]) -> bytes:
    """Serialise `message` with tensors added to it.

    Args:
        message: everything but the tensors.
        tensors: (field number in `message`, dtype and shape, elements as bytes) of each.

    Returns:
        The bytes that `message.SerializeToString()` would give had the tensors been set in it.
    """
    parts: list[Buffer] = [message.SerializeToString()]
    for number, header, data in tensors:
        head = header.SerializeToString()
        size = memoryview(data).nbytes
        tail = _tag(_TENSOR_DATA) + _varint(size)
        parts.append(_tag(number) + _varint(len(head) + len(tail) + size) + head + tail)
        parts.append(data)
    return b"".join(parts)


def split(
    buffer: bytes, message_type: type[MessageT], tensor_fields: Mapping[int, str]
) -> tuple[MessageT, dict[str, memoryview]]:
    """Parse a message, leaving the elements of its tensors where they are.

    Args:
        buffer: a serialised `message_type`.
        message_type: the class to parse into.
        tensor_fields: number and name of its `Tensor` fields.

    Returns:
        The message, its tensors' `data` left out, and that data by field name, as views of
        `buffer`. A tensor whose `data` was never set has no entry.

    Raises:
        DecodeError: `buffer` is not a serialised `message_type`.
    """
    view = memoryview(buffer)
    kept: list[Buffer] = []
    views: dict[str, memoryview] = {}
    for number, start, body, end in _fields(view):
        name = tensor_fields.get(number)
        if name is None or body == start:
            kept.append(view[start:end])
            continue
        head = bytearray()
        for inner, inner_start, inner_body, inner_end in _fields(view[body:end]):
            if inner == _TENSOR_DATA and inner_body != inner_start:
                views[name] = view[body + inner_body : body + inner_end]
            else:
                head += view[body + inner_start : body + inner_end]
        kept += [_tag(number), _varint(len(head)), head]
    return message_type.FromString(b"".join(kept)), views


def encode_chunk(chunk: Chunk) -> bytes:
    """Serialise a chunk as an `AttendStreamRequest` or an `AttendStreamResponse`: both alike."""
    size = chunk.data.nbytes
    head = b"".join(
        (
            _tag(_CHUNK_TENSOR, 0) + _varint(chunk.tensor),
            _tag(_CHUNK_OFFSET, 0) + _varint(chunk.offset),
            _tag(_CHUNK_DATA) + _varint(size),
        )
    )
    prefix = _tag(_REQUEST_ID, 0) + _varint(chunk.request_id)
    prefix += _tag(_CHUNK) + _varint(len(head) + size) + head
    return b"".join((prefix, chunk.data))


def decode_chunk(buffer: bytes) -> Chunk | None:
    """Read a stream message that holds a chunk; None if it holds something else.

    Raises:
        DecodeError: `buffer` is not a serialised stream message.
    """
    view = memoryview(buffer)
    request_id = tensor = offset = 0
    data = view[:0]
    found = False
    for number, start, body, end in _fields(view):
        if number == _REQUEST_ID and body == start:
            request_id = _read_varint(view, _skip_varint(view, start))[0]
        elif number == _CHUNK and body != start:
            found = True
            inner = view[body:end]
            for field, field_start, field_body, field_end in _fields(inner):
                if field == _CHUNK_DATA and field_body != field_start:
                    data = inner[field_body:field_end]
                elif field == _CHUNK_TENSOR and field_body == field_start:
                    tensor = _read_varint(inner, _skip_varint(inner, field_start))[0]
                elif field == _CHUNK_OFFSET and field_body == field_start:
                    offset = _read_varint(inner, _skip_varint(inner, field_start))[0]
        elif number in (_CHUNK - 1, _CHUNK + 1):
            return None
    return Chunk(request_id, tensor, offset, data) if found else None


def cut(request_id: int, tensor: int, data: memoryview, chunk_bytes: int) -> Iterator[bytes]:
    """Cut one tensor's bytes into serialised chunks of at most `chunk_bytes` bytes each."""
    for offset in range(0, data.nbytes, chunk_bytes):
        yield encode_chunk(Chunk(request_id, tensor, offset, data[offset : offset + chunk_bytes]))
