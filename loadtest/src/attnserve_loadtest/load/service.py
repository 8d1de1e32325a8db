"""How long a server computes and how long the rest takes, fitted to a load that it bears easily."""

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from attnserve_loadtest.load.measured import ANSWERED, Measured, Rows
from attnserve_loadtest.report.load_schema import Service, ServicePoint, ServiceTime

_MOST_POINTS = 12
_FEWEST_IN_A_POINT = 3


def service_of(measured: Measured) -> Service:
    """The service times of a load, by what the server says it computed.

    Args:
        measured: of the lowest load: at a high one, requests that run together are counted for the
            time of all of them.
    """
    rows = measured.due_rows
    rows = rows[(rows["outcome"] == ANSWERED) & np.isfinite(rows["compute"])]
    single, prompt = rows[rows["tokens"] == 0], rows[rows["tokens"] > 0]
    tokens = measured.tokens
    return Service(
        single=fit_service(single["length"], single["compute"]),
        prompt=fit_service(prompt["length"], prompt["compute"]),
        step=fit_service(tokens["context"], tokens["compute"]),
        single_wire_seconds=_median(_wire(single)),
        prompt_wire_seconds=_median(_wire(prompt)),
        step_wire_seconds=_median(tokens["took"] - tokens["compute"]),
    )


def fit_service(lengths: NDArray[np.int32], seconds: NDArray[np.float64]) -> ServiceTime | None:
    """Fit constant + linear * n + quadratic * n**2, none negative, by least squares of relative
    errors, to the medians of up to 12 groups of lengths.

    Args:
        lengths: [N].
        seconds: [N], of computing.

    Returns:
        The fit; None of fewer than two lengths that were seen three times or more.
    """
    points = _points(lengths, seconds)
    if len(points) < 2:
        return None
    n = np.array([point.length for point in points])
    observed = np.array([point.seconds for point in points])
    scale = float(n.max())
    terms = min(3, len(points))
    parts = np.stack([(n / scale) ** power for power in range(terms)], axis=1)
    found, _ = optimize.nnls(parts / observed[:, None], np.ones_like(observed))
    off = float(np.max(np.abs(parts @ found / observed - 1)))
    constant, linear, quadratic = (*map(float, found), 0.0, 0.0)[:3]
    return ServiceTime(
        constant=constant,
        linear=linear / scale,
        quadratic=quadratic / scale**2,
        shortest=float(n.min()),
        longest=scale,
        off=off,
        points=tuple(points),
    )


def _points(lengths: NDArray[np.int32], seconds: NDArray[np.float64]) -> list[ServicePoint]:
    """Medians by length, or where lengths are many, by as many requests of neighbouring lengths."""
    distinct, counts = np.unique(lengths, return_counts=True)
    if len(distinct) <= _MOST_POINTS and np.sum(counts >= _FEWEST_IN_A_POINT) > 1:
        groups = [np.flatnonzero(lengths == each) for each in distinct]
    else:
        order = np.argsort(lengths, kind="stable")
        number = min(_MOST_POINTS, len(lengths) // _FEWEST_IN_A_POINT)
        groups = np.array_split(order, number) if number else []
    points = []
    for group in groups:
        median = float(np.median(seconds[group])) if len(group) >= _FEWEST_IN_A_POINT else 0.0
        if median > 0:
            # Time grows with length, so that the median of one is at the median of the other.
            points.append(ServicePoint(float(np.median(lengths[group])), median, len(group)))
    return points if len({point.length for point in points}) > 1 else []


def _wire(rows: Rows) -> NDArray[np.float64]:
    """What is neither computing nor the wait for it, from when it was sent."""
    rest: NDArray[np.float64] = rows["first"] - rows["sent"] - rows["compute"] - rows["queue"]
    return np.maximum(0.0, rest)


def _median(seconds: NDArray[np.float64]) -> float | None:
    return float(np.median(np.maximum(0.0, seconds))) if len(seconds) else None
