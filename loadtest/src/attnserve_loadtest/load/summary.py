"""From what was measured to the steps, the capacity and the service times of a report."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attnserve_loadtest.load.measured import (
    ANSWERED,
    CANCELLED,
    FAILED,
    REFUSED,
    Measured,
    Rows,
)
from attnserve_loadtest.load.ramp import knee
from attnserve_loadtest.load.slo import Bound, good, percentile, times
from attnserve_loadtest.report.load_schema import (
    BoundResult,
    Capacity,
    LengthAtLoad,
    Step,
    TargetAtLoad,
)
from attnserve_loadtest.report.schema import Distribution
from attnserve_loadtest.summary import distribution

# Of what is due, by whom a server keeps up.
KEEPS_UP = 0.95
_SLICES = 5


def summarise_step(measured: Measured, bounds: tuple[Bound, ...], targets: Sequence[str]) -> Step:
    """One load.

    Args:
        measured: what became of it.
        bounds: that good answers keep to.
        targets: addresses, by their index in the rows.
    """
    load, rows = measured.load, measured.due_rows
    answered = rows[rows["outcome"] == ANSWERED]
    good_rows = rows[good(measured, bounds)]
    results = tuple(_bound_result(bound, measured) for bound in bounds)
    meets = all(result.met for result in results) if results else None
    wanted = len(rows) - measured.count(CANCELLED)
    seconds = load.seconds
    first = measured.rows["first"]
    heard = int(np.sum((first >= 0) & (first < seconds)))
    return Step(
        offered=len(rows) / seconds if load.is_open else None,
        callers=None if load.is_open else load.callers,
        seconds=seconds,
        due=len(rows),
        answered=len(answered),
        refused=measured.count(REFUSED),
        failed=measured.count(FAILED),
        cancelled=measured.count(CANCELLED),
        throughput=measured.throughput,
        goodput=len(good_rows) / seconds,
        context_tokens_per_second=float(np.sum(good_rows["length"] + good_rows["tokens"]))
        / seconds,
        latency=_distribution(times(measured, "latency")),
        first=_distribution(times(measured, "first")),
        between=_distribution(times(measured, "between")),
        late=_distribution(rows["sent"] - rows["due"]),
        bounds=results,
        meets=meets,
        keeps_up=wanted > 0
        and meets is not False
        # One may have been due as the time ended.
        and heard >= KEEPS_UP * wanted - 1
        and len(answered) >= KEEPS_UP * wanted,
        client_cores=measured.client_cpu,
        slices_first_p50_ms=_slices(rows, seconds, 0.5),
        slices_first_p99_ms=_slices(rows, seconds, 0.99),
        slices_throughput=_throughputs(measured),
        lengths=_lengths(measured, bounds),
        targets=tuple(_target(rows, index, name) for index, name in enumerate(targets)),
    )


def capacity(
    steps: Sequence[Step], bounds: tuple[Bound, ...], servers: int, price_per_hour: float | None
) -> Capacity:
    """What the loads together say.

    Args:
        steps: by load, ascending.
        bounds: that good answers keep to.
        servers: how many there were.
        price_per_hour: of one.
    """
    best = max((n for n, step in enumerate(steps) if step.keeps_up), default=None)
    context, at = _largest_context(steps)
    closed = [step for step in steps if step.callers is not None and step.meets]
    cost = None
    if price_per_hour is not None and best is not None:
        tokens = steps[best].context_tokens_per_second
        cost = price_per_hour * servers / 3600 / tokens * 1e6 if tokens else None
    return Capacity(
        knee=knee(
            [step.throughput for step in steps],
            [step.first.mean if step.first is not None else math.nan for step in steps],
        ),
        best=best,
        largest_context=context,
        largest_context_step=at,
        most_callers=max((step.callers or 0 for step in closed), default=None),
        price_per_hour=price_per_hour,
        cost_per_million_tokens=cost,
    )


def _bound_result(bound: Bound, measured: Measured) -> BoundResult:
    observed = bound.observed(measured)
    return BoundResult(
        bound=str(bound),
        observed_ms=observed * 1e3 if math.isfinite(observed) else None,
        met=bound.is_met(measured),
    )


def _distribution(seconds: NDArray[np.float64]) -> Distribution | None:
    """Of those that came, in milliseconds."""
    return distribution(seconds[np.isfinite(seconds)] * 1e3)


def _slices(rows: Rows, seconds: float, share: float) -> tuple[float | None, ...]:
    rows = rows[rows["outcome"] == ANSWERED]
    which = np.minimum((rows["due"] / seconds * _SLICES).astype(int), _SLICES - 1)
    found = []
    for number in range(_SLICES):
        took = (rows["first"] - rows["due"])[which == number]
        found.append(float(np.quantile(took, share)) * 1e3 if len(took) else None)
    return tuple(found)


def _throughputs(measured: Measured) -> tuple[float, ...]:
    done = measured.rows["done"][measured.rows["outcome"] == ANSWERED]
    edges = np.linspace(0, measured.load.seconds, _SLICES + 1)
    counts = np.histogram(done, edges)[0]
    return tuple(float(count) / (measured.load.seconds / _SLICES) for count in counts)


def _lengths(measured: Measured, bounds: tuple[Bound, ...]) -> tuple[LengthAtLoad, ...]:
    rows = measured.due_rows
    rows = rows[(rows["tokens"] == 0) & (rows["outcome"] != CANCELLED)]
    found = []
    for seq_len in np.unique(rows["length"]):
        own = rows[rows["length"] == seq_len]
        met = [
            percentile(took, bound.share) <= bound.seconds
            for bound in bounds
            if bound.quantity != "between" and len(took := times(measured, bound.quantity, own))
        ]
        found.append(
            LengthAtLoad(
                seq_len=int(seq_len),
                due=len(own),
                latency=_distribution(times(measured, "latency", own)),
                met=all(met) if met else None,
            )
        )
    return tuple(found)


def _target(rows: Rows, index: int, name: str) -> TargetAtLoad:
    own = rows[rows["target"] == index]
    answered = own[own["outcome"] == ANSWERED]
    return TargetAtLoad(
        target=name,
        answered=len(answered),
        refused=int(np.sum(own["outcome"] == REFUSED)),
        failed=int(np.sum(own["outcome"] == FAILED)),
        first=_distribution(answered["first"] - answered["due"]),
    )


def _largest_context(steps: Sequence[Step]) -> tuple[int | None, int | None]:
    met = [
        (each.seq_len, number)
        for number, step in enumerate(steps)
        for each in step.lengths
        if each.met
    ]
    return max(met) if met else (None, None)
