"""A load, and the plan that is drawn from it: what is due when, the same for any process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from attnserve_loadtest.load.arrivals import POISSON, Arrivals
from attnserve_loadtest.load.requests import Mix, Request

ONE_TOKEN = Mix()


class Heard:
    """What a caller has heard of one request so far; the generator reads it, the caller fills it.

    Attributes:
        target: index of the server that it was sent to.
        first: monotonic seconds when its first output was there; None: not yet, or no other than
            its last.
        compute: seconds that the server says it computed for the first output; NaN: not said.
        queue: likewise, waited.
        tokens: (monotonic seconds when it was there, seconds that it took, tokens of the session
            then, seconds of computing) of each token after the first output.
    """

    __slots__ = ("compute", "first", "queue", "target", "tokens")

    def __init__(self) -> None:
        self.target = 0
        self.first: float | None = None
        self.compute = self.queue = float("nan")
        self.tokens: list[tuple[float, float, int, float]] = []


class Caller(Protocol):
    """Sends requests from one process."""

    async def call(self, request: Request, heard: Heard) -> object:
        """Send one and wait for the whole of its answer; may raise anything."""
        ...

    def is_refusal(self, error: BaseException) -> bool:
        """Whether a server said by this that it has too much to do."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class Target(Protocol):
    """What is called; it can be pickled."""

    def connect(self) -> Caller:
        """A caller; needs a running event loop."""
        ...


@dataclass(frozen=True, slots=True)
class Cancel:
    """Callers who do not wait for their answer.

    Attributes:
        share: of the requests, 0..1.
        after: seconds from sending one until its caller gives it up.
    """

    share: float
    after: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a plan.

    Attributes:
        due: seconds from the start of the plan.
        request: what is asked for.
        cancel: seconds after which its caller gives it up; None: never.
    """

    due: float
    request: Request
    cancel: float | None = None


@dataclass(frozen=True)
class Load:
    """What to call, how often, and how long.

    Attributes:
        target: the servers, and how they are called.
        seconds: counted time.
        warm_up: seconds before it.
        callers: of a closed loop, over all processes.
        rate: requests per second of an open loop, over all processes; 0 is a closed loop.
        arrivals: of an open loop.
        mix: what is asked for.
        cancel: who gives up; None: nobody.
        schedule: of a trace: what is due when, instead of a rate; due times count from the end of
            the warm-up, which is then without load.
        seed: of whatever is random: the same seed gives the same requests at the same times,
            however many processes send them.
    """

    target: Target
    seconds: float
    warm_up: float = 0.5
    callers: int = 1
    rate: float = 0.0
    arrivals: Arrivals = POISSON
    mix: Mix = ONE_TOKEN
    cancel: Cancel | None = None
    schedule: tuple[Arrival, ...] = ()
    seed: int = 0

    @property
    def is_open(self) -> bool:
        """Whether requests are due at times of their own."""
        return bool(self.rate or self.schedule)


def plan(load: Load, number: int = 0, count: int = 1) -> Sequence[Arrival]:
    """What one process of an open loop sends: every `count`-th request.

    Args:
        load: an open loop.
        number: of the process, 0-based.
        count: of processes.
    """
    if load.schedule:
        return [
            Arrival(load.warm_up + each.due, each.request, each.cancel)
            for each in load.schedule[number::count]
        ]
    due = load.arrivals.due_times(load.rate, load.warm_up + load.seconds, load.seed)
    random = np.random.default_rng([load.seed, 0x72657175])
    requests = load.mix.draw(len(due), random)
    gives_up: Any = np.zeros(len(due), bool)
    if load.cancel is not None:
        gives_up = random.random(len(due)) < load.cancel.share
    after = load.cancel.after if load.cancel is not None else None
    return [
        Arrival(float(moment), request, after if cancelled else None)
        for moment, request, cancelled in zip(
            due[number::count], requests[number::count], gives_up[number::count], strict=True
        )
    ]
