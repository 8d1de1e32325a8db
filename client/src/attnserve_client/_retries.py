"""Calls that are tried again while no server is there to answer them.

grpc's own retries (https://grpc.io/docs/guides/retry/) keep a copy of what was sent and give up
above 256 KB of it, a small tensor; a request can be sent from its arrays again, whatever its size.

Tried again is what met UNAVAILABLE (no server, a broken or reset connection, a server that drains)
and CANCELLED (a server that ends its calls as it shuts down; nobody here cancelled: an awaiting
task that is cancelled gets asyncio's own exception, and a client that is closed tries no more).
Only calls that can be repeated safely come here: all but those of a stream.
"""

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from attnserve_client import _errors
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Flow

T = TypeVar("T")

# How long a call without a timeout is tried again, seconds from its first failure.
UNTIMED_SECONDS = 30.0

_AGAIN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
# Between two tries, seconds: from the first to the longest. The jitter keeps callers that lost the
# same server from coming back to it all at once.
_FIRST_SECONDS, _MULTIPLIER, _LONGEST_SECONDS, _JITTER = 0.05, 2.0, 1.0, 0.25


class Retries:
    """The tries of one client's calls. Safe to share between threads."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def close(self) -> None:
        """Try no more: what fails from now on has failed, and who waits for a try stops waiting."""
        self._closed.set()

    def run(self, flow: Flow[T]) -> T:
        """Make the calls of a flow, one after another; its result."""
        try:
            call = next(flow)
            while True:
                try:
                    answer = (
                        self.call(call.method, call.send, call.timeout)
                        if call.again
                        else call.send(call.timeout)
                    )
                except BaseException as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    def call(self, method: str, function: Callable[[float | None], T], timeout: float | None) -> T:
        """Call a method that can be repeated safely, until it answers or the time is up.

        Args:
            method: its name, for messages.
            function: calls it, given the seconds left (None: without end).
            timeout: seconds for all tries together; None waits for an answer for ever, and for a
                server that can be reached `UNTIMED_SECONDS`.

        Raises:
            AttnserveError: how the last try failed.
        """
        tries = _Tries(timeout)
        left = timeout
        while True:
            try:
                return function(left)
            except (grpc.RpcError, AttnserveError) as error:
                failure = _errors.from_call(error, method)
            delay = None if self._closed.is_set() else tries.delay(failure)
            if delay is None:
                raise failure
            if self._closed.wait(delay):
                raise _closed(method)
            left = tries.left()


class AsyncRetries:
    """The tries of one asyncio client's calls: `Retries`, awaited."""

    def __init__(self) -> None:
        self._closed = asyncio.Event()

    def close(self) -> None:
        """As `Retries.close`."""
        self._closed.set()

    async def run(self, flow: Flow[T]) -> T:
        """As `Retries.run`."""
        try:
            call = next(flow)
            while True:
                try:
                    answer = await (
                        self.call(call.method, call.send, call.timeout)
                        if call.again
                        else call.send(call.timeout)
                    )
                except BaseException as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    async def call(
        self, method: str, function: Callable[[float | None], Awaitable[T]], timeout: float | None
    ) -> T:
        """As `Retries.call`."""
        tries = _Tries(timeout)
        while True:
            try:
                return await function(tries.left())
            except (grpc.RpcError, AttnserveError) as error:
                failure = _errors.from_call(error, method)
            delay = None if self._closed.is_set() else tries.delay(failure)
            if delay is None:
                raise failure
            try:
                await asyncio.wait_for(self._closed.wait(), delay)
            except TimeoutError:
                continue
            raise _closed(method)


class _Tries:
    """The clock of one call's tries."""

    def __init__(self, timeout: float | None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._until = self._deadline
        self._next = _FIRST_SECONDS

    def left(self) -> float | None:
        """Seconds that the next try may take; None: any."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def delay(self, failure: AttnserveError) -> float | None:
        """Seconds to wait before the next try; None: there is none."""
        if failure.code not in _AGAIN or _errors.is_unloaded_model(failure):
            return None
        now = time.monotonic()
        if self._until is None:
            self._until = now + UNTIMED_SECONDS
        delay = self._next * random.uniform(1 - _JITTER, 1 + _JITTER)
        delay = max(delay, failure.retry_after or 0.0)
        self._next = min(self._next * _MULTIPLIER, _LONGEST_SECONDS)
        return delay if now + delay < self._until else None


def _closed(method: str) -> AttnserveError:
    return _errors.CancelledError("the client was closed", method=method)
