"""Who may come in: requests are counted from their first byte to their answer.

Where Python moves the bytes, moving them can take longer than computing. So what a newcomer would
wait for is told by how many requests are inside, in whatever stage, and how fast they come out:
Little's law (J. D. C. Little, "A proof for the queuing formula L = lambda W", 1961).
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from attnserve_server.errors import ExhaustedError

# The weight of the newest interval in the running mean: batches come out all at once.
_NEWEST = 0.05

# So many may be inside whatever the estimate says: one is computed while another one comes in.
_ALWAYS = 4


class Gate:
    """Refuses requests, before they are read, that would wait too long.

    Args:
        max_seconds: the longest expected wait.
    """

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._inside = 0
        # Seconds from one answer to the next while others were inside.
        self._interval = 0.0
        self._last_left: float | None = None
        self._lock = threading.Lock()

    @property
    def inside(self) -> int:
        """Requests that are inside."""
        return self._inside

    def enter(self) -> None:
        """Count a request in; `leave` must follow.

        Raises:
            ExhaustedError: it would wait too long.
        """
        with self._lock:
            expected = self._inside * self._interval
            if self._inside >= _ALWAYS and expected > self._max_seconds:
                raise ExhaustedError(
                    f"requests inside: {self._inside}, which would take about "
                    f"{expected * 1e3:.0f} ms; allowed: {self._max_seconds * 1e3:.0f} ms "
                    "(--max-queue-ms)",
                    retry_after=max(expected - self._max_seconds, 0.001),
                )
            self._inside += 1

    def leave(self) -> None:
        """Count a request out."""
        with self._lock:
            now = time.monotonic()
            if self._last_left is not None:
                self._interval += _NEWEST * (now - self._last_left - self._interval)
            self._inside -= 1
            # While nobody is inside no time is spent on anybody.
            self._last_left = now if self._inside else None

    @contextmanager
    def inside_of(self) -> Iterator[None]:
        """Be inside for the length of a `with` block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()
