"""Which loads are tried: upwards until a server no longer keeps up, then closer to where it did."""

from collections.abc import Callable
from typing import Protocol, TypeVar

GROWTH = 1.5


class Tried(Protocol):
    """What became of one load."""

    @property
    def keeps_up(self) -> bool:
        """Whether the server did."""
        ...


Step = TypeVar("Step", bound=Tried)


def ramp(
    try_load: Callable[[float], Step],
    low: float,
    high: float,
    *,
    refinements: int,
    growth: float = GROWTH,
    whole: bool = False,
) -> list[Step]:
    """Try loads from `low` on, each `growth` times the one before, until one is too much.

    Then the geometric mean of the highest that was not and the lowest that was is tried,
    `refinements` times over.

    Args:
        try_load: tries one.
        low: the first.
        high: the last, if nothing is too much.
        refinements: loads tried between.
        growth: above 1.
        whole: of loads that are whole numbers: callers.

    Returns:
        What became of each, in ascending order of load.
    """

    def rounded(load: float) -> float:
        return float(round(load)) if whole else load

    tried: dict[float, Step] = {}
    load = rounded(low)
    good, bad = 0.0, 0.0
    while True:
        tried[load] = try_load(load)
        if not tried[load].keeps_up:
            bad = load
            break
        good = load
        if load >= high:
            break
        load = min(high, max(rounded(load * growth), load + 1 if whole else 0.0))
    for _ in range(refinements if good and bad else 0):
        load = rounded((good * bad) ** 0.5)
        if load in tried:
            break
        tried[load] = try_load(load)
        good, bad = (load, bad) if tried[load].keeps_up else (good, load)
    return [step for _, step in sorted(tried.items())]


def knee(throughputs: list[float], latencies: list[float]) -> int | None:
    """Where the curve of latency over load bends: the most throughput for its latency.

    "Power", throughput divided by response time, has its maximum there: below it more load costs
    little latency, above it more latency brings little throughput (Kleinrock, "Power and
    deterministic rules of thumb for probabilistic problems in computer communications", 1979).

    Args:
        throughputs: answers a second at each load.
        latencies: mean seconds at each load.

    Returns:
        The index of the load; None where no load has answers.
    """
    power = [
        rate / latency if latency > 0 and latency == latency else 0.0
        for rate, latency in zip(throughputs, latencies, strict=True)
    ]
    return power.index(max(power)) if any(power) else None
