"""Counts and durations by model, as the statistics extension of the protocol has them."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from attnserve_server.wire.answers import Clock


@dataclass(frozen=True, slots=True)
class Duration:
    """How often, and for how many nanoseconds in sum."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class Batches:
    """The runs with one number of sequences."""

    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """One version of a model, since the server started.

    Attributes:
        last_inference: milliseconds since 1970 of the last answer; 0: never.
        inferences: sequences answered.
        executions: runs of the model, each of one or more sequences.
        batches: by the number of sequences of a run.
    """

    last_inference: int
    inferences: int
    executions: int
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    batches: Mapping[int, Batches]


class Statistics:
    """The counts of every model that was ever called. Safe to call from several threads."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], _Sums] = {}
        self._lock = threading.Lock()

    def of(self, name: str, version: int) -> ModelCounts:
        """What was counted of one version of a model."""
        with self._lock:
            return self._sums.get((name, version), _Sums()).counts()

    def answered(self, name: str, version: int, sequences: int, clock: Clock, now: int) -> None:
        """Count a request that was answered and, if it leads, the run that it was part of.

        Args:
            name, version: the model.
            sequences: of the request.
            clock: when what happened.
            now: when its answer was ready, as `clock` counts.
        """
        taken = clock.validated - clock.arrived
        waited = round(clock.waited * 1e9)
        ran = round(clock.computed * 1e9)
        given = max(0, now - clock.validated - waited - ran)
        with self._lock:
            sums = self._sums.setdefault((name, version), _Sums())
            sums.last_ns = time.time_ns()
            sums.requests += 1
            sums.inferences += sequences
            sums.success += now - clock.arrived
            sums.queue += waited
            sums.compute.add(taken, ran, given)
            if clock.leads:
                sums.runs.setdefault(clock.sequences, _Compute()).add(taken, ran, given)

    def failed(self, name: str, version: int, ns: int) -> None:
        """Count a request that was not answered, `ns` after its arrival."""
        with self._lock:
            sums = self._sums.setdefault((name, version), _Sums())
            sums.fails += 1
            sums.fail += ns


class _Compute:
    """How often, and for how many nanoseconds in sum."""

    __slots__ = ("count", "given", "ran", "taken")

    def __init__(self) -> None:
        self.count = self.taken = self.ran = self.given = 0

    def add(self, taken: int, ran: int, given: int) -> None:
        """Count once: nanoseconds for taking the request in, running, and giving the answer out."""
        self.count += 1
        self.taken += taken
        self.ran += ran
        self.given += given

    def durations(self) -> tuple[Duration, Duration, Duration]:
        """Input, infer and output."""
        count = self.count
        return Duration(count, self.taken), Duration(count, self.ran), Duration(count, self.given)


class _Sums:
    """What is counted of one model, in nanoseconds: as little work per request as can be."""

    __slots__ = (
        "compute",
        "fail",
        "fails",
        "inferences",
        "last_ns",
        "queue",
        "requests",
        "runs",
        "success",
    )

    def __init__(self) -> None:
        self.last_ns = self.requests = self.inferences = self.success = self.queue = 0
        self.fails = self.fail = 0
        # Over requests, and over runs by the number of sequences that each had.
        self.compute = _Compute()
        self.runs: dict[int, _Compute] = {}

    def counts(self) -> ModelCounts:
        """The same as values."""
        compute_input, compute_infer, compute_output = self.compute.durations()
        return ModelCounts(
            last_inference=self.last_ns // 1_000_000,
            inferences=self.inferences,
            executions=sum(run.count for run in self.runs.values()),
            success=Duration(self.requests, self.success),
            fail=Duration(self.fails, self.fail),
            queue=Duration(self.requests, self.queue),
            compute_input=compute_input,
            compute_infer=compute_infer,
            compute_output=compute_output,
            batches={size: Batches(*run.durations()) for size, run in self.runs.items()},
        )
