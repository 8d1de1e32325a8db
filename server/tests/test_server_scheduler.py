"""Who runs when, with whom, and who is refused."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from attnserve_server.errors import (
    CancelledError,
    DeadlineError,
    DrainingError,
    ExhaustedError,
)
from attnserve_server.scheduler import Job, Outcome, Ticket
from attnserve_server.scheduler.estimates import Estimates
from attnserve_server.scheduler.job import HIGH, LOW
from attnserve_server.scheduler.scheduler import Rules, Scheduler
from hypothesis import given, settings
from hypothesis import strategies as st


class Bench:
    """A scheduler whose jobs write down who ran together; `hold` keeps its places taken."""

    def __init__(self, **rules: float) -> None:
        self.scheduler = Scheduler(Rules(**rules))  # type: ignore[arg-type]
        self.runs: list[list[str]] = []
        self.pool = ThreadPoolExecutor(64)
        self._release = threading.Event()
        self._holders: list[Future[Outcome[str]]] = []

    def run(self, works: Sequence[str]) -> Sequence[str]:
        self.runs.append(list(works))
        if any(work.startswith("bad") for work in works):
            raise ValueError(works)
        return [work.upper() for work in works]

    def job(self, work: str, kind: str = "k", **changes: object) -> Job[str, str]:
        fields: dict[str, object] = {
            "run": self.run, "kind": kind, "joinable": True, "sequences": 1, "tensor_bytes": 10
        }  # fmt: skip
        return Job(work, **(fields | changes))  # type: ignore[arg-type]

    def send(
        self, work: str, ticket: Ticket | None = None, kind: str = "k", **changes: object
    ) -> "Future[Outcome[str]]":
        """Send a job from a thread of its own; returns once it waits."""
        before = self.scheduler.waiting
        future = self.pool.submit(
            self.scheduler.run, ticket or Ticket(), self.job(work, kind, **changes)
        )
        until(lambda: self.scheduler.waiting > before or future.done())
        return future

    def hold(self, places: int = 1) -> None:
        taken = threading.Semaphore(0)

        def run(works: Sequence[str]) -> Sequence[str]:
            taken.release()
            assert self._release.wait(20)
            return works

        for _ in range(places):
            job = Job("held", run, "held", joinable=False, sequences=1, tensor_bytes=0)
            self._holders.append(self.pool.submit(self.scheduler.run, Ticket(), job))
            assert taken.acquire(timeout=5)

    def release(self) -> None:
        self._release.set()
        for holder in self._holders:
            holder.result(5)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_idle_server_runs_a_request_at_once_and_alone() -> None:
    bench = Bench()
    outcome = bench.scheduler.run(Ticket(), bench.job("a"))
    assert outcome.result == "A"
    assert (outcome.sequences, outcome.leads) == (1, True)
    assert outcome.waited < 1


def test_what_gathers_while_the_place_is_taken_runs_as_one_batch_for_each_kind() -> None:
    bench = Bench()
    bench.hold()
    futures = [bench.send(name, kind=kind) for name, kind in ("ax", "by", "cx", "dy", "ex")]
    bench.release()
    outcomes = [future.result(5) for future in futures]
    assert bench.runs == [["a", "c", "e"], ["b", "d"]]
    assert [outcome.result for outcome in outcomes] == ["A", "B", "C", "D", "E"]
    assert [outcome.sequences for outcome in outcomes] == [3, 2, 3, 2, 3]
    assert [outcome.leads for outcome in outcomes] == [True, True, False, False, False]
    assert all(outcome.waited > 0 for outcome in outcomes)


@pytest.mark.parametrize(
    ("rules", "changes"),
    [
        ({"max_batch_size": 2}, {}),
        ({"max_batch_size": 4}, {"sequences": 2}),
        ({"max_batch_bytes": 20}, {}),
        ({"max_working_bytes": 20}, {"working_bytes": 10}),
    ],
)
def test_a_batch_grows_to_its_limits_and_no_further(
    rules: dict[str, float], changes: dict[str, object]
) -> None:
    bench = Bench(**rules)
    bench.hold()
    futures = [bench.send(name, **changes) for name in "abcde"]
    bench.release()
    assert [future.result(5).result for future in futures] == list("ABCDE")
    assert bench.runs == [["a", "b"], ["c", "d"], ["e"]]


def test_without_batching_everyone_runs_alone() -> None:
    bench = Bench(max_batch_size=1)
    bench.hold()
    futures = [bench.send(name) for name in "abc"]
    bench.release()
    assert [future.result(5).sequences for future in futures] == [1, 1, 1]
    assert bench.runs == [["a"], ["b"], ["c"]]


def test_what_cannot_be_joined_runs_alone() -> None:
    bench = Bench()
    bench.hold()
    futures = [bench.send("a"), bench.send("b", joinable=False), bench.send("c")]
    bench.release()
    [future.result(5) for future in futures]
    assert bench.runs == [["a", "c"], ["b"]]


def test_a_delay_lets_others_join_an_idle_server() -> None:
    bench = Bench(batch_delay=5.0, max_batch_size=3)
    first = bench.pool.submit(bench.scheduler.run, Ticket(), bench.job("a"))
    until(lambda: bool(bench.scheduler._running))
    others = [bench.pool.submit(bench.scheduler.run, Ticket(), bench.job(n)) for n in "bcd"]
    # Full with three: it does not wait for the rest of the delay.
    assert first.result(4).sequences == 3
    bench.scheduler.drain()
    assert sum(other.done() for other in others) <= 3


def test_higher_priorities_are_served_first() -> None:
    bench = Bench(max_batch_size=1)
    bench.hold()
    tickets = {"low": LOW, "first": 2, "second": 2, "high": HIGH}
    futures = [bench.send(name, Ticket(priority=level)) for name, level in tickets.items()]
    bench.release()
    [future.result(5) for future in futures]
    assert bench.runs == [["high"], ["first"], ["second"], ["low"]]


def test_a_caller_who_sends_many_waits_behind_its_own_requests() -> None:
    bench = Bench(max_batch_size=1)
    bench.hold()
    futures = [bench.send(f"a{n}", Ticket(caller="a")) for n in range(3)]
    futures += [bench.send(f"b{n}", Ticket(caller="b")) for n in range(2)]
    bench.release()
    [future.result(5) for future in futures]
    assert bench.runs == [["a0"], ["b0"], ["a1"], ["b1"], ["a2"]]


def test_giving_up_late_requests_sets_nobody_back() -> None:
    bench = Bench(max_batch_size=1)
    bench.hold()
    ticket = Ticket(caller="a")
    futures = [bench.send(f"a{n}", Ticket(caller="a")) for n in range(3)]
    given_up = bench.send("a3", ticket)
    ticket.cancel()
    with pytest.raises(CancelledError):
        given_up.result(5)
    futures.append(bench.send("b0", Ticket(caller="b")))
    bench.release()
    [future.result(5) for future in futures]
    assert bench.runs == [["a0"], ["b0"], ["a1"], ["a2"]]


def test_those_taken_along_by_a_batch_set_nobody_back() -> None:
    bench = Bench(max_batch_size=4)
    bench.hold()
    futures = [bench.send(f"a{n}", Ticket(caller="a"), kind="xy"[n % 2]) for n in range(8)]
    running, go_on = threading.Event(), threading.Event()

    def run(works: Sequence[str]) -> Sequence[str]:
        running.set()
        assert go_on.wait(5)
        return bench.run(works)

    leader = bench.send("c0", Ticket(caller="c", priority=HIGH), kind="x", run=run)
    bench.release()
    assert running.wait(5)  # with three of kind x
    futures.append(bench.send("b0", Ticket(caller="b"), kind="z"))
    go_on.set()
    [future.result(5) for future in (leader, *futures)]
    assert bench.runs.index(["b0"]) == 1


def test_a_full_batch_waits_for_no_more() -> None:
    bench = Bench(batch_delay=5.0, max_batch_size=2)
    first = bench.pool.submit(bench.scheduler.run, Ticket(), bench.job("a"))
    until(lambda: bool(bench.scheduler._running))
    second = bench.pool.submit(bench.scheduler.run, Ticket(), bench.job("b"))
    assert first.result(3).sequences == second.result(3).sequences == 2


def test_a_cancelled_request_leaves_the_queue_at_once_and_never_runs() -> None:
    bench = Bench()
    bench.hold()
    ticket = Ticket()
    gone, stays = bench.send("gone", ticket), bench.send("stays")
    ticket.cancel()
    with pytest.raises(CancelledError):
        gone.result(5)
    assert bench.scheduler.waiting == 1
    bench.release()
    stays.result(5)
    assert bench.runs == [["stays"]]


def test_an_expired_request_leaves_the_queue_and_never_runs() -> None:
    bench = Bench()
    bench.hold()
    gone = bench.send("gone", Ticket(deadline=time.monotonic() + 0.05))
    with pytest.raises(DeadlineError):
        gone.result(5)
    assert bench.scheduler.waiting == 0
    bench.release()
    assert bench.runs == []


def test_a_deadline_further_off_than_python_can_wait_is_waited_for() -> None:
    bench = Bench()
    bench.hold()
    waiting = bench.send("a", Ticket(deadline=1e13))
    time.sleep(0.05)
    assert not waiting.done()
    bench.release()
    assert waiting.result(5).result == "A"
    assert bench.scheduler.run(Ticket(), bench.job("b")).result == "B"


def test_one_bad_request_does_not_fail_those_it_was_joined_with() -> None:
    bench = Bench()
    bench.hold()
    futures = {name: bench.send(name) for name in ("a", "bad", "c")}
    bench.release()
    assert futures["a"].result(5).result == "A"
    assert futures["c"].result(5).result == "C"
    with pytest.raises(ValueError, match="bad"):
        futures["bad"].result(5)
    assert bench.runs == [["a", "bad", "c"], ["a"], ["bad"], ["c"]]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    bench = Bench(max_queue=2)
    bench.hold()
    waiting = [bench.send("a"), bench.send("b")]
    with pytest.raises(ExhaustedError, match="queue: 2 requests are waiting; allowed: 2") as error:
        bench.scheduler.run(Ticket(), bench.job("c"))
    assert error.value.retry_after is not None
    assert error.value.retry_after > 0
    bench.release()
    assert [future.result(5).result for future in waiting] == ["A", "B"]


def slow(works: Sequence[str]) -> Sequence[str]:
    time.sleep(0.05 * len(works))
    return works


def test_who_would_wait_too_long_is_refused_by_estimate() -> None:
    bench = Bench(max_batch_size=1, max_queue_seconds=0.2, patience=0)
    bench.scheduler.run(Ticket(), bench.job("a", run=slow))
    bench.hold()
    futures = [bench.send(str(number), run=slow) for number in range(7)]
    # Each takes 50 ms or more: four at most may wait before one would wait for over 200 ms.
    admitted = [future for future in futures if not future.done()]
    assert 1 <= len(admitted) <= 5
    for future in futures[len(admitted) :]:
        with pytest.raises(
            ExhaustedError, match=r"wait would be about .* allowed: 200 ms"
        ) as error:
            future.result(0)
        assert error.value.retry_after is not None
    # A higher priority waits for nobody here.
    urgent = bench.send("u", Ticket(priority=HIGH), run=slow)
    assert not urgent.done()
    bench.release()
    for future in (*admitted, urgent):
        future.result(5)


def test_slow_requests_may_wait_for_a_few_of_their_kind() -> None:
    bench = Bench(max_batch_size=1, max_queue_seconds=0.01, patience=5)
    bench.scheduler.run(Ticket(), bench.job("a", run=slow))
    bench.hold()
    futures = [bench.send(str(number), run=slow) for number in range(9)]
    refused = [future for future in futures if future.done()]
    assert 2 <= len(refused) <= 4
    bench.release()
    [future.result(5) for future in futures if future not in refused]


def test_who_would_not_be_done_before_its_deadline_is_refused_at_once() -> None:
    bench = Bench(max_batch_size=1)
    bench.scheduler.run(Ticket(), bench.job("a", run=slow))
    bench.hold()
    waiting = bench.send("b", run=slow)
    started = time.monotonic()
    with pytest.raises(ExhaustedError, match="until the deadline"):
        bench.scheduler.run(Ticket(started + 0.08), bench.job("c", run=slow))
    assert time.monotonic() - started < 0.04
    bench.release()
    waiting.result(5)


def test_requests_run_beside_each_other_only_as_memory_allows() -> None:
    bench = Bench(places=2, max_working_bytes=100)
    together = threading.Barrier(2, timeout=0.3)

    def meet(works: Sequence[str]) -> Sequence[str]:
        together.wait()
        return works

    def send(size: int) -> "Future[Outcome[str]]":
        job = bench.job("a", run=meet, joinable=False, working_bytes=size)
        return bench.pool.submit(bench.scheduler.run, Ticket(), job)

    for future in [send(50), send(50)]:
        future.result(5)
    for future in [send(60), send(60)]:
        with pytest.raises(threading.BrokenBarrierError):
            future.result(5)


def test_a_drain_lets_those_who_wait_run_and_refuses_others() -> None:
    bench = Bench()
    bench.hold()
    waiting = bench.send("a")
    bench.scheduler.drain()
    with pytest.raises(DrainingError):
        bench.scheduler.run(Ticket(), bench.job("b"))
    with pytest.raises(DrainingError):
        bench.scheduler.check_room(Ticket())
    bench.release()
    assert waiting.result(5).result == "A"


def test_estimates_follow_what_was_observed() -> None:
    estimates = Estimates()
    assert estimates.seconds("k", 3) == 0
    estimates.observe("k", 2, 0.2)
    assert estimates.seconds("k", 3) == pytest.approx(0.3)
    for _ in range(40):
        estimates.observe("k", 1, 0.5)
    assert estimates.seconds("k", 1) == pytest.approx(0.5, rel=0.01)


@settings(max_examples=25, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(
            st.sampled_from("xyz"),
            st.integers(1, 3),
            st.integers(1, 3),
            st.booleans(),
            st.sampled_from(["run", "cancel", "expire", "bad"]),
        ),
        min_size=1,
        max_size=24,
    ),
    places=st.integers(1, 3),
    max_batch_size=st.integers(1, 6),
)
def test_whatever_comes_everyone_gets_their_own_answer_once(
    jobs: list[tuple[str, int, int, bool, str]], places: int, max_batch_size: int
) -> None:
    bench = Bench(places=places, max_batch_size=max_batch_size)

    def send(number: int) -> tuple[str, object]:
        kind, sequences, priority, joinable, fate = jobs[number]
        work = f"bad{number}" if fate == "bad" else f"job{number}"
        deadline = time.monotonic() + (0 if fate == "expire" else 20)
        ticket = Ticket(deadline, f"caller{number % 3}", priority)
        if fate == "cancel":
            threading.Timer(0.0005 * number, ticket.cancel).start()
        job = bench.job(work, kind, sequences=sequences, joinable=joinable)
        try:
            return work, bench.scheduler.run(ticket, job).result
        except Exception as error:
            return work, error

    ended = list(bench.pool.map(send, range(len(jobs))))
    allowed = {"run": str, "cancel": (str, CancelledError), "expire": DeadlineError}
    for (work, result), (*_, fate) in zip(ended, jobs, strict=True):
        assert isinstance(result, allowed.get(fate, ValueError))  # type: ignore[arg-type]
        if isinstance(result, str):
            assert result == work.upper()
    if not any(fate == "bad" for *_, fate in jobs):
        ran = [work for run in bench.runs for work in run]
        assert len(ran) == len(set(ran))
        assert set(ran) == {work for work, result in ended if isinstance(result, str)}
    assert bench.scheduler.waiting == 0
    assert bench.scheduler._free == places
    assert bench.scheduler._working_bytes == 0
