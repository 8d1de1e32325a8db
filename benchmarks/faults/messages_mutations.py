"""Messages that are nearly right: valid ones, changed as values, as fields, or as bytes."""

import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Span = tuple[int, int, int]
"""Of a field, on whatever level: where it begins, where its tag ends, where it ends."""

_NUMBERS = (0, 1, 2, 3, 4, 7, 8, 16, 63, 64, 65, 255, 1023, 1 << 16, (1 << 31) - 1, 1 << 31,
            (1 << 32) - 1, 1 << 33, (1 << 63) - 1, (1 << 64) - 1)  # fmt: skip
_REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, 1e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "causal", "1", "0", "-1", "99", "query", "FP32", "native", "paged", "\0", "ä€𝄞",
          "a" * 300, "../..", "%s%n", "e" * 65)  # fmt: skip
_MOST_DEPTH = 3
_SMALL, _RANGES = 6, {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_SINT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_ENUM: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
}  # fmt: skip


def shaken(message: Message, chance: random.Random) -> Message:
    """A copy in which one to three fields, of whatever depth, have another value or none."""
    changed = type(message)()
    changed.CopyFrom(message)
    for _ in range(chance.randint(1, 3)):
        _shake(changed, chance)
    return changed


def _shake(message: Message, chance: random.Random) -> None:
    # Those that are there, most of the time: deep within what is right.
    fields: list[Any] = [field for field, _ in message.ListFields()]
    if not fields or chance.random() < 0.2:
        fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = chance.choice(fields)
    if chance.random() < 0.1:
        message.ClearField(field.name)
    elif field.is_repeated:
        _shake_repeated(message, field, chance)
    elif field.message_type is not None:
        part = getattr(message, field.name)
        part.SetInParent()
        if chance.random() < 0.9:
            _shake(part, chance)
    else:
        setattr(message, field.name, _value(field, getattr(message, field.name), chance))


def _shake_repeated(message: Message, field: FieldDescriptor, chance: random.Random) -> None:
    values = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key = chance.choice((*values, *_TEXTS))
        _shake(values[key], chance)
        return
    if field.message_type is not None:
        if not values or chance.random() < 0.2:
            values.add()
        elif chance.random() < 0.2:
            del values[chance.randrange(len(values))]
        elif chance.random() < 0.1:
            for _ in range(chance.choice((2, 30, 300))):
                values.add().CopyFrom(values[0])
        else:
            _shake(chance.choice(values), chance)
        return
    sort = chance.random()
    if values and sort < 0.3:
        at = chance.randrange(len(values))
        values[at] = _value(field, values[at], chance)
    elif values and sort < 0.5:
        del values[chance.randrange(len(values))]
    elif sort < 0.9:
        values.append(_value(field, values[0] if values else None, chance))
    else:
        values.extend([_value(field, None, chance)] * chance.choice((10, 1000)))


def _value(field: FieldDescriptor, old: Any, chance: random.Random) -> Any:
    kind = field.type
    if kind == FieldDescriptor.TYPE_BOOL:
        return not old
    if kind in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return chance.choice(_REALS)
    if kind == FieldDescriptor.TYPE_STRING:
        return chance.choice((*_TEXTS, (old or "")[:-1], (old or "") + "x"))
    if kind == FieldDescriptor.TYPE_BYTES:
        content = bytes(old or b"")
        return chance.choice((b"", content[:-1], content + b"\0", content * 2,
                              chance.randbytes(chance.randrange(64)),
                              chance.randbytes(len(content)), b"\xff" * len(content)))  # fmt: skip
    least, most = _RANGES[kind]
    if isinstance(old, int) and chance.random() < 0.3:
        return min(max(old + chance.choice((-1, 1)), least), most)
    if chance.random() < 0.5:
        return chance.randrange(_SMALL)
    return min(max(chance.choice((1, -1)) * chance.choice(_NUMBERS), least), most)


def spans_of(data: bytes) -> list[Span]:
    """The fields of a message, those within its fields too, as far as they look like messages."""
    spans: list[Span] = []
    _find(data, 0, len(data), 0, spans)
    return spans


def _find(data: bytes, at: int, end: int, depth: int, spans: list[Span]) -> bool:
    found: list[Span] = []
    while at < end:
        start = at
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if at < 0 or tag < 8:
            return False
        tag_end = at
        if kind == 0:
            _, at = _varint(data, at, end)
        elif kind == 2:
            size, at = _varint(data, at, end)
            if at < 0 or at + size > end:
                return False
            if depth < _MOST_DEPTH and 0 < size < 4096:
                _find(data, at, at + size, depth + 1, found)
            at += size
        else:
            at += {1: 8, 5: 4}.get(kind, end)
        if at < 0 or at > end:
            return False
        found.append((start, tag_end, at))
    spans += found
    return True


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, -1


def varint(value: int) -> bytes:
    """A number as messages have it."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def changed(data: bytes, spans: list[Span], chance: random.Random) -> bytes:
    """A message with something else in its bytes; most are none any more."""
    if not data or not spans:
        return chance.randbytes(chance.randrange(1, 40))
    return chance.choice(_CHANGES)(data, chance.choice(spans), chance)


def _flip(data: bytes, _: Span, chance: random.Random) -> bytes:
    bits = bytearray(data)
    for _number in range(chance.choice((1, 1, 2, 8))):
        bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(8)
    return bytes(bits)


def _flip_near_tag(data: bytes, span: Span, chance: random.Random) -> bytes:
    at = min(span[0] + chance.randrange(4), len(data) - 1)
    return data[:at] + bytes((chance.randrange(256),)) + data[at + 1 :]


def _insert(data: bytes, _: Span, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.choice((1, 1, 2, 9))) + data[at:]


def _delete(data: bytes, _: Span, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + data[at + chance.choice((1, 1, 2, 9)) :]


def _cut(data: bytes, _: Span, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _drop(data: bytes, span: Span, _: random.Random) -> bytes:
    return data[: span[0]] + data[span[2] :]


def _double(data: bytes, span: Span, _: random.Random) -> bytes:
    return data[: span[2]] + data[span[0] :]


def _many(data: bytes, span: Span, chance: random.Random) -> bytes:
    field = data[span[0] : span[2]]
    most = max(1, 20_000 // len(field))
    return data[: span[2]] + field * chance.choice((2, min(50, most), most)) + data[span[2] :]


def _to_end(data: bytes, span: Span, _: random.Random) -> bytes:
    return data[: span[0]] + data[span[2] :] + data[span[0] : span[2]]


def _retype(data: bytes, span: Span, chance: random.Random) -> bytes:
    at = span[0]
    return data[:at] + bytes((data[at] & 0xF8 | chance.randrange(8),)) + data[at + 1 :]


def _resize(data: bytes, span: Span, chance: random.Random) -> bytes:
    at = span[1]
    size = chance.choice((0, 1, 127, 128, 1 << 14, (1 << 31) - 17, (1 << 31) - 16, 1 << 31, 1 << 32,
                          (1 << 64) - 1, chance.randrange(1 << 12)))  # fmt: skip
    return data[:at] + varint(size) + data[at + 1 :]


def _long_number(data: bytes, span: Span, chance: random.Random) -> bytes:
    at = chance.choice((span[0], span[1]))
    number = b"\x80" * chance.randrange(1, 12) + bytes((chance.choice((0, 1, 2, 0x7F)),))
    return data[:at] + number + data[at + 1 :]


def _unknown(data: bytes, span: Span, chance: random.Random) -> bytes:
    number = chance.choice((0, 15, 50, 99, 1000, 18_999, 19_000, (1 << 29) - 1, 1 << 29))
    kind = chance.choice((0, 1, 2, 5))
    value = {0: b"\7", 1: b"\0" * 8, 2: b"\3abc", 5: b"\0" * 4}[kind]
    return _into(data, span, varint(number << 3 | kind) + value, chance)


def _group(data: bytes, span: Span, chance: random.Random) -> bytes:
    number = chance.choice((1, 2, 50, 1000))
    depth = chance.choice((1, 1, 2, 98, 99, 100, 101))
    field = chance.choice((b"", varint(50 << 3) + b"\1", varint(3 << 3 | 2) + b"\2hi", b"\0\0"))
    ends = depth - chance.choice((0, 0, 0, 1))
    last = number + chance.choice((0, 0, 0, 1))
    group = varint(number << 3 | 3) * depth + field + varint(number << 3 | 4) * (ends - 1)
    return _into(data, span, group + (varint(last << 3 | 4) if ends > 0 else b""), chance)


def _into(data: bytes, span: Span, field: bytes, chance: random.Random) -> bytes:
    at = chance.choice((0, span[0], span[2], len(data)))
    return data[:at] + field + data[at:]


def _bad_text(data: bytes, span: Span, chance: random.Random) -> bytes:
    bad = chance.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"))
    at = chance.randrange(span[1], span[2] + 1)
    return data[:at] + bad + data[at + len(bad) :]


def _splice(data: bytes, span: Span, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + data[span[0] :]


def _noise(data: bytes, _: Span, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(1, 2 * len(data) + 2))


_CHANGES: tuple[Callable[[bytes, Span, random.Random], bytes], ...] = (
    _flip, _flip, _flip, _flip_near_tag, _flip_near_tag, _insert, _delete, _cut, _drop, _drop,
    _double, _double, _many, _to_end, _to_end, _retype, _retype, _resize, _resize, _long_number,
    _unknown, _unknown, _group, _group, _bad_text, _splice, _noise,
)  # fmt: skip
