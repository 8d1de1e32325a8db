"""From samples to the points, fits and series of a report."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from attnserve_client import Model
from numpy.typing import NDArray

from attnserve_loadtest.fitting import fit_power_law
from attnserve_loadtest.report.schema import (
    Distribution,
    FailureCount,
    Fit,
    Point,
    Series,
)
from attnserve_loadtest.samples import Parts, Sample


@dataclass(frozen=True, slots=True)
class Slice:
    """The requests of one length in one round.

    Attributes:
        round: 0-based.
        seconds: wall time from the first request to the last answer.
        samples: the measured requests.
    """

    round: int
    seconds: float
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class LengthResult:
    """All slices of one length.

    Attributes:
        seq_len: the length.
        request_bytes: bytes of the tensors of one request.
        slices: by round.
    """

    seq_len: int
    request_bytes: int
    slices: tuple[Slice, ...]


def distribution(milliseconds: Sequence[float] | NDArray[np.float64]) -> Distribution | None:
    """Summarise durations; percentiles interpolate linearly. None of none."""
    values = np.asarray(milliseconds, float)
    if values.size == 0:
        return None
    p5, p50, p95, p99 = (float(p) for p in np.percentile(values, [5, 50, 95, 99]))
    return Distribution(
        float(values.mean()), float(values.min()), p5, p50, p95, p99, float(values.max())
    )


def summarise_length(result: LengthResult, batch: int) -> Point:
    """The point of one length.

    Args:
        result: its slices.
        batch: sequences of each request.
    """
    samples = [sample for each in result.slices for sample in each.samples]
    answered = [(s, s.timings) for s in samples if s.timings is not None]
    split = [astuple(parts) for s, _ in answered if (parts := s.parts()) is not None]
    # One row a request whose time can be split.
    table = np.array(split, float).reshape(-1, len(fields(Parts)))
    deserialize, queue, compute, serialize, wire = (table / 1e3).T
    seconds = sum(each.seconds for each in result.slices)
    rate = len(answered) / seconds if seconds > 0 else 0.0
    return Point(
        seq_len=result.seq_len,
        count=len(answered),
        failures=len(samples) - len(answered),
        measured_seconds=seconds,
        requests_per_second=rate,
        tokens_per_second=rate * batch * result.seq_len,
        end_to_end=distribution([s.end_to_end_us / 1e3 for s, _ in answered]),
        queue=distribution(queue),
        compute=distribution(compute),
        wire=distribution(wire),
        deserialize=distribution(deserialize),
        serialize=distribution(serialize),
        overlapping=len(answered) - len(split),
        batch_size=float(np.mean([t.batch_size for _, t in answered])) if answered else None,
        request_bytes=result.request_bytes,
        response_bytes=max((s.response_bytes for s, _ in answered), default=0),
        round_p50_ms=tuple(_round_median(each) for each in result.slices),
    )


def summarise_series(
    model: Model, variant: str, results: Sequence[LengthResult], batch: int
) -> Series:
    """The series of one model and variant.

    Args:
        model: as the server describes it.
        variant: the one asked for; empty: the server's choice.
        results: by length.
        batch: sequences of each request.
    """
    points = tuple(summarise_length(result, batch) for result in results)
    samples = [s for result in results for each in result.slices for s in each.samples]
    variants_run = tuple(sorted({s.variant for s in samples if s.timings is not None}))
    fits = (_fit("end_to_end", points), _fit("compute", points))
    return Series(
        label=_label(model.name, variant, variants_run),
        model=model.name,
        version=model.version,
        kind=model.kind,
        variant=variant,
        variants_run=variants_run,
        dtype=model.dtype,
        mask=model.mask,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        embed_dim=model.embed_dim,
        points=points,
        fits=tuple(fit for fit in fits if fit is not None),
        failures=_failures(samples),
    )


def drift(series: Sequence[Series]) -> float | None:
    """Median over all points of (median of the last round / of the first)."""
    ratios = []
    for point in (point for each in series for point in each.points):
        medians = [p50 for p50 in point.round_p50_ms if p50]
        if len(medians) > 1:
            ratios.append(medians[-1] / medians[0])
    return float(np.median(ratios)) if ratios else None


def _fit(quantity: str, points: Sequence[Point]) -> Fit | None:
    found = [(p.seq_len, getattr(p, quantity)) for p in points]
    pairs = [(seq_len, each.p50) for seq_len, each in found if each is not None]
    return fit_power_law(quantity, [n for n, _ in pairs], [t for _, t in pairs])


def _round_median(each: Slice) -> float | None:
    found = distribution([s.end_to_end_us / 1e3 for s in each.samples if s.timings is not None])
    return None if found is None else found.p50


def _label(model: str, variant: str, variants_run: tuple[str, ...]) -> str:
    if variant:
        return f"{model}/{variant}"
    return f"{model}/{variants_run[0]}" if len(variants_run) == 1 else f"{model} (auto)"


def _failures(samples: Sequence[Sample]) -> tuple[FailureCount, ...]:
    failures = [s.failure for s in samples if s.failure is not None]
    first = {failure.code: failure.message for failure in reversed(failures)}
    counts = Counter(failure.code for failure in failures)
    return tuple(FailureCount(code, n, first[code]) for code, n in counts.most_common())
