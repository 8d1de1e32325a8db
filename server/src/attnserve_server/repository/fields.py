"""Values of a manifest, checked one by one: ValueError names the field and what is allowed."""

from typing import Any

MASKS = ("bidirectional", "causal", "cross")


def one_of(field: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of a few texts."""
    if value not in allowed:
        raise ValueError(f"{field}: {value!r}; allowed: {', '.join(allowed)}")
    return str(value)


def integer(field: str, value: Any, lowest: int = 1, highest: int = 2**31 - 1) -> int:
    """An integer within bounds; numbers that only equal one are none."""
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"{field}: {value!r}; allowed: an integer, {lowest}..{highest}")
    return value


def optional_integer(
    field: str, value: Any, lowest: int = 1, highest: int = 2**31 - 1
) -> int | None:
    """An integer within bounds, or null."""
    return None if value is None else integer(field, value, lowest, highest)


def number(field: str, value: Any, *, above_zero: bool) -> float:
    """A finite number, above 0 or not below."""
    number = float(value)
    if not (number > 0 if above_zero else number >= 0) or number == float("inf"):
        least = "above 0" if above_zero else "0 or more"
        raise ValueError(f"{field}: {value!r}; allowed: a finite number, {least}")
    return number


def yes_or_no(field: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{field}: {value!r}; allowed: true, false")
    return value
