"""A streamed request whose first heads are computed while the others are still arriving."""

import threading
from collections.abc import Mapping

from attnserve_server import validation
from attnserve_server.dtypes import Array
from attnserve_server.engine import parts
from attnserve_server.engine.work import AttendWork
from attnserve_server.errors import RequestError
from attnserve_server.validation import AttendPlan
from attnserve_server.wire.answers import Clock


class EarlyHeads:
    """Says which heads can be computed, and gathers what their computations took.

    Args:
        plan: the request.
        work: of all heads, its output with a place of its own.
    """

    def __init__(self, plan: AttendPlan, work: AttendWork) -> None:
        self.work = work
        self._num_kv_heads = plan.model.manifest.attention.num_kv_heads
        self._head_bytes = {
            name: plan.specs[name].byte_size // self._num_kv_heads
            for name in ("query", "key", "value")
        }
        self._least = max(1, -(-self._num_kv_heads // parts.MOST_PARTS))
        self._taken = 0
        self._unfinished = 0
        self._waited = self._computed = 0.0
        self._failed = False
        self._ended = 0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, plan: AttendPlan, arrays: Mapping[str, Array]) -> "EarlyHeads | None":
        """For a request that begins to arrive; None if it is better computed as a whole.

        Args:
            plan: the request.
            arrays: all its tensors, those in chunks yet to be filled.
        """
        chunked = all(
            name in plan.specs and plan.specs[name].chunked for name in ("query", "key", "value")
        )
        if not chunked or plan.query_factor != 1.0 or plan.output_region is not None:
            return None
        if any(spec.chunked for name, spec in plan.specs.items() if name == "key_lengths"):
            return None
        (output,) = plan.results if len(plan.results) == 1 else (None,)
        if output is None or output.name != "output":
            return None
        try:
            work = validation.complete(plan, arrays, {"output": output.empty()})
        except RequestError:
            return None  # it will be said once the request has arrived
        return cls(plan, work) if parts.divisible(work) else None

    @property
    def begun(self) -> bool:
        """Whether any heads were taken."""
        return self._taken > 0

    def take(self, received: Mapping[str, int]) -> AttendWork | None:
        """The next heads to compute, if enough have come.

        Args:
            received: bytes that have come, by tensor.
        """
        there = min(received[name] // size for name, size in self._head_bytes.items())
        count = there - self._taken
        last = there == self._num_kv_heads
        if self._failed or not count or (count < self._least and not last):
            return None
        with self._lock:
            first, self._taken = self._taken, there
            self._unfinished += 1
        return parts.part(self.work, first, there, counted=last)

    def finished(self, clock: Clock) -> bool:
        """Count a part that has been computed; true for the one that makes the whole."""
        with self._lock:
            self._unfinished -= 1
            self._waited += clock.waited
            self._computed += clock.computed
            whole = self._unfinished == 0 and self._taken == self._num_kv_heads
            return whole and not self._failed

    def failed(self) -> bool:
        """Count a part that failed, or the arrival itself; true for the first failure."""
        with self._lock:
            first = not self._failed
            self._failed = True
            return first

    def settle(self) -> bool:
        """Say that the request has arrived, or that its computation has ended; true for the second
        of the two, after which nothing uses its memory.
        """
        with self._lock:
            self._ended += 1
            return self._ended == 2

    def forfeit(self) -> None:
        """Its memory has been given back: `settle` shall not say so again."""
        with self._lock:
            self._ended = 2

    def clock(self, last: Clock) -> Clock:
        """When what happened to the whole, of which `last` ended last."""
        return Clock(last.arrived, last.validated, self._waited, self._computed, 1, True)
