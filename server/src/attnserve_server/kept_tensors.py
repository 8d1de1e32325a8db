"""Tensors that stay in the server between requests, each for as long as its lease lasts."""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from attnserve_server.dtypes import Array
from attnserve_server.errors import ExhaustedError, InvalidRequestError, NotFoundError

_MOST_NAMED = 80  # characters of a wrong handle that are repeated to the caller


@dataclass(slots=True)
class Kept:
    """A tensor that is kept.

    Attributes:
        lease: seconds that it is kept after its last use.
        until: `time.monotonic()` when it goes.
    """

    handle: str
    array: Array
    lease: float
    until: float


class KeptTensors:
    """All tensors kept for callers. Handles are 128 random bits: knowing one is the permission.

    Args:
        max_bytes: of all of them together.
        default_lease, max_lease: seconds.
    """

    def __init__(self, max_bytes: int, default_lease: float, max_lease: float) -> None:
        self._max_bytes = max_bytes
        self._default_lease = default_lease
        self._max_lease = max_lease
        self._kept: dict[str, Kept] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Bytes kept, or promised to tensors that are arriving."""
        with self._lock:
            self._forget_expired()
            return self._bytes

    def reserve(self, size: int) -> None:
        """Promise room for a tensor of `size` bytes; `put` or `release` ends the promise.

        Raises:
            ExhaustedError: there is no room.
        """
        with self._lock:
            self._forget_expired()
            if self._bytes + size > self._max_bytes:
                soonest = min((kept.until for kept in self._kept.values()), default=None)
                fits = size <= self._max_bytes and soonest is not None
                raise ExhaustedError(
                    f"tensor: {size} bytes, beside {self._bytes} that are kept; allowed: "
                    f"{self._max_bytes} together (--max-kept-mib)",
                    retry_after=max(0.001, soonest - time.monotonic())
                    if fits and soonest is not None
                    else None,
                )
            self._bytes += size

    def release(self, size: int) -> None:
        """Take a promise back."""
        with self._lock:
            self._bytes -= size

    def put(self, array: Array, lease: float) -> Kept:
        """Keep an array for which room was reserved; nobody may write to it any more.

        Args:
            array: the tensor.
            lease: seconds; 0 is the default.
        """
        array.flags.writeable = False
        seconds = self._seconds(lease)
        kept = Kept(secrets.token_urlsafe(16), array, seconds, time.monotonic() + seconds)
        with self._lock:
            self._kept[kept.handle] = kept
        return kept

    def get(self, handle: str, field: str) -> Array:
        """A kept tensor; its lease starts anew.

        Args:
            handle: as `put` gave it.
            field: what the handle came in, for the message.

        Raises:
            NotFoundError: it never was, was dropped, or its lease ran out.
            InvalidRequestError: the handle is empty.
        """
        return self._find(handle, field, lambda kept: None).array

    def renew(self, handle: str, lease: float) -> Kept:
        """Start a lease anew, with another length if one is given.

        Raises:
            NotFoundError, InvalidRequestError: as `get`.
        """

        def change(kept: Kept) -> None:
            if lease:
                kept.lease = self._seconds(lease)

        return self._find(handle, "handle", change)

    def drop(self, handle: str) -> None:
        """Forget a tensor; requests that use it now still end well.

        Raises:
            NotFoundError, InvalidRequestError: as `get`.
        """
        self._find(handle, "handle", lambda kept: None)
        with self._lock:
            self._forget(handle)

    def _find(self, handle: str, field: str, change: Callable[[Kept], None]) -> Kept:
        if not handle:
            raise InvalidRequestError.of(field, "nothing", "a handle that PutTensor answered")
        now = time.monotonic()
        with self._lock:
            kept = self._kept.get(handle)
            if kept is None or kept.until <= now:
                raise NotFoundError(
                    f"{field}: given {handle[:_MOST_NAMED]!r}; no such tensor is kept: never put "
                    "here, dropped, or its lease ran out"
                )
            change(kept)
            kept.until = now + kept.lease
            return kept

    def _seconds(self, lease: float) -> float:
        return min(lease or self._default_lease, self._max_lease)

    def _forget_expired(self) -> None:
        now = time.monotonic()
        for handle in [h for h, kept in self._kept.items() if kept.until <= now]:
            self._forget(handle)

    def _forget(self, handle: str) -> None:
        kept = self._kept.pop(handle, None)
        if kept is not None:
            self._bytes -= kept.array.nbytes
