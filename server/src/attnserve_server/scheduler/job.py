"""A request as the scheduler sees it: who waits for it, what it takes, what came of it."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from attnserve_server.errors import CancelledError, DeadlineError

W = TypeVar("W")
R = TypeVar("R")

HIGH, NORMAL, LOW = 1, 2, 3


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's stay in the scheduler; parts of one may share it.

    Attributes:
        deadline: `time.monotonic()` after which nobody waits for the answer; None: never.
        caller: who asks; callers that wait are served in turn.
        priority: HIGH, NORMAL or LOW; who waits with a higher one is served first.
    """

    deadline: float | None = None
    caller: str = ""
    priority: int = NORMAL
    _cancelled: bool = False
    _wakes: list[Callable[[], None]] = field(default_factory=list)

    def cancel(self) -> None:
        """The caller has gone: leave the queue. A computation under way runs to its end."""
        self._cancelled = True
        for wake in list(self._wakes):
            wake()

    def when_cancelled(self, wake: Callable[[], None]) -> None:
        """Call `wake` upon cancellation, or now if that has been."""
        self._wakes.append(wake)
        if self._cancelled:
            wake()

    def seconds_left(self) -> float | None:
        """Seconds until the deadline, from 0 to what Python can wait; None: there is none."""
        if self.deadline is None:
            return None
        return min(max(0.0, self.deadline - time.monotonic()), threading.TIMEOUT_MAX)

    def check(self) -> None:
        """Raise if nobody waits any more.

        Raises:
            CancelledError, DeadlineError: and why.
        """
        if self._cancelled:
            raise CancelledError("the caller cancelled the request")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineError("the deadline passed before the computation could start")

    def shorten(self, seconds: float) -> None:
        """Move the deadline to so many seconds from now, unless it is sooner; 0: leave it."""
        if seconds:
            own = time.monotonic() + seconds
            self.deadline = own if self.deadline is None else min(own, self.deadline)


@dataclass(frozen=True, slots=True)
class Job(Generic[W, R]):
    """A computation to schedule.

    Attributes:
        work: what `run` takes.
        run: computes several works together; one result for each, in order.
        kind: jobs of equal kind take alike long for each sequence, and may run together if
            `joinable`.
        sequences: how many `work` holds.
        tensor_bytes: of the tensors that joining copies.
        working_bytes: estimated memory that it takes while it runs.
    """

    work: W
    run: Callable[[Sequence[W]], Sequence[R]]
    kind: Hashable
    joinable: bool
    sequences: int
    tensor_bytes: int
    working_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R]):
    """What came of a job.

    Attributes:
        waited, computed: seconds.
        sequences: that ran together, other callers' included.
        leads: whether this is the first of those jobs: true once for each execution.
    """

    result: R
    waited: float
    computed: float
    sequences: int
    leads: bool


AnyJob = Job[Any, Any]
