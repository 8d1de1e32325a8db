"""Pieces of protobuf's wire format: https://protobuf.dev/programming-guides/encoding/."""

from collections.abc import Iterator

from google.protobuf.message import DecodeError

LENGTH_DELIMITED = 2
_FIXED_WIDTH = {1: 8, 5: 4}


def tag(number: int, wire_type: int = LENGTH_DELIMITED) -> bytes:
    """What precedes the value of a field."""
    return varint(number << 3 | wire_type)


def embedded(number: int, body: bytes) -> bytes:
    """A field that holds bytes, text or a message."""
    return tag(number) + varint(len(body)) + body


def varint(value: int) -> bytes:
    """An unsigned integer, seven bits a byte."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(view: memoryview, position: int) -> tuple[int, int]:
    """The varint at `position` and the position after it.

    Raises:
        DecodeError: it is cut off, or longer than 64 bits take.
    """
    value = shift = 0
    while True:
        if position >= len(view) or shift > 63:
            raise DecodeError("a varint is cut off or too long")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
        shift += 7


def skip_varint(view: memoryview, position: int) -> int:
    """The position after the varint at `position`."""
    return read_varint(view, position)[1]


def fields(view: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Each field as (number, start, body, end): body is where a length-delimited value begins.

    For the other wire types body equals start, so that a caller can tell them apart.

    Raises:
        DecodeError: a field is cut off, or of a wire type that proto3 does not have.
    """
    position, size = 0, len(view)
    while position < size:
        start = position
        key, position = read_varint(view, position)
        number, wire_type = key >> 3, key & 7
        body = start
        if wire_type == 0:
            _, position = read_varint(view, position)
        elif wire_type == LENGTH_DELIMITED:
            length, position = read_varint(view, position)
            body = position
            position += length
        elif wire_type in _FIXED_WIDTH:
            position += _FIXED_WIDTH[wire_type]
        else:
            raise DecodeError(f"field {number} has wire type {wire_type}, which is not supported")
        if position > size or number == 0:
            raise DecodeError(f"field {number} is cut off or not valid")
        yield number, start, body, position
