"""What became of the requests of one load: one row for each, and one for each further token."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnserve_loadtest.load.plan import Load

ANSWERED, REFUSED, FAILED, CANCELLED = range(4)
OUTCOMES = ("answered", "refused", "failed", "cancelled")

# One request. Times are seconds from the end of the warm-up; NaN: it never came to that. `length`:
# seq_len, or tokens of the prompt. `tokens`: asked to be generated; 0 of a request with one answer.
# `compute`, `queue`: seconds, as the server says them of the first output.
ROW = np.dtype(
    [
        ("due", "f8"),
        ("sent", "f8"),
        ("first", "f8"),
        ("done", "f8"),
        ("compute", "f8"),
        ("queue", "f8"),
        ("outcome", "i1"),
        ("length", "i4"),
        ("tokens", "i4"),
        ("target", "i2"),
    ]
)
# One token after a session's first output. `row`: of its session. `at`: when it was there. `took`:
# seconds since the one before, without the user's rest. `context`: tokens of the session with it.
TOKEN = np.dtype(
    [("row", "i8"), ("at", "f8"), ("took", "f8"), ("context", "i4"), ("compute", "f8")]
)

Rows = NDArray[Any]


@dataclass(frozen=True)
class Measured:
    """What became of the requests of one load.

    Attributes:
        load: what was asked for.
        rows: [N] of `ROW`, by due time.
        tokens: [T] of `TOKEN`.
        failure: what the first failed request said.
        client_cpu, server_cpu: cores in use over the counted time.
        memory: (seconds, bytes resident in the server) over the counted time.
    """

    load: Load
    rows: Rows
    tokens: Rows = field(default_factory=lambda: np.empty(0, TOKEN))
    failure: str = ""
    client_cpu: float = 0.0
    server_cpu: float = 0.0
    memory: tuple[tuple[float, int], ...] = field(default=())

    @property
    def throughput(self) -> float:
        """Answers per second."""
        done = self.rows["done"]
        ended = (done >= 0) & (done < self.load.seconds)
        return float(np.sum(ended & (self.rows["outcome"] == ANSWERED))) / self.load.seconds

    def goodput(self, within: float) -> float:
        """Answers per second to requests due in the counted time, `within` seconds of that."""
        answered = self.due_rows[self.due_rows["outcome"] == ANSWERED]
        good = answered["done"] - answered["due"] <= within
        return float(np.sum(good)) / self.load.seconds

    def count(self, outcome: int) -> int:
        """Requests due in the counted time that ended so."""
        return int(np.sum(self.due_rows["outcome"] == outcome))

    def latency_ms(self, share: float) -> float:
        """Percentile of answers, from the time they were due; NaN if there are none."""
        return self._quantile_ms(ANSWERED, "done", "due", share)

    def refusal_ms(self, share: float) -> float:
        """Percentile of refusals, from the time they were sent; NaN if there are none."""
        return self._quantile_ms(REFUSED, "done", "sent", share)

    def late_ms(self, share: float) -> float:
        """Percentile of how late the clients sent; beyond a few ms, they cannot keep up."""
        return quantile_ms(self.due_rows["sent"] - self.due_rows["due"], share)

    @property
    def due_rows(self) -> Rows:
        """The requests that were due in the counted time."""
        due = self.rows["due"]
        return self.rows[(due >= 0) & (due < self.load.seconds)]

    def _quantile_ms(self, outcome: int, end: str, start: str, share: float) -> float:
        rows = self.due_rows[self.due_rows["outcome"] == outcome]
        return quantile_ms(rows[end] - rows[start], share)


def quantile_ms(seconds: NDArray[np.float64], share: float) -> float:
    """A percentile in milliseconds; NaN of nothing."""
    return float(np.quantile(seconds, share)) * 1e3 if len(seconds) else float("nan")
