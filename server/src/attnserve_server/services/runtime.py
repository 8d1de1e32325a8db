"""What the services share: models, scheduler, limits, and how a checked request is run."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import grpc

from attnserve_server.dtypes import Array
from attnserve_server.engine import joining, tokens
from attnserve_server.engine.models import ModelStore
from attnserve_server.engine.work import AttendWork, SequenceOutput, TokensWork
from attnserve_server.kept_tensors import KeptTensors
from attnserve_server.metrics import Metrics
from attnserve_server.scheduler import Job, Scheduler, Ticket
from attnserve_server.scheduler.gate import Gate
from attnserve_server.scheduler.job import NORMAL
from attnserve_server.scheduler.memory import ByteBudget
from attnserve_server.settings import Limits
from attnserve_server.shared_memory import SharedRegions
from attnserve_server.wire.answers import Clock

W = TypeVar("W", AttendWork, TokensWork)
R = TypeVar("R")

# Deadlines further off than this are none: a call without one has one in the far future.
_FAR_SECONDS = 1e7


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything that a request needs; `pool` is for the readers and computations of streams."""

    store: ModelStore
    scheduler: Scheduler
    gate: Gate
    budget: ByteBudget
    limits: Limits
    metrics: Metrics
    pool: ThreadPoolExecutor
    kept: KeptTensors
    regions: SharedRegions

    def attend(
        self, work: AttendWork, ticket: Ticket, arrived: int
    ) -> tuple[dict[str, Array], Clock]:
        """Schedule and run an attention; its arrays and when what happened.

        Args:
            work: checked.
            ticket: who waits for it.
            arrived: when its request came, `time.perf_counter_ns()`.
        """
        job = Job(
            work,
            joining.attend_together,
            work.kind,
            work.joinable,
            work.dims.batch,
            work.tensor_bytes,
            work.working_bytes,
        )
        return self._run(job, ticket, arrived, work.counted)

    def attend_tokens(
        self, work: TokensWork, ticket: Ticket, arrived: int
    ) -> tuple[list[SequenceOutput], Clock]:
        """Schedule and run a transformer; its outputs and when what happened."""
        job = Job(
            work,
            tokens.attend_tokens_together,
            tokens.kind(work),
            True,
            len(work.sequences),
            tokens.hidden_bytes(work),
            work.working_bytes,
        )
        return self._run(job, ticket, arrived, len(work.sequences))

    def _run(self, job: Job[W, R], ticket: Ticket, arrived: int, counted: int) -> tuple[R, Clock]:
        validated = time.perf_counter_ns()
        outcome = self.scheduler.run(ticket, job)
        work = job.work
        self.metrics.of_model(work.model.manifest.name, work.variant.name).observe(
            (validated - arrived) / 1e9,
            outcome.waited,
            outcome.computed,
            counted,
            outcome.sequences if outcome.leads and counted else 0,
        )
        return outcome.result, Clock(
            arrived, validated, outcome.waited, outcome.computed, outcome.sequences, outcome.leads
        )


def ticket_for(context: grpc.ServicerContext, priority: int = NORMAL) -> Ticket:
    """A ticket that ends with the call: its deadline, and its cancellation."""
    remaining = context.time_remaining()
    far = remaining is None or remaining > _FAR_SECONDS
    deadline = None if far else time.monotonic() + float(remaining or 0)
    ticket = Ticket(deadline, context.peer(), priority)
    if not context.add_callback(ticket.cancel):
        ticket.cancel()
    return ticket
