"""Two reports of one kind, figure by figure: what differs beyond noise.

Noise is what a figure does by itself: of `scaling`, the medians of its rounds; of `load`, its
percentiles in each fifth of a load's time. The ratio of the two reports' figures is the ratio of
the geometric means of these, its interval Welch's on their logarithms. A difference is called one
if the interval leaves out 1 at a confidence of 95% for all comparisons of the two reports together
(Bonferroni). What two runs differ in as wholes (another day, another neighbour) is not in either:
where that matters, measure both again, and compare again.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.report.load_schema import LoadReport, Step
from attnserve_loadtest.report.schema import Report

CONFIDENCE = 0.95
_FEWEST = 3
# Loads are the same if they are this near.
_SAME_LOAD = 0.05

Verdict = Literal["faster", "slower", "no difference beyond noise"]


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of both.

    Attributes:
        what: series and length, or load, and the figure.
        first, second: geometric means, in `unit`.
        unit: `ms` or `answers/s`.
        ratio: second / first.
        low, high: its interval.
        verdict: of the second report.
    """

    what: str
    first: float
    second: float
    unit: str
    ratio: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Pair:
    """The same figure of two reports, several times each."""

    what: str
    first: tuple[float, ...]
    second: tuple[float, ...]
    unit: str = "ms"


def compare(first: Report | LoadReport, second: Report | LoadReport) -> list[Compared]:
    """What both have, in the order of the first.

    Raises:
        LoadTestError: they are of different kinds, or have nothing in common that was measured
            three times or more.
    """
    if isinstance(first, Report) and isinstance(second, Report):
        pairs = list(_of_scaling(first, second))
    elif isinstance(first, LoadReport) and isinstance(second, LoadReport):
        pairs = list(_of_load(first, second))
    else:
        raise LoadTestError("one is a report of `scaling`, the other of `load` or `replay`")
    pairs = [pair for pair in pairs if min(len(pair.first), len(pair.second)) >= _FEWEST]
    if not pairs:
        raise LoadTestError(
            "they have no figure in common that was measured in three rounds (slices) or more"
        )
    confidence = 1 - (1 - CONFIDENCE) / len(pairs)
    return [compare_pair(pair, confidence) for pair in pairs]


def compare_pair(pair: Pair, confidence: float) -> Compared:
    """Welch's interval of the logarithm of the ratio.

    Args:
        pair: three figures or more of each, above 0.
        confidence: of the interval.
    """
    first, second = np.log(pair.first), np.log(pair.second)
    errors = [float(each.var(ddof=1)) / len(each) for each in (first, second)]
    difference = float(second.mean() - first.mean())
    spread = math.sqrt(sum(errors))
    reach = 0.0
    if spread > 0:
        freedom = sum(errors) ** 2 / (
            errors[0] ** 2 / (len(first) - 1) + errors[1] ** 2 / (len(second) - 1)
        )
        reach = float(special.stdtrit(freedom, (1 + confidence) / 2)) * spread
    low, high = math.exp(difference - reach), math.exp(difference + reach)
    more_is_better = pair.unit != "ms"
    verdict: Verdict = "no difference beyond noise"
    if low > 1:
        verdict = "faster" if more_is_better else "slower"
    elif high < 1:
        verdict = "slower" if more_is_better else "faster"
    return Compared(
        pair.what,
        float(np.exp(first.mean())),
        float(np.exp(second.mean())),
        pair.unit,
        math.exp(difference),
        low,
        high,
        verdict,
    )


def _of_scaling(first: Report, second: Report) -> Iterator[Pair]:
    others = {(each.model, each.variant): each for each in second.series}
    for series in first.series:
        other = others.get((series.model, series.variant))
        if other is None:
            continue
        points = {point.seq_len: point for point in other.points}
        for point in series.points:
            if point.seq_len in points:
                yield Pair(
                    f"{series.label}, {point.seq_len}: p50",
                    _positive(point.round_p50_ms),
                    _positive(points[point.seq_len].round_p50_ms),
                )


def _of_load(first: LoadReport, second: LoadReport) -> Iterator[Pair]:
    for step in first.steps:
        other = next((each for each in second.steps if _same(step, each)), None)
        if other is None:
            continue
        name = f"{step.callers} callers" if step.offered is None else f"{step.offered:g}/s"
        for percentile in ("p50", "p99"):
            field = f"slices_first_{percentile}_ms"
            yield Pair(
                f"{name}: first output {percentile}",
                _positive(getattr(step, field)),
                _positive(getattr(other, field)),
            )
        if step.offered is None:
            # In an open loop it is what is offered.
            yield Pair(
                f"{name}: throughput",
                _positive(step.slices_throughput),
                _positive(other.slices_throughput),
                "answers/s",
            )


def _same(step: Step, other: Step) -> bool:
    if step.offered is None or other.offered is None:
        return step.callers is not None and step.callers == other.callers
    return abs(math.log(step.offered / other.offered)) <= _SAME_LOAD if other.offered else False


def _positive(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None and value > 0)
