"""A bounded number of places to run in, given out in order of arrival.

A request runs on the thread that brought it: where a place is free, nothing is handed over and
nothing waits.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from attnserve_server.errors import (
    CancelledError,
    DeadlineError,
    DrainingError,
    ExhaustedError,
)

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's stay in the scheduler.

    Attributes:
        deadline: `time.monotonic()` after which nobody waits for the answer; None: never.
    """

    deadline: float | None = None
    _called: threading.Event = field(default_factory=threading.Event)
    _cancelled: bool = False

    def cancel(self) -> None:
        """The caller has gone: leave the queue. A computation under way runs to its end."""
        self._cancelled = True
        self._called.set()


class Places:
    """The scheduler.

    Args:
        count: computations that may run at once.
        max_queue: requests that may wait; one more is refused.
    """

    def __init__(self, count: int, max_queue: int) -> None:
        self._free = count
        self._max_queue = max_queue
        self._queue: deque[Ticket] = deque()
        self._lock = threading.Lock()
        self._draining = False

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    def drain(self) -> None:
        """Refuse new requests; those that wait still run."""
        self._draining = True

    def run(self, ticket: Ticket, work: Callable[[], T]) -> tuple[T, float]:
        """Wait for a place, then run `work` on this thread.

        Returns:
            What `work` returns, and the seconds that it waited.

        Raises:
            DrainingError, ExhaustedError: refused at once.
            DeadlineError, CancelledError: given up before it ran; it will not run.
        """
        arrived = time.monotonic()
        self._enter(ticket)
        waited = time.monotonic() - arrived
        try:
            return work(), waited
        finally:
            self._leave()

    def _enter(self, ticket: Ticket) -> None:
        with self._lock:
            _check(ticket)
            if self._draining:
                raise DrainingError("the server is shutting down; try another one")
            if self._free and not self._queue:
                self._free -= 1
                return
            if len(self._queue) >= self._max_queue:
                raise ExhaustedError(
                    f"queue: {len(self._queue)} requests are waiting; allowed: {self._max_queue}"
                )
            self._queue.append(ticket)
        left = None if ticket.deadline is None else max(0.0, ticket.deadline - time.monotonic())
        ticket._called.wait(left)
        with self._lock:
            if ticket in self._queue:
                # Not called: the deadline passed, or the caller went.
                self._queue.remove(ticket)
                _check(ticket, given_up=True)
            try:
                _check(ticket)
            except Exception:
                self._pass_on()
                raise

    def _leave(self) -> None:
        with self._lock:
            self._pass_on()

    def _pass_on(self) -> None:
        """Give this place to the first who waits. The lock is held."""
        if self._queue:
            self._queue.popleft()._called.set()
        else:
            self._free += 1


def _check(ticket: Ticket, *, given_up: bool = False) -> None:
    if ticket._cancelled:
        raise CancelledError("the caller cancelled the request")
    expired = ticket.deadline is not None and time.monotonic() >= ticket.deadline
    if expired or given_up:
        raise DeadlineError("the deadline passed before the computation could start")
