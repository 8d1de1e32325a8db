"""Counts and durations by model, as the statistics extension of the protocol has them."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from attnserve_server.wire.answers import Clock


@dataclass(frozen=True, slots=True)
class Duration:
    """How often, and for how many nanoseconds in sum."""

    count: int = 0
    ns: int = 0

    def plus(self, ns: int, count: int = 1) -> "Duration":
        """With one more occurrence, or `count` more."""
        return Duration(self.count + count, self.ns + max(0, ns))


@dataclass(frozen=True, slots=True)
class Batches:
    """The runs with one number of sequences."""

    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """One version of a model, since the server started.

    Attributes:
        last_inference: milliseconds since 1970 of the last answer; 0: never.
        inferences: sequences answered.
        executions: runs of the model, each of one or more sequences.
        batches: by the number of sequences of a run.
    """

    last_inference: int = 0
    inferences: int = 0
    executions: int = 0
    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    batches: Mapping[int, Batches] = field(default_factory=dict)


class Statistics:
    """The counts of every model that was ever called. Safe to call from several threads."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int], ModelCounts] = {}
        self._lock = threading.Lock()

    def of(self, name: str, version: int) -> ModelCounts:
        """What was counted of one version of a model."""
        return self._counts.get((name, version), ModelCounts())

    def answered(self, name: str, version: int, sequences: int, clock: Clock, now: int) -> None:
        """Count a request that was answered, and, if it leads, the run of the model that it had.

        Args:
            name, version: the model.
            sequences: of the request.
            clock: when what happened.
            now: when its answer was ready, as `clock` counts.
        """
        taken = clock.validated - clock.arrived
        waited = round(clock.waited * 1e9)
        ran = round(clock.computed * 1e9)
        given = now - clock.validated - waited - ran
        with self._lock:
            old = self._counts.get((name, version), ModelCounts())
            batches = old.batches
            if clock.leads:
                batch = batches.get(clock.sequences, Batches())
                batch = Batches(
                    batch.compute_input.plus(taken),
                    batch.compute_infer.plus(ran),
                    batch.compute_output.plus(given),
                )
                batches = {**batches, clock.sequences: batch}
            self._counts[name, version] = ModelCounts(
                last_inference=time.time_ns() // 1_000_000,
                inferences=old.inferences + sequences,
                executions=old.executions + clock.leads,
                success=old.success.plus(now - clock.arrived),
                fail=old.fail,
                queue=old.queue.plus(waited),
                compute_input=old.compute_input.plus(taken),
                compute_infer=old.compute_infer.plus(ran),
                compute_output=old.compute_output.plus(given),
                batches=batches,
            )

    def failed(self, name: str, version: int, ns: int) -> None:
        """Count a request that was not answered, `ns` after its arrival."""
        with self._lock:
            old = self._counts.get((name, version), ModelCounts())
            self._counts[name, version] = replace(old, fail=old.fail.plus(ns))
