"""In which order the lengths are measured.

A machine drifts: clocks throttle, neighbours come and go. Were the lengths measured one after
another, drift would look like scaling. So the requests of each length are spread over rounds; each
round goes through all lengths of all series in a random order of its own (from a fixed seed), and
drift falls on all lengths alike. Within a round a length is measured in one block, by all users at
once and alone, after a few requests that are not measured, so that caches and memory pools suit it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from attnserve_loadtest.report.schema import Settings


@dataclass(frozen=True, slots=True)
class Block:
    """Requests of one lane, one after another.

    Attributes:
        lane: index of the (series, length).
        round: 0-based; -1 is the warm-up.
        requests: how many, all users together; None: by time.
        seconds: how long; None: by requests.
        measured: whether the requests count.
    """

    lane: int
    round: int
    requests: int | None = None
    seconds: float | None = None
    measured: bool = True


def blocks(settings: Settings, lanes: int) -> Iterator[Block]:
    """All blocks of a run, in order.

    Args:
        settings: rounds, requests or duration, warm-up, users, seed.
        lanes: number of (series, length) pairs.
    """
    if settings.warmup:
        for lane in range(lanes):
            yield Block(lane, -1, requests=settings.warmup, measured=False)
    order = random.Random(settings.seed)
    for number in range(settings.rounds):
        for lane in order.sample(range(lanes), lanes):
            measured = _measured_block(settings, lane, number)
            if measured is None:
                continue
            if settings.settle:
                settling = settings.settle * settings.users
                yield Block(lane, number, requests=settling, measured=False)
            yield measured


def _measured_block(settings: Settings, lane: int, number: int) -> Block | None:
    if settings.requests is None:
        return Block(lane, number, seconds=(settings.duration_seconds or 0.0) / settings.rounds)
    share, rest = divmod(settings.requests, settings.rounds)
    requests = share + (number < rest)
    return Block(lane, number, requests=requests) if requests else None
