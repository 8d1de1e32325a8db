"""How many servers there should be, by what was measured: decisions, without any server."""

from attnserve_cluster.scaling import Bounds, Load, Measured, Policy, Since, decide, together

POLICY = Policy(queue_seconds=0.02, kv_share=0.8, busy_seconds=10, idle_seconds=60)
BOUNDS = Bounds(1, 4)
IDLE = Measured(kv_most=100.0)
LATE = Measured(requests=10, queue_seconds=0.5, kv_most=100.0)
FULL = Measured(kv_bytes=90.0, kv_most=100.0)
# Neither: half of the wait that is too long; pages that one server less could not hold.
MIDDLING = Measured(requests=10, queue_seconds=0.1, kv_most=100.0)
HALF = Measured(kv_bytes=50.0, kv_most=100.0)


def run(target: int, seconds: int, measured: Measured | None, serving: int | None = None) -> int:
    """The target after so many seconds in which the servers say the same of themselves."""
    since = Since()
    for second in range(seconds + 1):
        load = Load(target if serving is None else serving, measured)
        target, since = decide(POLICY, BOUNDS, target, load, since, float(second))
    return target


def test_one_more_once_requests_wait_or_pages_are_taken_for_long_enough() -> None:
    for busy in (LATE, FULL):
        assert run(1, 9, busy) == 1
        assert run(1, 10, busy) == 2
        assert run(1, 1000, busy) == 4
    assert run(1, 1000, MIDDLING) == 1


def test_a_break_begins_it_anew() -> None:
    target, since = 1, Since()
    for second in range(100):
        load = Load(target, LATE if second % 10 else IDLE)
        target, since = decide(POLICY, BOUNDS, target, load, since, float(second))
    assert target == 1


def test_none_more_before_the_last_one_serves() -> None:
    assert run(2, 1000, LATE, serving=1) == 2
    # Its time begins once it does.
    _, since = decide(POLICY, BOUNDS, 2, Load(1, LATE), Since(busy=0.0), 100.0)
    assert since == Since(busy=100.0)


def test_one_less_once_all_have_been_idle_for_long_enough() -> None:
    assert run(4, 59, IDLE) == 4
    assert run(4, 60, IDLE) == 3
    assert run(4, 1000, IDLE) == 1
    assert run(4, 1000, MIDDLING) == 4


def test_none_less_if_the_others_could_not_hold_its_sessions() -> None:
    assert run(2, 1000, HALF) == 2  # one would hold all of its memory
    assert run(4, 61, HALF) == 4  # three: two thirds of theirs, and 0.6 is idle
    assert run(4, 61, Measured(kv_bytes=40.0, kv_most=100.0)) == 3


def test_bounds_hold_whatever_was_measured() -> None:
    for target, allowed in ((9, 4), (0, 1)):
        assert decide(POLICY, BOUNDS, target, Load(0, None), Since(), 0.0)[0] == allowed
    assert run(3, 1000, None) == 3


def test_loads_of_servers_are_added() -> None:
    assert together([]) == Load(0, None)
    assert together([None, None]) == Load(2, None)
    load = together([LATE, None, Measured(30, 0.1, 2, 50.0, 100.0)])
    assert load.servers == 3
    assert load.measured is not None
    assert load.measured.mean_queue_seconds == 0.6 / 40
    assert load.measured.share_of_kv == 0.25
    assert load.measured.sessions == 2
