"""Checks of what callers give: an error names the argument, what was given, what is allowed."""

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# What the wire's integers hold.
UINT32, UINT64, INT64 = (1 << 32) - 1, (1 << 64) - 1, (1 << 63) - 1

# A longer wait than this is one without end: grpc's deadlines overflow.
_FOREVER_SECONDS = 1e9
# A lease travels as microseconds.
_LONGEST_LEASE_SECONDS = 1e12

_FLAGS = (bool, np.bool_)  # which Python counts among the integers
_NUMBERS = (int, float, np.integer, np.floating)


def refused(name: str, value: Any, allowed: str) -> ValueError:
    """A value that is out of range."""
    return ValueError(f"{name}: given {_shown(value)}; allowed: {allowed}")


def mistyped(name: str, value: Any, allowed: str) -> TypeError:
    """A value of a wrong type."""
    return TypeError(
        f"{name}: given {_shown(value)}, of type {type(value).__name__}; allowed: {allowed}"
    )


def integer(name: str, value: Any, least: int = 0, most: int = UINT32, also: str = "") -> int:
    """An integer within bounds, of Python or NumPy; `also` is said to be allowed besides."""
    if type(value) is int and least <= value <= most:
        return value
    allowed = f"an integer, {_bounds(least, most)}{also}"
    if isinstance(value, _FLAGS):
        raise mistyped(name, value, allowed)
    try:
        given = operator.index(value)
    except TypeError:
        raise mistyped(name, value, allowed) from None
    if not least <= given <= most:
        raise refused(name, value, allowed)
    return given


def integers(
    name: str, values: Any, least: int = 0, most: int = UINT32, also: str = ""
) -> list[int]:
    """A list of integers within bounds."""
    allowed = f"a list of integers, {_bounds(least, most)}{also}"
    return [
        integer(f"{name}[{index}]", value, least, most)
        for index, value in enumerate(items(name, values, allowed))
    ]


def items(name: str, values: Any, allowed: str) -> list[Any]:
    """What a list, a tuple, an array or another iterable holds: neither text nor a mapping."""
    if isinstance(values, str | bytes | bytearray | Mapping):
        raise mistyped(name, values, allowed)
    try:
        return list(values)
    except TypeError:
        raise mistyped(name, values, allowed) from None


def number(name: str, value: Any, least: float = -math.inf, also: str = "") -> float:
    """A finite number."""
    allowed = f"a number{'' if least == -math.inf else f' from {least:g} on'}{also}"
    if not _is_number(value):
        raise mistyped(name, value, allowed)
    try:
        given = float(value)
    except OverflowError:
        raise refused(name, value, allowed) from None
    if not math.isfinite(given) or given < least:
        raise refused(name, value, allowed)
    return given


def flag(name: str, value: Any) -> bool:
    """True or False, of Python or NumPy."""
    if not isinstance(value, _FLAGS):
        raise mistyped(name, value, "True or False")
    return bool(value)


def text(name: str, value: Any, *, empty: bool = True) -> str:
    """A text that can be sent."""
    if not isinstance(value, str):
        raise mistyped(name, value, "a text")
    if not value and not empty:
        raise refused(name, value, "a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refused(name, value, "a text of Unicode characters") from None
    return value


def version(name: str, value: Any) -> str:
    """A model's version, as text; empty: the highest."""
    if isinstance(value, str):
        return text(name, value)
    return str(integer(name, value, 0, UINT64, ", or a text; empty: the highest"))


def seconds(name: str, value: Any) -> float | None:
    """How long to wait; None, or infinity: without end."""
    if value is None:
        return None
    allowed = "seconds above 0, or None: without end"
    if not _is_number(value):
        raise mistyped(name, value, allowed)
    if not value > 0:
        raise refused(name, value, allowed)
    return None if value > _FOREVER_SECONDS else float(value)


def microseconds(name: str, value: Any) -> int:
    """A lease in seconds, as it travels; None: the server's default, 0."""
    if value is None:
        return 0
    allowed = "seconds from 1e-6 to 1e12, or None: the server's default"
    if not _is_number(value):
        raise mistyped(name, value, allowed)
    if not 1e-6 <= value <= _LONGEST_LEASE_SECONDS:
        raise refused(name, value, allowed)
    return round(float(value) * 1e6)


def kind(name: str, value: Any, of: type | tuple[type, ...], allowed: str) -> None:
    """What is of a type, or of one of several."""
    if not isinstance(value, of):
        raise mistyped(name, value, allowed)


def one_of(name: str, value: Any, choices: Iterable[Any], also: str = "") -> None:
    """One of some texts."""
    known = [each for each in choices if each is not None]
    allowed = ", ".join(map(repr, known)) + also
    if value is not None and not isinstance(value, str):
        raise mistyped(name, value, allowed)
    if value not in choices:
        raise refused(name, value, allowed)


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, _FLAGS)


def _bounds(least: int, most: int) -> str:
    return f"{least} or more" if most in (UINT32, UINT64, INT64) else f"{least} to {most}"


def _shown(value: Any) -> str:
    """A value, shortened if it is long."""
    try:
        shown = repr(value)
    except Exception:  # of a foreign type, or an integer of too many digits
        return f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."
