"""Values of a manifest, read and checked one by one.

A reader takes a field's name, for messages, and what the JSON has there, and gives the value.
Readers raise ValueError, which names the field, what was given and what is allowed; KeyError for
what is missing; TypeError for what is of another type altogether.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

Reader = Callable[[str, Any], Any]
RecordT = TypeVar("RecordT")


def text(field: str, value: Any) -> str:
    """Any text."""
    return str(value)


def anything(field: str, value: Any) -> Any:
    """What is there."""
    return value


def yes_or_no(field: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{field}: {value!r}; allowed: true, false")
    return value


def one_of(*allowed: str) -> Reader:
    """One of a few texts."""

    def read(field: str, value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"{field}: {value!r}; allowed: {', '.join(allowed)}")
        return str(value)

    return read


def integer(lowest: int = 1, highest: int = 2**31 - 1) -> Reader:
    """An integer within bounds; numbers that only equal one are none."""

    def read(field: str, value: Any) -> int:
        if type(value) is not int or not lowest <= value <= highest:
            raise ValueError(f"{field}: {value!r}; allowed: an integer, {lowest}..{highest}")
        return value

    return read


def number(field: str, value: Any) -> float:
    """Any number."""
    return float(value)


def finite(field: str, value: Any) -> float:
    """A finite number."""
    return _finite(field, value, math.isfinite(float(value)), "of either sign")


def above_zero(field: str, value: Any) -> float:
    """A finite number above 0."""
    return _finite(field, value, float(value) > 0, "above 0")


def zero_or_more(field: str, value: Any) -> float:
    """A finite number, 0 or more."""
    return _finite(field, value, float(value) >= 0, "0 or more")


def optional(reader: Reader) -> Reader:
    """What another reader takes, or null."""
    return lambda field, value: None if value is None else reader(field, value)


def listed(reader: Reader) -> Reader:
    """A list of what another reader takes."""

    def read(field: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{field}: {value!r}; allowed: a list")
        return tuple(reader(f"{field}:", entry) for entry in value)

    return read


def by_name(reader: Reader) -> Reader:
    """An object whose values another reader takes."""
    return lambda field, value: {
        str(name): reader(f"{field}: {name}", entry) for name, entry in value.items()
    }


def record(kind: type[RecordT]) -> Callable[[str, Any], RecordT]:
    """An object as the dataclass `kind` describes it, each of whose fields is `Annotated` with its
    reader. What has a default may be missing; keys that `kind` does not have are ignored.
    """

    # When first asked: annotations of `kind` may refer to what is not there yet.
    readers = functools.cache(functools.partial(_readers, kind))

    def read(field: str, value: Any) -> RecordT:
        inside = field if field.endswith(":") or not field else f"{field}."
        inside += " " if field.endswith(":") else ""
        given = {}
        for name, (reader, required) in readers().items():
            if required or name in value:
                given[name] = reader(f"{inside}{name}", value[name])
        return kind(**given)

    return read


def _readers(kind: type[Any]) -> dict[str, tuple[Reader, bool]]:
    """By field: its reader, and whether it must be there."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: (
            hints[field.name].__metadata__[0],
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(kind)
    }


def _finite(field: str, value: Any, allowed: bool, least: str) -> float:
    if not allowed or float(value) == float("inf"):
        raise ValueError(f"{field}: {value!r}; allowed: a finite number, {least}")
    return float(value)
