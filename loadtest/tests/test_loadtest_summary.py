from dataclasses import astuple

import pytest
from attnserve_client import Timings
from attnserve_loadtest.report.schema import PARTS, Settings
from attnserve_loadtest.samples import Failure, Sample
from attnserve_loadtest.schedule import blocks
from attnserve_loadtest.summary import LengthResult, Slice, distribution, summarise_length


def sample(end_to_end_ms: float, compute_ms: float = 1.0, queue_ms: float = 0.5) -> Sample:
    timings = Timings(100, round(queue_ms * 1e3), round(compute_ms * 1e3), 200, 2)
    return Sample("Attend", "m", "fused", 64, end_to_end_ms * 1e3, 256, timings)


FAILED = Sample("Attend", "m", "", 64, 9e9, failure=Failure("INTERNAL", "no"))


def test_percentiles_of_one_to_a_hundred() -> None:
    found = distribution([float(n) for n in range(101)])
    assert found is not None
    assert (found.p5, found.p50, found.p95, found.p99) == (5, 50, 95, 99)
    assert (found.minimum, found.maximum, found.mean) == (0, 100, 50)


def test_percentiles_interpolate_and_ignore_order() -> None:
    found = distribution([4.0, 1.0])
    assert found is not None
    assert found.p50 == 2.5


def test_no_durations_have_no_distribution() -> None:
    assert distribution([]) is None


def test_wire_is_end_to_end_less_the_time_in_the_server() -> None:
    slices = (Slice(0, 2.0, (sample(3), sample(5))), Slice(1, 2.0, (sample(4), FAILED)))
    point = summarise_length(LengthResult(64, 1024, slices), batch=2)
    assert point.wire is not None
    assert point.end_to_end is not None
    assert point.wire.mean == pytest.approx(4 - 1.8)
    assert point.end_to_end.mean == pytest.approx(4)
    assert point.end_to_end.maximum == pytest.approx(5)  # the failure's time is not in it
    assert (point.count, point.failures) == (3, 1)
    assert point.requests_per_second == pytest.approx(3 / 4)
    assert point.tokens_per_second == pytest.approx(3 / 4 * 2 * 64)
    assert point.batch_size == 2
    assert point.round_p50_ms == (4, 4)


@pytest.mark.parametrize(
    ("end_to_end_us", "timings"),
    [
        (569_000.0, Timings(1_000, 100_000, 400_000, 60_000, 1)),
        (1_000.0, Timings(100, 200, 500, 200, 1)),
        (999.2, Timings(101, 200, 500, 201, 1)),  # each rounded up
        (1_000_000.0, Timings(1, 0, 1_000_080, 2, 1)),  # a clock that is 83 in a million fast
        (0.4, Timings(1, 0, 1, 0, 1)),
        (3.0, Timings(0, 0, 0, 0, 1)),
    ],
)
def test_parts_add_up_to_the_end_to_end_and_none_is_negative(
    end_to_end_us: float, timings: Timings
) -> None:
    parts = Sample("Attend", "m", "fused", 64, end_to_end_us, 256, timings).parts()
    assert parts is not None
    assert sum(astuple(parts)) == pytest.approx(end_to_end_us)
    assert min(astuple(parts)) >= 0
    for name in ("deserialize", "queue", "compute", "serialize"):
        assert getattr(parts, name) == pytest.approx(getattr(timings, name), rel=0.9, abs=1)


def test_timings_that_exceed_the_end_to_end_are_no_parts_of_it() -> None:
    """Once measured at 4096 positions: queues of several heads, summed over heads."""
    timings = Timings(600_000, 1_143_000, 516_000, 100, 1)
    overlapping = Sample("Attend", "m", "fused", 4096, 569_000.0, 256, timings)
    assert overlapping.parts() is None
    slices = (Slice(0, 2.0, (overlapping, sample(3), sample(5))),)
    point = summarise_length(LengthResult(4096, 1024, slices), batch=1)
    assert (point.count, point.overlapping) == (3, 1)
    assert point.end_to_end is not None
    assert point.end_to_end.maximum == 569
    for name in PARTS:
        part = getattr(point, name)
        assert 0 <= part.minimum <= part.maximum <= 5
    assert sum(getattr(point, name).mean for name in PARTS) == pytest.approx(4)
    alone = (Slice(0, 2.0, (overlapping,)),)
    point = summarise_length(LengthResult(4096, 1024, alone), batch=1)
    assert (point.count, point.overlapping, point.wire) == (1, 1, None)


def test_length_without_answers_has_no_distributions() -> None:
    point = summarise_length(LengthResult(64, 1024, (Slice(0, 1.0, (FAILED,)),)), batch=1)
    assert point.end_to_end is None
    assert point.compute is None
    assert (point.count, point.failures, point.batch_size) == (0, 1, None)


def test_schedule_measures_every_length_equally_and_shuffles_each_round() -> None:
    settings = Settings(seq_lens=(1, 2, 3, 4, 5), requests=12, rounds=5, warmup=2, settle=1)
    plan = list(blocks(settings, lanes=5))
    measured = [block for block in plan if block.measured]
    for lane in range(5):
        assert sum(block.requests or 0 for block in measured if block.lane == lane) == 12
    orders = [[b.lane for b in measured if b.round == number] for number in range(5)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert plan == list(blocks(settings, lanes=5))
    assert [block.requests for block in plan[:5]] == [2] * 5


def test_schedule_by_duration_splits_the_seconds_over_the_rounds() -> None:
    settings = Settings(seq_lens=(1,), requests=None, duration_seconds=6.0, rounds=3, settle=0)
    measured = [block for block in blocks(settings, lanes=1) if block.measured]
    assert [block.seconds for block in measured] == [2.0] * 3


def test_more_rounds_than_requests_leave_rounds_empty() -> None:
    settings = Settings(seq_lens=(1,), requests=2, rounds=5, warmup=0)
    measured = [block for block in blocks(settings, lanes=1) if block.measured]
    assert [block.requests for block in measured] == [1, 1]
