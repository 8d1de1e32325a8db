"""Contenders timed in turns, so that what else runs on the machine meets all of them."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Medians over rounds.

    Attributes:
        milliseconds: of one run.
        ratio: time / the baseline's time in the same round.
        baseline: its name.
        rounds: how many.
        quick: milliseconds of the run that a tenth of the runs beat: what else runs on the machine
            slows those least.
        times: milliseconds of each round's.
    """

    milliseconds: float
    ratio: float
    baseline: str
    rounds: int
    quick: float
    times: Sequence[float]

    def to(self, other: "Timing") -> float:
        """The median over rounds of this time / the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.times, other.times, strict=True))


def in_turns(
    contenders: dict[str, Callable[[], Any]], baseline: str, *, seconds: float, rounds: int = 5
) -> dict[str, Timing]:
    """Time all contenders once per round, in changing order.

    Args:
        contenders: calls by name.
        baseline: of the ratios.
        seconds: go on for so long, in all.
        rounds: at least so many.
    """
    order = random.Random(0)
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contenders[name]()
    until = time.monotonic() + seconds
    while len(times[names[0]]) < rounds or time.monotonic() < until:
        order.shuffle(names)
        for name in names:
            started = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - started)
    return {
        name: Timing(
            statistics.median(own) * 1e3,
            statistics.median(a / b for a, b in zip(own, times[baseline], strict=True)),
            baseline,
            len(own),
            sorted(own)[len(own) // 10] * 1e3,
            [time * 1e3 for time in own],
        )
        for name, own in times.items()
    }
