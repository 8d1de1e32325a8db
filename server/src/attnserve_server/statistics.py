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
        """Count a request that was answered, and the run of the model that it had.

        Args:
            name, version: the model.
            sequences: of the request.
            clock: when what happened.
            now: when its answer was ready, as `clock` counts.
        """
        taken = clock.validated - clock.arrived
        waited = round(clock.waited * 1e9)
        ran = max(0, clock.computed - clock.validated - waited)
        given = now - clock.computed
        with self._lock:
            sums = self._sums.setdefault((name, version), _Sums())
            sums.last_ns = time.time_ns()
            sums.inferences += sequences
            sums.success += now - clock.arrived
            sums.queue += waited
            run = sums.runs.setdefault(sequences, _Runs())
            run.count += 1
            run.compute_input += taken
            run.compute_infer += ran
            run.compute_output += given

    def failed(self, name: str, version: int, ns: int) -> None:
        """Count a request that was not answered, `ns` after its arrival."""
        with self._lock:
            sums = self._sums.setdefault((name, version), _Sums())
            sums.fails += 1
            sums.fail += ns


@dataclass(slots=True)
class _Runs:
    """Sums over the runs with one number of sequences, in nanoseconds."""

    count: int = 0
    compute_input: int = 0
    compute_infer: int = 0
    compute_output: int = 0


class _Sums:
    """What is counted of one model, in nanoseconds: as little work per request as can be."""

    __slots__ = ("fail", "fails", "inferences", "last_ns", "queue", "runs", "success")

    def __init__(self) -> None:
        self.last_ns = self.inferences = self.success = self.queue = self.fails = self.fail = 0
        self.runs: dict[int, _Runs] = {}

    def counts(self) -> ModelCounts:
        """The same as values."""
        runs = self.runs.values()
        count = sum(run.count for run in runs)
        return ModelCounts(
            last_inference=self.last_ns // 1_000_000,
            inferences=self.inferences,
            executions=count,
            success=Duration(count, self.success),
            fail=Duration(self.fails, self.fail),
            queue=Duration(count, self.queue),
            compute_input=Duration(count, sum(run.compute_input for run in runs)),
            compute_infer=Duration(count, sum(run.compute_infer for run in runs)),
            compute_output=Duration(count, sum(run.compute_output for run in runs)),
            batches={
                size: Batches(
                    Duration(run.count, run.compute_input),
                    Duration(run.count, run.compute_infer),
                    Duration(run.count, run.compute_output),
                )
                for size, run in self.runs.items()
            },
        )
