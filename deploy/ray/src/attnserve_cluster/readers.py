"""Readers of options, beside those that all commands have."""

import math
import re
from argparse import ArgumentTypeError

from attnserve_proto.commands import values

from attnserve_cluster.plan import Ports
from attnserve_cluster.scaling import Bounds

MOST_SERVERS = 10_000
_SPAN = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_WORDS = ("auto",)
_CLIENT = "ray://"
_ADDRESSES = f"auto, HOST:PORT or {_CLIENT}HOST:PORT, the port 1..{values.PORT}"


def bounds(given: str) -> Bounds:
    """Reads how many servers there are: `N`, or `LEAST-MOST`."""
    return Bounds(*_span(given, MOST_SERVERS))


def ports(given: str) -> Ports:
    """Reads a range of ports: `LOW-HIGH`, two at the least."""
    low, high = _span(given, values.PORT)
    if low == high:
        values.refuse(given, f"LOW-HIGH, two ports or more of 1..{values.PORT}")
    return Ports(low, high)


def share(given: str) -> float:
    """Reads what an actor may take of processors or GPUs: a part of one, or whole ones."""
    value = values.number(0, 10_000)(given)
    if value > 1 and value != math.floor(value):
        values.refuse(given, "a number of 0..1, or an integer up to 10000")
    return value


def name(given: str) -> str:
    """Reads the name of a cluster."""
    if not _NAME.fullmatch(given):
        values.refuse(given, "1 to 63 of a-z, 0-9 and '-', the first and last no '-'")
    return given


def address(given: str) -> str:
    """Reads where a Ray cluster is."""
    if given in _WORDS:
        return given
    bare = given.removeprefix(_CLIENT)
    try:
        read = values.target(bare)
    except ArgumentTypeError:
        values.refuse(given, _ADDRESSES)
    if read != bare or not re.search(r":[0-9]{1,5}$", read) or "/" in read:
        values.refuse(given, _ADDRESSES)
    return given


def _span(given: str, highest: int) -> tuple[int, int]:
    match = _SPAN.fullmatch(given)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high <= highest:
        values.refuse(given, f"N or N-N of 1..{highest}, the larger one last")
    return low, high
