"""Deadlines on the monotonic clock; None: there is none."""

import time

# What a call may take at least: one without time is refused before it is sent.
LEAST_SECONDS = 1e-3


def until(timeout: float | None) -> float | None:
    """When so many seconds are over; None: never."""
    return None if timeout is None else time.monotonic() + timeout


def left(deadline: float | None, least: float = 0.0) -> float | None:
    """Seconds until then, `least` if they are fewer or it is past; None: any."""
    return None if deadline is None else max(least, deadline - time.monotonic())
