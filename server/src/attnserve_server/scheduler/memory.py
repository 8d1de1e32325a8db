"""Admission by memory: a fixed number of bytes, lent to requests while they are in flight."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from attnserve_server.errors import ExhaustedError


class ByteBudget:
    """Counts the bytes that requests in flight hold.

    Args:
        total: bytes that may be lent at once.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._lent = 0
        self._lock = threading.Lock()

    @property
    def lent(self) -> int:
        """Bytes lent now."""
        return self._lent

    def take(self, size: int) -> None:
        """Lend `size` bytes.

        Raises:
            ExhaustedError: so many are not left.
        """
        with self._lock:
            if self._lent + size > self._total:
                raise ExhaustedError(
                    f"bytes in flight: {self._lent} are in use and {size} more were asked for; "
                    f"allowed: {self._total}"
                )
            self._lent += size

    def give_back(self, size: int) -> None:
        """Take `size` bytes back."""
        with self._lock:
            self._lent -= size

    @contextmanager
    def lending(self, size: int) -> Iterator[None]:
        """Lend `size` bytes for the length of a `with` block."""
        self.take(size)
        try:
            yield
        finally:
            self.give_back(size)
