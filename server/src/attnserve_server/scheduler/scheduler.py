"""Places to run in, and who runs together.

A request runs on the thread that brought it: where a place is free, nothing is handed over and
nothing waits. While all places are taken, requests gather in line; whoever gets the next place
takes along those of its kind, and runs all of them as one batch. So batches grow with the load,
and an idle server delays nobody.
"""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from attnserve_server.errors import DeadlineError, DrainingError, ExhaustedError
from attnserve_server.scheduler.estimates import Estimates
from attnserve_server.scheduler.job import Job, Outcome, Ticket
from attnserve_server.scheduler.line import Entry, Line, State

W = TypeVar("W")
R = TypeVar("R")

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Rules:
    """How a scheduler decides.

    Attributes:
        places: batches that run at once.
        max_queue: requests that may wait; one more is refused.
        max_queue_seconds: a request that would wait longer, by estimate, is refused, unless
        patience: it would wait no longer than for so many requests that take as long as itself.
        max_batch_size: sequences that run together.
        max_batch_bytes: tensors of requests that run together; a request above it runs alone.
        max_working_bytes: estimated memory of all that runs.
        batch_delay: seconds that a batch waits for more requests to join before it runs.
    """

    places: int = 1
    max_queue: int = 256
    max_queue_seconds: float = math.inf
    patience: int = 32
    max_batch_size: int = 64
    max_batch_bytes: int = 2 * _MIB
    max_working_bytes: int = 1 << 62
    batch_delay: float = 0.0


class Scheduler:
    """Runs jobs by the rules.

    Args:
        rules: see there.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._free = rules.places
        self._line = Line()
        # Leaders that run or are about to, and when they got their place.
        self._running: dict[Entry, float] = {}
        self._working_bytes = 0
        self._estimates = Estimates()
        self._lock = threading.Lock()
        self._joined = threading.Condition(self._lock)
        self._draining = False

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    def drain(self) -> None:
        """Refuse new requests; those that wait still run."""
        self._draining = True

    def check_room(self, ticket: Ticket) -> None:
        """Refuse a request before it is read, if the queue is full or the server shuts down.

        Raises:
            DrainingError, ExhaustedError: it would.
        """
        if self._line or self._draining:
            with self._lock:
                self._admit(ticket, None)

    def run(self, ticket: Ticket, job: Job[W, R]) -> Outcome[R]:
        """Wait for a place, then run the job on this thread, or be run along with another.

        Raises:
            DrainingError, ExhaustedError: refused at once.
            DeadlineError, CancelledError: nobody waits for it any more. It will not run, or, if it
                runs along with another, what comes of it is dropped.
            Exception: whatever running it raised.
        """
        entry = Entry(ticket, job, time.monotonic())
        with self._lock:
            ticket.check()
            entry.seconds = self._estimates.seconds(job.kind, job.sequences)
            if not self._draining and not self._line and self._has_room(entry):
                self._start(entry)
            else:
                self._admit(ticket, entry.seconds)
                self._line.add(entry)
                self._joined.notify_all()
        if entry.state is State.WAITING:
            self._wait(entry)
        if entry.state is State.LEADING:
            self._lead(entry)
        if isinstance(entry.outcome, Exception):
            raise entry.outcome
        return cast(Outcome[R], entry.outcome)

    def _admit(self, ticket: Ticket, seconds: float | None) -> None:
        """Refuse who finds the queue full, or would wait too long. The lock is held.

        Args:
            ticket: the request's.
            seconds: that it will take, by estimate; None: not known yet.
        """
        if self._draining:
            raise DrainingError("the server is shutting down; try another one")
        if not self._line and self._free:
            return
        rules = self._rules
        ahead = self._seconds_ahead(ticket.priority)
        waiting = len(self._line)
        if waiting >= rules.max_queue:
            raise ExhaustedError(
                f"queue: {waiting} requests are waiting; allowed: {rules.max_queue}",
                retry_after=max(ahead / 2, 0.001),
            )
        if seconds is None:
            return
        left = ticket.seconds_left()
        allowed = max(rules.max_queue_seconds, rules.patience * seconds)
        why = "(--max-queue-ms)"
        if left is not None and left - seconds < allowed:
            allowed, why = max(0.0, left - seconds), "until the deadline"
        if ahead > allowed:
            raise ExhaustedError(
                f"queue: the wait would be about {ahead * 1e3:.0f} ms; allowed: "
                f"{allowed * 1e3:.0f} ms {why}",
                retry_after=max(ahead - allowed, 0.001),
            )

    def _seconds_ahead(self, priority: int) -> float:
        now = time.monotonic()
        running = sum(max(0.0, e.seconds - (now - at)) for e, at in self._running.items())
        return (running + self._line.seconds_ahead(priority)) / self._rules.places

    def _has_room(self, entry: Entry) -> bool:
        """Whether there is a place, and memory beside what runs. The lock is held."""
        room = self._rules.max_working_bytes - self._working_bytes
        return self._free > 0 and (entry.job.working_bytes <= room or not self._running)

    def _start(self, entry: Entry) -> None:
        """Give an entry a place. The lock is held."""
        self._free -= 1
        self._working_bytes += entry.job.working_bytes
        entry.state = State.LEADING
        self._running[entry] = time.monotonic()

    def _wait(self, entry: Entry) -> None:
        """Until the entry leads or is done.

        Raises:
            DeadlineError, CancelledError: nobody waits for it any more.
        """
        ticket = entry.ticket
        ticket.when_cancelled(entry.called.set)
        while True:
            called = entry.called.wait(ticket.seconds_left())
            with self._lock:
                if entry.state in (State.LEADING, State.DONE):
                    return
                if entry.state is State.WAITING:
                    self._line.remove(entry)
                    # The first in line may have been too large to start beside what runs.
                    self._call_next()
                    ticket.check()
                elif called:
                    ticket.check()
                    entry.called.clear()
                    continue
            raise DeadlineError("the deadline passed before the computation ended")

    def _lead(self, entry: Entry) -> None:
        """Run an entry and those that go with it; then pass the place on."""
        try:
            entry.ticket.check()
            batch = self._gather(entry)
        except Exception:
            self._leave(entry, [])
            raise
        started = time.monotonic()
        results = _run(batch)
        computed = time.monotonic() - started
        together = sum(each.job.sequences for each in batch)
        for each, result in zip(batch, results, strict=True):
            waited = started - each.arrived
            each.outcome = (
                result
                if isinstance(result, Exception)
                else Outcome(result, waited, computed, together, each is entry)
            )
        self._leave(entry, batch)

    def _gather(self, leader: Entry) -> list[Entry]:
        """The leader and those in line that may run with it."""
        batch = [leader]
        job, rules = leader.job, self._rules
        if not job.joinable or rules.max_batch_size <= 1:
            return batch
        sequences, tensor_bytes = job.sequences, job.tensor_bytes
        until = leader.arrived + rules.batch_delay
        with self._lock:
            while True:
                for entry in [e for e in self._line if e.job.kind == job.kind]:
                    more = entry.job
                    if not more.joinable:
                        continue
                    if (
                        sequences + more.sequences > rules.max_batch_size
                        or tensor_bytes + more.tensor_bytes > rules.max_batch_bytes
                        or self._working_bytes + more.working_bytes > rules.max_working_bytes
                    ):
                        return batch
                    self._line.remove(entry)
                    entry.state = State.FOLLOWING
                    batch.append(entry)
                    sequences += more.sequences
                    tensor_bytes += more.tensor_bytes
                    self._working_bytes += more.working_bytes
                left = until - time.monotonic()
                if left <= 0 or sequences == rules.max_batch_size:
                    return batch
                self._joined.wait(left)

    def _leave(self, leader: Entry, batch: Sequence[Entry]) -> None:
        """Give the place back, and tell those who ran."""
        now = time.monotonic()
        with self._lock:
            since = self._running.pop(leader)
            self._free += 1
            self._working_bytes -= sum(e.job.working_bytes for e in batch or [leader])
            if batch:
                # From getting the place on: what a computation keeps others waiting for.
                sequences = sum(entry.job.sequences for entry in batch)
                self._estimates.observe(leader.job.kind, sequences, now - since)
            self._call_next()
            for entry in batch:
                entry.state = State.DONE
        for entry in batch:
            if entry is not leader:
                entry.called.set()

    def _call_next(self) -> None:
        """Give free places to the first in line. The lock is held."""
        while (entry := self._line.first()) is not None and self._has_room(entry):
            self._line.serve(entry)
            self._start(entry)
            entry.called.set()


def _run(batch: Sequence[Entry]) -> list[object]:
    """The result of each entry, or what running it raised."""
    run = batch[0].job.run
    if len(batch) > 1:
        try:
            return list(run([entry.job.work for entry in batch]))
        except Exception:
            # One of them may be at fault: the others must not suffer for it.
            pass
    results: list[object] = []
    for entry in batch:
        try:
            results.extend(run([entry.job.work]))
        except Exception as error:
            results.append(error)
    return results
