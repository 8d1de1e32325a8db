"""What the services share: models, scheduler, limits, and how a checked request is run."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import grpc

from attnserve_server.dtypes import Array
from attnserve_server.engine import run
from attnserve_server.engine.models import ModelStore
from attnserve_server.engine.work import AttendWork, SequenceOutput, TokensWork
from attnserve_server.metrics import Metrics
from attnserve_server.scheduler import Places, Ticket
from attnserve_server.scheduler.memory import ByteBudget
from attnserve_server.settings import Limits
from attnserve_server.wire.answers import Clock

T = TypeVar("T")

# Deadlines further off than this are none: a call without one has one in the far future.
_FAR_SECONDS = 1e7


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything that a request needs; `pool` is for the readers and computations of streams."""

    store: ModelStore
    places: Places
    budget: ByteBudget
    limits: Limits
    metrics: Metrics
    pool: ThreadPoolExecutor

    def attend(
        self, work: AttendWork, ticket: Ticket, arrived: int
    ) -> tuple[dict[str, Array], Clock]:
        """Schedule and run an attention; its arrays and when what happened."""
        labels = (work.model.manifest.name, work.variant.name)
        return self._run(lambda: run.attend(work), ticket, arrived, labels, work.batch)

    def attend_tokens(
        self, work: TokensWork, ticket: Ticket, arrived: int
    ) -> tuple[list[SequenceOutput], Clock]:
        """Schedule and run a transformer; its outputs and when what happened."""
        labels = (work.model.manifest.name, work.variant.name)
        return self._run(
            lambda: run.attend_tokens(work), ticket, arrived, labels, len(work.sequences)
        )

    def _run(
        self,
        work: Callable[[], T],
        ticket: Ticket,
        arrived: int,
        labels: tuple[str, str],
        sequences: int,
    ) -> tuple[T, Clock]:
        validated = time.perf_counter_ns()
        result, waited = self.places.run(ticket, work)
        computed = time.perf_counter_ns()
        seconds = self.metrics.seconds
        seconds.labels(*labels, "deserialize").observe((validated - arrived) / 1e9)
        seconds.labels(*labels, "queue").observe(waited)
        seconds.labels(*labels, "compute").observe((computed - validated) / 1e9 - waited)
        self.metrics.sequences.labels(*labels).inc(sequences)
        return result, Clock(arrived, validated, computed, waited)


def ticket_for(context: grpc.ServicerContext) -> Ticket:
    """A ticket that ends with the call: its deadline, and its cancellation."""
    remaining = context.time_remaining()
    far = remaining is None or remaining > _FAR_SECONDS
    ticket = Ticket(None if far else time.monotonic() + float(remaining or 0))
    if not context.add_callback(ticket.cancel):
        ticket.cancel()
    return ticket
