"""Bounds, what is good within them, the ramp and the knee."""

import math
from argparse import ArgumentTypeError

import numpy as np
import pytest
from attnserve_loadtest.load.measured import ANSWERED, CANCELLED, FAILED, REFUSED, ROW, TOKEN
from attnserve_loadtest.load.measured import Measured as MeasuredLoad
from attnserve_loadtest.load.plan import Load
from attnserve_loadtest.load.ramp import knee, ramp
from attnserve_loadtest.load.service import fit_service
from attnserve_loadtest.load.slo import Bound, good, read_slo, times
from attnserve_loadtest.load.summary import capacity, summarise_step
from hypothesis import given
from hypothesis import strategies as st


class Nowhere:
    def connect(self) -> object:
        raise NotImplementedError


def measured(
    rows: list[tuple[float, float, float, int, int, int]],
    tokens: list[tuple[int, float]] = (),  # type: ignore[assignment]
    seconds: float = 10.0,
) -> MeasuredLoad:
    """Rows are (due, first, done, outcome, length, tokens), tokens (row, took)."""
    table = np.zeros(len(rows), ROW)
    for row, values in zip(table, rows, strict=True):
        for name, value in zip(
            ("due", "first", "done", "outcome", "length", "tokens"), values, strict=True
        ):
            row[name] = value
    table["sent"] = table["due"]
    made = np.zeros(len(tokens), TOKEN)
    for token, (row_number, took) in zip(made, tokens, strict=True):
        token["row"], token["took"] = row_number, took
    return MeasuredLoad(Load(Nowhere(), seconds, rate=1.0), table, made)  # type: ignore[arg-type]


def test_bounds_are_read_and_written_alike() -> None:
    bounds = read_slo("p99=50ms, first:p99.9=0.2s,between:p50=800us")
    assert bounds == (
        Bound("latency", 0.99, 0.05),
        Bound("first", pytest.approx(0.999), 0.2),  # type: ignore[arg-type]
        Bound("between", 0.5, pytest.approx(0.0008)),  # type: ignore[arg-type]
    )
    assert [str(bound) for bound in bounds] == [
        "latency:p99=50ms",
        "first:p99.9=200ms",
        "between:p50=0.8ms",
    ]


@pytest.mark.parametrize(
    "text", ["", "p99", "99=5ms", "p0=5ms", "p100=5ms", "p99=0ms", "p99=5", "mean=5ms", "p9=5ms,"]
)
def test_other_bounds_are_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="allowed: "):
        read_slo(text)


def test_what_never_comes_counts_and_who_gives_up_does_not() -> None:
    found = measured(
        [
            (0.0, 0.1, 0.1, ANSWERED, 8, 0),
            (1.0, 1.2, 1.2, ANSWERED, 8, 0),
            (2.0, math.nan, 2.1, REFUSED, 8, 0),
            (3.0, math.nan, 3.1, FAILED, 8, 0),
            (4.0, math.nan, 4.01, CANCELLED, 8, 0),
        ]
    )
    assert sorted(times(found, "latency")) == pytest.approx([0.1, 0.2, math.inf, math.inf])
    assert Bound("latency", 0.5, 0.25).is_met(found)
    assert not Bound("latency", 0.5, 0.15).is_met(found)
    assert Bound("latency", 0.9, 0.25).observed(found) == math.inf
    assert list(good(found, (Bound("latency", 0.99, 0.15),))) == [True, *[False] * 4]
    step = summarise_step(found, read_slo("p90=0.25s"), ["a"])
    assert step.bounds[0].observed_ms is None
    assert (step.answered, step.refused, step.failed, step.cancelled) == (2, 1, 1, 1)
    assert not step.meets
    assert not step.keeps_up


def test_a_session_is_good_if_enough_of_its_own_tokens_are() -> None:
    found = measured(
        [
            (0.0, 0.1, 0.4, ANSWERED, 8, 4),
            (1.0, 1.1, 1.4, ANSWERED, 8, 4),
            (2.0, 2.1, 2.1, ANSWERED, 8, 0),
            (3.0, math.nan, 3.1, FAILED, 8, 4),
        ],
        [(0, 0.01)] * 3 + [(0, 0.5)] + [(1, 0.01)] * 2 + [(1, 0.5)] * 2,
    )
    between = Bound("between", 0.75, 0.05)
    assert list(good(found, (between,))) == [True, False, True, False]
    # Of all tokens and of what the failed session owes: 5 of 9 are in time.
    assert Bound("between", 0.5, 0.05).is_met(found)
    assert not between.is_met(found)
    assert list(good(found, (Bound("first", 0.5, 0.15), between))) == [True, False, True, False]
    assert not good(found, (Bound("first", 0.5, 0.05),)).any()
    # Sessions have no latency of their whole answer: their users rest, and read.
    assert times(found, "latency") == pytest.approx([0.1])
    step = summarise_step(found, (between,), ["a"])
    assert step.goodput == pytest.approx(0.2)
    assert step.context_tokens_per_second == pytest.approx((8 + 4 + 8) / 10)


class Tried:
    def __init__(self, load: float, limit: float) -> None:
        self.load = load
        self.keeps_up = load <= limit


@given(
    limit=st.floats(1, 1e5), low=st.floats(1, 100), refinements=st.integers(0, 8),
    whole=st.booleans(),
)  # fmt: skip
def test_a_ramp_stops_beyond_the_limit_and_closes_in_on_it(
    limit: float, low: float, refinements: int, whole: bool
) -> None:
    high = 1e4
    steps = ramp(lambda load: Tried(load, limit), low, high, refinements=refinements, whole=whole)
    loads = [step.load for step in steps]
    assert loads == sorted(set(loads))
    too_much = [step.load for step in steps if not step.keeps_up]
    enough = [step.load for step in steps if step.keeps_up]
    if not too_much:
        assert loads[-1] == pytest.approx(high)
    elif not enough:
        assert len(steps) == 1
    else:
        assert enough[-1] <= limit < too_much[0]
        # One more than the limit was tried for each refinement, and one besides.
        assert len(too_much) <= 1 + refinements
        if not whole:
            assert too_much[0] / enough[-1] <= 1.5 ** (0.5**refinements) * (1 + 1e-9)
    if whole:
        assert all(load == round(load) for load in loads)


def test_the_knee_of_a_queue_is_at_half_of_its_capacity() -> None:
    """M/M/1: response time 1/(mu - lambda), so power is lambda (mu - lambda): most at mu/2."""
    mu, loads = 100.0, [10.0, 30.0, 50.0, 70.0, 90.0, 99.0]
    assert knee(loads, [1 / (mu - load) for load in loads]) == 2
    assert knee([0.0, 0.0], [math.nan, math.nan]) is None


def queue_step(load: float, context: int = 8) -> object:
    """A load of a queue that serves 100/s: waits grow as it fills."""
    count = int(load * 2)
    due = np.arange(count) / load
    took = 1 / max(1.0, 100 - load)
    rows = [(each, each + took, each + took, ANSWERED, context, 0) for each in due]
    return summarise_step(measured(rows, seconds=2.0), read_slo("p99=50ms"), ["a"])


def test_capacity_is_the_best_load_and_what_it_costs() -> None:
    steps = [queue_step(load) for load in (10.0, 60.0, 99.0)]
    found = capacity(steps, read_slo("p99=50ms"), servers=2, price_per_hour=3.6)  # type: ignore[arg-type]
    assert (found.knee, found.best) == (1, 1)
    assert (found.largest_context, found.largest_context_step) == (8, 1)
    # 2 servers at 3.6 an hour are 0.002 a second, for 480 tokens.
    assert found.cost_per_million_tokens == pytest.approx(0.002 / 480 * 1e6)
    assert found.most_callers is None


@given(
    constant=st.floats(0, 1e-3), linear=st.floats(1e-7, 1e-5), quadratic=st.floats(0, 1e-8),
    kinds=st.integers(3, 60),
)  # fmt: skip
def test_service_times_are_what_they_were_made_of(
    constant: float, linear: float, quadratic: float, kinds: int
) -> None:
    lengths = np.repeat(np.unique(np.geomspace(16, 4096, kinds).astype(np.int32)), 5)
    seconds = constant + linear * lengths + quadratic * lengths.astype(float) ** 2
    found = fit_service(lengths, seconds)
    assert found is not None
    # Of an even number in a group the medians are between two: almost on the curve.
    assert found.off < 0.05
    for length in (64, 1024, 4000):
        true = constant + linear * length + quadratic * length**2
        assert found.at(length) == pytest.approx(true, rel=0.01 if kinds <= 12 else 0.05)


def test_one_length_is_no_service_time() -> None:
    assert fit_service(np.full(100, 64, np.int32), np.full(100, 0.001)) is None
    assert fit_service(np.empty(0, np.int32), np.empty(0)) is None
    assert fit_service(np.arange(4, dtype=np.int32), np.full(4, 0.001)) is None
