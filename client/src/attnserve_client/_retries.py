"""Calls that are tried again while the server cannot be reached, or is draining.

grpc's own retries (https://grpc.io/docs/guides/retry/) keep a copy of what was sent and give up
above 256 KB of it, a small tensor; a request can be sent from its arrays again, whatever its size.
As there: up to four tries, with exponential backoff, after UNAVAILABLE alone.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import grpc

from attnserve_client import _errors

T = TypeVar("T")

_TRIES = 4
_FIRST_SECONDS, _MULTIPLIER, _JITTER = 0.1, 2.0, 0.2


def call(method: str, function: Callable[[float | None], T], timeout: float | None) -> T:
    """Call a method that can be repeated safely.

    Args:
        method: its name, for messages.
        function: calls it, given the seconds left (None: without end).
        timeout: seconds for all tries together; None waits for ever.

    Raises:
        AttnserveError: the last try failed.
    """
    for left, delay in _tries(timeout):
        try:
            return function(left)
        except grpc.RpcError as error:
            if not _is_worth_another(error, left, delay):
                raise _errors.from_rpc_error(error, method) from None
        time.sleep(delay)
    raise AssertionError("the last try returns or raises")


async def call_async(
    method: str, function: Callable[[float | None], Awaitable[T]], timeout: float | None
) -> T:
    """As `call`, awaited."""
    for left, delay in _tries(timeout):
        try:
            return await function(left)
        except grpc.RpcError as error:
            if not _is_worth_another(error, left, delay):
                raise _errors.from_rpc_error(error, method) from None
        await asyncio.sleep(delay)
    raise AssertionError("the last try returns or raises")


def _tries(timeout: float | None) -> Iterator[tuple[float | None, float]]:
    """Of each try: the seconds that are left, and those to wait before the next one; 0: none."""
    deadline = None if timeout is None else time.monotonic() + timeout
    for number in range(_TRIES):
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        delay = _FIRST_SECONDS * _MULTIPLIER**number * random.uniform(1 - _JITTER, 1 + _JITTER)
        yield left, delay if number + 1 < _TRIES else 0.0


def _is_worth_another(error: grpc.RpcError, left: float | None, delay: float) -> bool:
    code = getattr(error, "code", lambda: None)()
    return code == grpc.StatusCode.UNAVAILABLE and delay > 0 and (left is None or delay < left)
