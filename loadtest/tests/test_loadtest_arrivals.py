"""When requests are due, what they are, and what their times are counted from."""

from argparse import ArgumentTypeError

import numpy as np
import pytest
from attnserve_loadtest.load.arrivals import Arrivals, read_arrivals
from attnserve_loadtest.load.measured import (
    ANSWERED,
    CANCELLED,
    FAILED,
    REFUSED,
    ROW,
    Measured,
)
from attnserve_loadtest.load.plan import Arrival, Cancel, Load, plan
from attnserve_loadtest.load.requests import Generation, Mix, Single, Span
from hypothesis import given
from hypothesis import strategies as st


class Nowhere:
    """A target that no test here connects to."""

    def connect(self) -> object:
        raise NotImplementedError


def load(**options: object) -> Load:
    return Load(Nowhere(), **({"seconds": 1.0} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["poisson", "constant", "bursts:10"])
def test_arrivals_keep_their_rate(kind: str) -> None:
    arrivals = read_arrivals(kind)
    assert str(arrivals) == kind
    times = arrivals.due_times(rate=150.0, seconds=100.0)
    expected = 15_000
    # A standard deviation of a count is the root of the bursts expected, times their size.
    deviation = 0 if kind == "constant" else (expected / arrivals.size) ** 0.5 * arrivals.size
    assert len(times) == pytest.approx(expected, abs=6 * deviation)
    assert times.min() >= 0
    assert times.max() < 100
    assert (np.diff(times) >= 0).all()
    bursts, sizes = np.unique(times, return_counts=True)
    assert set(sizes) == {arrivals.size}
    gaps = np.diff(bursts)
    # The coefficient of variation of gaps: 1 of a Poisson process, 0 of a constant one.
    assert gaps.std() / gaps.mean() == pytest.approx(0 if kind == "constant" else 1, abs=0.08)


@pytest.mark.parametrize(
    "text", ["", "poison", "bursts", "bursts:1", "bursts:x", "bursts:-3", "poisson:3", "bursts:٣"]
)
def test_other_arrivals_are_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="allowed: poisson, constant or bursts:N"):
        read_arrivals(text)


@given(
    rate=st.floats(1, 2000),
    kind=st.sampled_from([Arrivals(), Arrivals("constant"), Arrivals("bursts", 7)]),
    seed=st.integers(0, 1 << 31),
    count=st.integers(1, 5),
)
def test_processes_share_one_plan(rate: float, kind: Arrivals, seed: int, count: int) -> None:
    """However many processes send it, the same requests are due at the same times."""
    mix = Mix((16, 32), (3, 1), sessions=0.3, think=0.1)
    whole = load(
        rate=rate, arrivals=kind, mix=mix, seed=seed, warm_up=0.25, cancel=Cancel(0.2, 0.01)
    )
    parts = [plan(whole, number, count) for number in range(count)]
    assert sorted((each for part in parts for each in part), key=_key) == sorted(
        plan(whole), key=_key
    )
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    other = plan(load(rate=rate, arrivals=kind, mix=mix, seed=seed + 1, warm_up=0.25))
    if kind.kind != "constant" and len(other) > 3:
        assert [each.due for each in other] != [each.due for each in plan(whole)]


def _key(arrival: Arrival) -> tuple[float, str]:
    return arrival.due, repr(arrival)


def test_a_mix_has_the_shares_it_was_given() -> None:
    mix = Mix((64, 256), (3, 1), sessions=0.2, prompt=Span(8, 16), tokens=Span(1, 4), think=0.5)
    drawn = mix.draw(20_000, np.random.default_rng(0))
    sessions = [each for each in drawn if isinstance(each, Generation)]
    singles = [each.seq_len for each in drawn if isinstance(each, Single)]
    assert len(sessions) / 20_000 == pytest.approx(0.2, abs=0.02)
    assert singles.count(64) / len(singles) == pytest.approx(0.75, abs=0.02)
    assert {each.prompt for each in sessions} == set(range(8, 17))
    assert {each.tokens for each in sessions} == {1, 2, 3, 4}
    assert np.mean([each.think for each in sessions]) == pytest.approx(0.5, rel=0.1)


def test_a_schedule_is_sent_as_it_is() -> None:
    schedule = tuple(Arrival(n / 10, Single(n + 1)) for n in range(7))
    whole = load(schedule=schedule, warm_up=1.0)
    assert whole.is_open
    parts = [plan(whole, number, 2) for number in range(2)]
    assert [each.request for each in parts[1]] == [Single(2), Single(4), Single(6)]
    assert [each.due for each in parts[0]] == pytest.approx([1.0, 1.2, 1.4, 1.6])


def rows(*given: tuple[float, float, float, int]) -> np.ndarray:
    """Of (due, sent, done, outcome)."""
    table = np.zeros(len(given), ROW)
    for row, (due, sent, done, outcome) in zip(table, given, strict=True):
        row["due"], row["sent"], row["done"], row["outcome"] = due, sent, done, outcome
    return table


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A request sent late because the client was busy is as slow as its caller found it."""
    measured = Measured(
        load=load(seconds=2.0, rate=2.0),
        rows=rows(
            (-0.5, -0.5, -0.4, ANSWERED),
            (0.5, 0.5, 0.6, ANSWERED),
            (1.0, 1.4, 1.5, ANSWERED),
            (1.5, 1.5, 1.501, REFUSED),
            (1.6, 1.6, 1.7, CANCELLED),
            (2.5, 2.5, 2.6, ANSWERED),
        ),
    )
    assert measured.count(ANSWERED) == 2  # neither the warm-up's nor what was due later
    assert measured.count(REFUSED) == measured.count(CANCELLED) == 1
    assert measured.count(FAILED) == 0
    assert measured.latency_ms(1.0) == pytest.approx(500)
    assert measured.late_ms(1.0) == pytest.approx(400)
    assert measured.refusal_ms(1.0) == pytest.approx(1)
    assert measured.goodput(0.2) == pytest.approx(0.5)
    assert measured.goodput(1.0) == pytest.approx(1.0)
    assert measured.throughput == pytest.approx(1.0)
