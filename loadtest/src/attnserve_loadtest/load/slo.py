"""Bounds on latency that an answer must keep to be good: `p99=50ms`, `first:p95=200ms`."""

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from attnserve_proto.commands import values
from numpy.typing import NDArray

from attnserve_loadtest.load.measured import ANSWERED, CANCELLED, Measured, Rows

Quantity = Literal["latency", "first", "between"]

_ALLOWED = (
    "[latency:|first:|between:]pN=TIME, several between commas, N above 0 and below 100, TIME as "
    "50ms, 0.2s or 800us, 1 h at most"
)
_BOUND = re.compile(
    r"(?:(latency|first|between):)?p([0-9]{1,2}(?:\.[0-9]{1,3})?)=([0-9]{1,9}(?:\.[0-9]{1,6})?)"
    r"(us|ms|s)"
)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_MOST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Bound:
    """A share of something that takes no longer than a time.

    Attributes:
        quantity: `latency`, from due to the whole answer, of requests that have one answer;
            `first`, from due to the first output, of these and of sessions; `between`, from one
            token of a session to the next.
        share: of them, above 0 and below 1.
        seconds: that they may take.
    """

    quantity: Quantity
    share: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.quantity}:p{self.share * 100:g}={self.seconds * 1e3:g}ms"

    def observed(self, measured: Measured) -> float:
        """The percentile, seconds; NaN of nothing.

        Refused and failed requests count as what never comes; those that were given up, not at all.
        """
        found = times(measured, self.quantity)
        if not len(found):
            return math.nan
        return percentile(found, self.share)

    def is_met(self, measured: Measured) -> bool:
        """Whether there was anything, and enough of it came in time."""
        return self.observed(measured) <= self.seconds


def read_slo(given: str) -> tuple[Bound, ...]:
    """Read bounds between commas, for argparse; each quantity and share once.

    Raises:
        ArgumentTypeError: they are none.
    """
    bounds: dict[tuple[str, float], Bound] = {}
    for part in given.split(","):
        found = _BOUND.fullmatch(part.strip())
        if found is None:
            values.refuse(given, _ALLOWED)
        share, seconds = float(found[2]) / 100, float(found[3]) * _UNITS[found[4]]
        quantity: Quantity = found[1] or "latency"  # type: ignore[assignment]
        if share <= 0 or not 0 < seconds <= _MOST_SECONDS or (quantity, share) in bounds:
            values.refuse(given, _ALLOWED)
        bounds[quantity, share] = Bound(quantity, share, seconds)
    return tuple(bounds.values())


def times(measured: Measured, quantity: Quantity, rows: Rows | None = None) -> NDArray[np.float64]:
    """Seconds of a quantity, one for each request (token) due in the counted time.

    Args:
        measured: a load.
        quantity: what of it.
        rows: only these of its requests, for `latency` and `first`.

    Returns:
        [N] float64; infinity for what never came.
    """
    rows = measured.due_rows if rows is None else rows
    rows = rows[rows["outcome"] != CANCELLED]
    answered = rows["outcome"] == ANSWERED
    if quantity == "between":
        lost = int(np.sum(~answered & (rows["tokens"] > 0)))
        return np.concatenate([_token_times(measured), np.full(lost, math.inf)])
    if quantity == "latency":
        single = rows["tokens"] == 0
        rows, answered = rows[single], answered[single]
    end = rows["done"] if quantity == "latency" else rows["first"]
    took: NDArray[np.float64] = np.where(answered, end - rows["due"], math.inf)
    return took


def percentile(seconds: NDArray[np.float64], share: float) -> float:
    """The least of the values that this share of them does not exceed: never between two, for
    infinity less infinity is no number.
    """
    return float(np.quantile(seconds, share, method="inverted_cdf"))


def good(measured: Measured, bounds: tuple[Bound, ...]) -> NDArray[np.bool_]:
    """Which of the requests due in the counted time were answered within all bounds.

    A session is within a bound on `between` if that share of its own tokens is.

    Returns:
        [N] bool, of `measured.due_rows`.
    """
    rows = measured.due_rows
    found: NDArray[np.bool_] = rows["outcome"] == ANSWERED
    is_session = rows["tokens"] > 0
    for bound in bounds:
        if bound.quantity == "first":
            found = found & (rows["first"] - rows["due"] <= bound.seconds)
        elif bound.quantity == "latency":
            found = found & (is_session | (rows["done"] - rows["due"] <= bound.seconds))
        else:
            found = found & (~is_session | _tokens_within(measured, bound))
    return found


def _token_times(measured: Measured) -> NDArray[np.float64]:
    """Of all tokens whose session was due in the counted time."""
    due = measured.rows["due"][measured.tokens["row"]]
    counted = (due >= 0) & (due < measured.load.seconds)
    took: NDArray[np.float64] = measured.tokens["took"][counted]
    return took


def _tokens_within(measured: Measured, bound: Bound) -> NDArray[np.bool_]:
    """Of each request due in the counted time: whether enough of its own tokens were in time."""
    rows, tokens = measured.rows, measured.tokens
    late = np.bincount(tokens["row"], weights=tokens["took"] > bound.seconds, minlength=len(rows))
    count = np.bincount(tokens["row"], minlength=len(rows))
    due = (rows["due"] >= 0) & (rows["due"] < measured.load.seconds)
    within: NDArray[np.bool_] = (late <= (1 - bound.share) * count + 1e-9)[due]
    return within
