"""Readers of the load test's options, for argparse and for Locust's own command line."""

from argparse import ArgumentTypeError

from attnserve_proto.commands import values
from attnserve_proto.commands.values import target

__all__ = [
    "count",
    "names",
    "positive_float",
    "positive_int",
    "rate_span",
    "rates",
    "seconds",
    "seq_lens",
    "span",
    "target",
    "targets",
    "weighted_seq_lens",
]

_LONGEST = 1 << 20
_MOST_RATE = 1e6

positive_int = values.integer(1)
count = values.integer(0)
positive_float = values.number(0, 1e9, above=True)
seconds = values.some_seconds
names = values.listed(values.name)
seq_lens = values.ascending(values.integer(1, _LONGEST))
targets = values.listed(target)
_rate = values.number(0, _MOST_RATE, above=True)
rates = values.ascending(_rate)


def span(given: str) -> tuple[int, int]:
    """`N` or `N-N`, integers of 1 or more, the larger one last."""
    first, dash, last = given.partition("-")
    low = positive_int(first)
    high = positive_int(last) if dash else low
    if high < low:
        values.refuse(given, "N or N-N, the larger one last")
    return low, high


def rate_span(given: str) -> tuple[float, float]:
    """`LOW-HIGH`, numbers above 0, the larger one last."""
    first, _, last = given.partition("-")
    try:
        low, high = _rate(first), _rate(last)
    except ArgumentTypeError:
        low, high = 1.0, 0.0
    if high < low:
        values.refuse(given, "LOW-HIGH, numbers above 0, 1000000 at most, the larger one last")
    return low, high


def weighted_seq_lens(given: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """`N` or `N:WEIGHT` between commas: lengths, each once, and how often each comes."""
    length, weight = values.integer(1, _LONGEST), values.number(0, 1e6, above=True)
    found: dict[int, float] = {}
    for part in given.split(","):
        seq_len, colon, share = part.strip().partition(":")
        number = length(seq_len)
        if number in found:
            values.refuse(given, "each length once")
        found[number] = weight(share) if colon else 1.0
    ordered = sorted(found.items())
    return tuple(n for n, _ in ordered), tuple(w for _, w in ordered)
