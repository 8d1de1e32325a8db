"""The streaming calls that are open."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class OpenCall(Protocol):
    """A streaming call."""

    def drain(self) -> None:
        """Take no more requests; end the call once all that came have been answered."""


class Streams:
    """The streams that are open now, so that a drain can end them."""

    def __init__(self) -> None:
        self._open: set[OpenCall] = set()
        self._lock = threading.Lock()
        self._draining = False

    @contextmanager
    def having(self, call: OpenCall) -> Iterator[None]:
        """Count a call as open for the length of a `with` block."""
        with self._lock:
            self._open.add(call)
            draining = self._draining
        if draining:
            call.drain()
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(call)

    def drain(self) -> None:
        """End every stream as soon as what it is computing is answered."""
        with self._lock:
            self._draining = True
            calls = list(self._open)
        for call in calls:
            call.drain()
