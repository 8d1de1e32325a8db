"""Lets Locust users run one block of requests at a time, and waits until its last answer."""

from attnserve_loadtest import gevent_grpc  # noqa: F401, I001  (patches; comes first)

import time

from gevent.event import Event

from attnserve_loadtest.schedule import Block


class Gate:
    """One block is open at a time; users take turns from it, the runner waits for its end."""

    def __init__(self) -> None:
        self._block: Block | None = None
        self._left = 0
        self._deadline = 0.0
        self._in_flight = 0
        self._opened = Event()
        self._finished = Event()
        self._closed = False

    def run(self, block: Block) -> float:
        """Open a block and wait until its requests are answered.

        Returns:
            Seconds from the opening to the last answer.
        """
        start = time.perf_counter()
        self._block = block
        self._left = block.requests or 0
        # A block by time makes one request at least, however slow the server is.
        self._deadline = start + (block.seconds or 0.0)
        if block.requests is None:
            self._left = 1
        self._finished.clear()
        if self._closed:
            return 0.0
        self._opened.set()
        self._finished.wait()
        return time.perf_counter() - start

    def take(self) -> Block | None:
        """Wait for a turn; the block it is of, or None if the gate is closed."""
        while not self._closed:
            if self._block is not None and self._any_left():
                self._left -= 1
                self._in_flight += 1
                return self._block
            self._opened.clear()
            self._opened.wait()
        return None

    def give_back(self) -> None:
        """A turn taken is over."""
        self._in_flight -= 1
        if self._in_flight == 0 and (self._closed or not self._any_left()):
            self._block = None
            self._finished.set()

    def close(self) -> None:
        """No more turns; `run` returns now, whatever is in flight."""
        self._closed = True
        self._finished.set()
        self._opened.set()

    def _any_left(self) -> bool:
        return self._left > 0 or time.perf_counter() < self._deadline
