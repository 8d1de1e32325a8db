"""Readers of options, for argparse: each gives a value, or says what was given and is allowed."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn, TypeVar

from attnserve_proto.manifest import MOST_VERSION, NAME

HIGHEST = 2**31 - 1
PORT = 65_535
# Three years; what takes longer is no mistake in its last digit.
MOST_SECONDS = 1e8

_MOST_TEXT, _MOST_TITLE, _MOST_PATH, _SHOWN = 1 << 24, 1000, 4095, 60
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252})")
_IPV6 = re.compile(r"\[[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?\]")
_SCHEMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "file:///")

Value = TypeVar("Value")


def refuse(given: str, allowed: str) -> NoReturn:
    """Say what was given, shortened, and what is allowed.

    Raises:
        ArgumentTypeError: always.
    """
    shown = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}..."
    raise ArgumentTypeError(f"given {shown!r}; allowed: {allowed}")


def integer(lowest: int, highest: int = HIGHEST) -> Callable[[str], int]:
    """Reads an integer of a range, both ends included."""

    def read(given: str) -> int:
        if not _INTEGER.fullmatch(given) or not lowest <= int(given) <= highest:
            refuse(given, f"an integer, {lowest}..{highest}")
        return int(given)

    return read


def number(
    lowest: float, highest: float, *, unit: str = "", above: bool = False
) -> Callable[[str], float]:
    """Reads a finite number of a range; with `above`, one that is more than `lowest`."""

    def read(given: str) -> float:
        value = float(given) if _NUMBER.fullmatch(given) else math.nan
        if not lowest <= value <= highest or (above and value == lowest):
            at_least = f"above {lowest:.15g}" if above else f"{lowest:.15g} or more"
            refuse(given, f"a number{unit and f' of {unit}'}, {at_least}, {highest:.15g} at most")
        return value

    return read


def seconds(given: str) -> float:
    """A time of 0 or more."""
    return number(0, MOST_SECONDS, unit="seconds")(given)


def some_seconds(given: str) -> float:
    """A time above 0."""
    return number(0, MOST_SECONDS, unit="seconds", above=True)(given)


def listed(read: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """Reads values between commas: at least one, in their order, each once."""

    def read_all(given: str) -> tuple[Value, ...]:
        parts = [part.strip() for part in given.split(",")]
        if not all(parts):
            refuse(given, "values between commas, none of them empty")
        return tuple(dict.fromkeys(map(read, parts)))

    return read_all


def ascending(read: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """The same in ascending order."""

    def read_all(given: str) -> tuple[Value, ...]:
        return tuple(sorted(listed(read)(given)))  # type: ignore[type-var]

    return read_all


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """Reads one of some names."""

    def read(given: str) -> str:
        if given not in names:
            refuse(given, ", ".join(names))
        return given

    return read


def name(given: str) -> str:
    """The name of a model or variant."""
    if not NAME.fullmatch(given):
        refuse(given, "1 to 128 letters, digits, '_', '.', '-', the first a letter or digit")
    return given


def version(given: str) -> int:
    """The version of a model."""
    return integer(1, MOST_VERSION)(given)


def text(given: str) -> str:
    """A text to send: not empty, and UTF-8."""
    if not given or len(given) > _MOST_TEXT or not _is_utf8(given):
        refuse(given, f"a text in UTF-8, 1..{_MOST_TEXT} characters")
    return given


def title(given: str) -> str:
    """A text of one line for people to read; it may be empty."""
    if len(given) > _MOST_TITLE or not _is_utf8(given) or "\n" in given:
        refuse(given, f"one line in UTF-8, {_MOST_TITLE} characters at most")
    return given


def path(given: str) -> Path:
    """A path of the file system."""
    # The kernel takes names of 255 bytes, and no byte of 0.
    longest = max(map(len, given.encode("utf-8", "surrogateescape").split(b"/")))
    if not given.strip() or "\0" in given or len(given) > _MOST_PATH or longest > 255:
        refuse(given, "a path, each name of 255 bytes at most")
    return Path(given)


def target(given: str) -> str:
    """Where a gRPC server is; a scheme in front (`grpc://`, `http://`) is dropped."""
    bare = given.strip().rstrip("/")
    if bare.startswith(_SCHEMES) and len(bare) <= _MOST_PATH and not bare.endswith(":"):
        return bare
    bare = re.sub(r"^(grpc|grpcs|http|https)://", "", bare)
    host, _, port = bare.rpartition(":")
    known = _HOST.fullmatch(host) or _IPV6.fullmatch(host)
    if not known or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) <= PORT:
        refuse(given, f"HOST:PORT, [IPV6]:PORT, unix:PATH or file:///PATH, the port 1..{PORT}")
    return bare


def _is_utf8(given: str) -> bool:
    try:
        given.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False
    return "\0" not in given
