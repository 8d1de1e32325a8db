"""Calls that are tried again while no server is there to answer them.

grpc's own retries (https://grpc.io/docs/guides/retry/) keep a copy of what was sent and give up
above 256 KB of it, a small tensor; a request can be sent from its arrays again, whatever its size.

Tried again is what met UNAVAILABLE (no server, a broken or reset connection, a server that drains)
and CANCELLED (a server that ends its calls as it shuts down; nobody here cancelled: an awaiting
task that is cancelled gets asyncio's own exception, and a client that is closed tries no more).
Only calls that can be repeated safely come here: all but those of a stream.
"""

import random
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import grpc

from attnserve_client import _arguments as arguments
from attnserve_client import _deadlines, _errors
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Call, Flow, Pause

T = TypeVar("T")

# How long a call without a timeout is tried again, seconds from its first failure.
UNTIMED_SECONDS = 30.0

_AGAIN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
# Between two tries, seconds: from the first to the longest. The jitter keeps callers that lost the
# same server from coming back to it all at once.
_FIRST_SECONDS, _MULTIPLIER, _LONGEST_SECONDS, _JITTER = 0.05, 2.0, 1.0, 0.25


class Tries(Protocol):
    """`all_again`, or `once`."""

    def __call__(
        self, method: str, attempt: Callable[[float | None], Flow[T]], timeout: float | None
    ) -> Flow[T]:
        """Try a call."""


def again(
    method: str,
    send: Callable[[float | None], Any],
    timeout: float | None,
    tries: Tries | None = None,
) -> Flow[Any]:
    """Call a method that can be repeated safely, until it answers or the time is up.

    Args:
        method: its name, for messages.
        send: as `Call` has it.
        timeout: seconds for all tries together; None waits for an answer for ever, and for a
            server that can be reached `UNTIMED_SECONDS`.
        tries: how often; None: until the time is up.

    Raises:
        AttnserveError: how the last try failed.
    """

    def attempt(left: float | None) -> Flow[Any]:
        return (yield Call(send, left))

    return (tries or all_again)(method, attempt, timeout)


def all_again(
    method: str, attempt: Callable[[float | None], Flow[T]], timeout: float | None
) -> Flow[T]:
    """As `again`, of calls that are repeated together: `attempt` makes them, in the time given."""
    tries = None
    left = timeout = arguments.seconds("timeout", timeout)
    began = time.monotonic()
    while True:
        try:
            return (yield from attempt(left))
        except (grpc.RpcError, AttnserveError) as error:
            failure = _errors.from_call(error, method)
        tries = tries or _Tries(began, timeout)
        delay = tries.delay(failure)
        if delay is None:
            raise failure
        if (yield Pause(delay)):
            raise _errors.CancelledError("the client was closed", method=method)
        left = tries.left()


def once(method: str, attempt: Callable[[float | None], Flow[T]], timeout: float | None) -> Flow[T]:
    """As `all_again`, but not again: for whoever then asks another server."""
    try:
        return (yield from attempt(arguments.seconds("timeout", timeout)))
    except grpc.RpcError as error:
        raise _errors.from_rpc_error(error, method) from None


class _Tries:
    """The clock of one call's tries."""

    def __init__(self, began: float, timeout: float | None) -> None:
        self._deadline = None if timeout is None else began + timeout
        self._until = self._deadline
        self._next = _FIRST_SECONDS

    def left(self) -> float | None:
        """Seconds that the next try may take; None: any."""
        return _deadlines.left(self._deadline)

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
