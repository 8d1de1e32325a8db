"""Who may come in: requests are counted from the first byte that is read of them to their answer.

Where Python moves the bytes, moving them can take longer than computing, and moving many requests
at once takes longer than one after another. So only so many are inside as keep the server busy for
a moment; the others wait outside, unread, and their callers are held back by HTTP/2's flow control.
What a newcomer would wait for is told by how many are before it and how fast answers come out:
Little's law (J. D. C. Little, "A proof for the queuing formula L = lambda W", 1961).
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from attnserve_server.errors import DeadlineError, ExhaustedError
from attnserve_server.scheduler.job import Ticket

# The least weight of the newest interval in the running mean: batches come out all at once.
_NEWEST = 0.05

# Seconds of work that may be inside, and requests that may be, whatever the estimate says.
_INSIDE_SECONDS = 0.05
_ALWAYS = 4


@dataclass(eq=False, slots=True)
class _Waiter:
    caller: str
    entered: bool = False
    called: threading.Event = field(default_factory=threading.Event)


class Gate:
    """Lets requests in, has them wait, or refuses them. Callers who wait come in in turn.

    Args:
        max_seconds: the longest expected wait; a request beyond it is refused, unless fewer than
        patience: requests are before it. Callers of long contexts expect to wait for a few.
    """

    def __init__(self, max_seconds: float, patience: int = 32) -> None:
        self._max_seconds = max_seconds
        self._patience = patience
        self._inside = 0
        self._waiting = 0
        self._waiters: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        # Seconds from one answer to the next while others were inside; 0: not known yet.
        self._interval = 0.0
        self._observed = 0
        self._last_left: float | None = None
        self._lock = threading.Lock()

    @property
    def inside(self) -> int:
        """Requests that are inside."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Requests that wait outside."""
        return self._waiting

    def enter(self, ticket: Callable[[], Ticket]) -> None:
        """Count a request in, perhaps after a wait; `leave` must follow.

        Args:
            ticket: gives the request's, if it must wait.

        Raises:
            ExhaustedError: it would wait too long.
            DeadlineError, CancelledError: nobody waits for it any more.
        """
        with self._lock:
            if not self._waiting and self._has_room():
                self._inside += 1
                return
            self._refuse_long_wait()
        own = ticket()
        waiter = _Waiter(own.caller)
        with self._lock:
            self._waiters.setdefault(own.caller, deque()).append(waiter)
            self._waiting += 1
            self._let_in()
        own.when_cancelled(waiter.called.set)
        waiter.called.wait(own.seconds_left())
        with self._lock:
            if waiter.entered:
                return
            self._forget(waiter)
        own.check()
        raise DeadlineError("the deadline passed before the request could be read")

    def leave(self) -> None:
        """Count a request out."""
        with self._lock:
            now = time.monotonic()
            if self._last_left is not None:
                self._observed += 1
                weight = max(_NEWEST, 1 / self._observed)
                self._interval += weight * (now - self._last_left - self._interval)
            self._inside -= 1
            self._let_in()
            # While nobody is inside no time is spent on anybody.
            self._last_left = now if self._inside else None

    @contextmanager
    def inside_of(self, ticket: Callable[[], Ticket]) -> Iterator[None]:
        """Be inside for the length of a `with` block; as `enter`."""
        self.enter(ticket)
        try:
            yield
        finally:
            self.leave()

    def _has_room(self) -> bool:
        inside = self._inside
        return inside < _ALWAYS or inside * self._interval < _INSIDE_SECONDS

    def _refuse_long_wait(self) -> None:
        before = self._inside + self._waiting
        expected = before * self._interval
        if before >= self._patience and expected > self._max_seconds:
            raise ExhaustedError(
                f"requests: {before} are before this one and would take about "
                f"{expected * 1e3:.0f} ms; allowed: {self._max_seconds * 1e3:.0f} ms "
                "(--max-queue-ms)",
                retry_after=max(expected - self._max_seconds, 0.001),
            )

    def _let_in(self) -> None:
        """Let those in for whom there is room now. The lock is held."""
        while self._waiting and self._has_room():
            caller, waiters = self._waiters.popitem(last=False)
            waiter = waiters.popleft()
            if waiters:
                self._waiters[caller] = waiters  # behind the other callers
            self._waiting -= 1
            self._inside += 1
            waiter.entered = True
            waiter.called.set()

    def _forget(self, waiter: _Waiter) -> None:
        waiters = self._waiters[waiter.caller]
        waiters.remove(waiter)
        self._waiting -= 1
        if not waiters:
            del self._waiters[waiter.caller]
