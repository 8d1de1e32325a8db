"""Measures how latency grows with seq_len: a real Locust run, one length at a time."""

from attnserve_loadtest import gevent_grpc  # noqa: F401, I001  (patches; comes first)

import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

import gevent
from attnserve_client import AttentionClient, AttnserveError, Model
from attnserve_proto.commands import Access
from locust import User, task
from locust.env import Environment
from locust.exception import StopUser

from attnserve_loadtest.environment import client_facts, server_facts
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.gate import Gate
from attnserve_loadtest.payloads import Payload, check_request, make_payload
from attnserve_loadtest.progress import Progress
from attnserve_loadtest.publish import publish
from attnserve_loadtest.report.schema import SCHEMA, SCHEMA_VERSION, Report, Settings
from attnserve_loadtest.samples import Sample, measure
from attnserve_loadtest.schedule import Block, blocks
from attnserve_loadtest.summary import LengthResult, Slice, drift, summarise_series

_GRACE_SECONDS = 2.0
# That a server may take to come up.
_PREPARING_SECONDS = 10.0


@dataclass(slots=True)
class Lane:
    """One series at one length, and what was measured of it so far."""

    model: Model
    variant: str
    payload: Payload
    slices: list[Slice] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What the progress display calls the series."""
        return f"{self.model.name}/{self.variant}" if self.variant else self.model.name

    @property
    def is_hopeless(self) -> bool:
        """Every measured request of a whole block failed."""
        return any(
            each.samples and all(s.failure is not None for s in each.samples)
            for each in self.slices
        )


def run_scaling(
    target: str,
    models: Sequence[str],
    variants: Sequence[str],
    settings: Settings,
    access: Access,
    make_progress: Callable[[Sequence[tuple[str, int]], Settings], Progress],
) -> Report:
    """Measure every model and variant at every length.

    SIGINT or SIGTERM ends the run early; what was measured is reported, `complete` is False.

    Args:
        target: `host:port` of the server.
        models: names.
        variants: of each model; ("",) lets the server pick.
        settings: lengths, users, requests.
        access: how the server is reached.
        make_progress: given (series, seq_len) of each lane, what shows the progress.

    Raises:
        LoadTestError: the run cannot start, or no request was answered.
    """
    logging.getLogger("locust").setLevel(logging.ERROR)
    with AttentionClient(target, **access.of_client()) as client:
        lanes, server = _prepare(client, target, models, variants, settings)
        progress = make_progress([(lane.label, lane.payload.seq_len) for lane in lanes], settings)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        complete = _Run(client, target, lanes, settings, progress).run()
    _require_answers(lanes, complete)
    series = _series(lanes, settings)
    return Report(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        date=date,
        complete=complete,
        drift=drift(series),
        server=server,
        client=client_facts(),
        settings=settings,
        series=tuple(series),
    )


class _ScalingUser(User):
    """Takes turns at the gate; each run derives a class of its own with the fields set."""

    abstract = True
    gate: ClassVar[Gate]
    client: ClassVar[AttentionClient]
    lanes: ClassVar[list[Lane]]
    timeout_seconds: ClassVar[float]

    @task
    def send(self) -> None:
        """Send one request of the open block."""
        block = self.gate.take()
        if block is None:
            raise StopUser
        try:
            lane = self.lanes[block.lane]
            sample = measure(
                lane.payload, self.client, variant=lane.variant, timeout=self.timeout_seconds
            )
            publish(self.environment, sample, lane.variant, block=block)
        finally:
            self.gate.give_back()


class _Run:
    """One run of Locust's own runner over all blocks."""

    def __init__(
        self,
        client: AttentionClient,
        target: str,
        lanes: list[Lane],
        settings: Settings,
        progress: Progress,
    ) -> None:
        self._lanes = lanes
        self._settings = settings
        self._progress = progress
        self._gate = Gate()
        self._samples: list[Sample] = []
        self._interrupted = False
        user_class = type(
            "ScalingUser",
            (_ScalingUser,),
            {
                "gate": self._gate,
                "client": client,
                "lanes": lanes,
                "timeout_seconds": settings.timeout_seconds,
            },
        )
        self._environment: Any = Environment(
            user_classes=[user_class], host=target, stop_timeout=_GRACE_SECONDS
        )
        self._environment.events.request.add_listener(  # type: ignore[no-untyped-call]
            self._on_request
        )

    def run(self) -> bool:
        """Run all blocks; False if it was interrupted."""
        handlers = [
            gevent.signal_handler(each, self._interrupt) for each in (signal.SIGINT, signal.SIGTERM)
        ]
        runner: Any = self._environment.create_local_runner()
        try:
            with self._progress:
                users = self._settings.users
                runner.start(users, spawn_rate=min(users, 100))
                runner.spawning_greenlet.join()
                for block in blocks(self._settings, len(self._lanes)):
                    self._run_block(block)
                    if self._interrupted:
                        break
        finally:
            self._gate.close()
            runner.quit()
            for handler in handlers:
                handler.cancel()
        return not self._interrupted

    def _run_block(self, block: Block) -> None:
        lane = self._lanes[block.lane]
        if lane.is_hopeless:
            self._progress.skip(block)
            return
        self._samples = []
        seconds = self._gate.run(block)
        if block.measured and self._samples:
            lane.slices.append(Slice(block.round, seconds, tuple(self._samples)))
        self._progress.finish(block)

    def _on_request(self, context: dict[str, Any], **_: Any) -> None:
        sample, block = context["sample"], context["block"]
        if not self._interrupted:
            self._samples.append(sample)
            self._progress.add(block, sample)

    def _interrupt(self) -> None:
        self._interrupted = True
        self._gate.close()


def _prepare(
    client: AttentionClient,
    target: str,
    models: Sequence[str],
    variants: Sequence[str],
    settings: Settings,
) -> tuple[list[Lane], Any]:
    """All lanes, their payloads made; everything that would be refused is refused here."""
    try:
        timeout = min(_PREPARING_SECONDS, settings.timeout_seconds)
        info = client.server_info(timeout=timeout)
        found = [client.get_model(name, timeout=timeout) for name in models]
    except AttnserveError as error:
        if error.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise LoadTestError(f"no server answers at {target}: {error.message}") from None
        raise LoadTestError(str(error)) from None
    pairs = [(model, variant) for model in found for variant in variants]
    for model, variant in pairs:
        check_request(
            model, info, variant=variant, seq_lens=settings.seq_lens, batch=settings.batch
        )
    payloads = {
        (model.name, seq_len): make_payload(
            model, seq_len, batch=settings.batch, seed=settings.seed
        )
        for model in found
        for seq_len in settings.seq_lens
    }
    lanes = [
        Lane(model, variant, payloads[model.name, seq_len])
        for model, variant in pairs
        for seq_len in settings.seq_lens
    ]
    return lanes, server_facts(target, info)


def _require_answers(lanes: Sequence[Lane], complete: bool) -> None:
    samples = [s for lane in lanes for each in lane.slices for s in each.samples]
    if any(s.timings is not None for s in samples):
        return
    failure = next((s.failure for s in samples if s.failure is not None), None)
    if failure is None:
        reason = "nothing was measured" if complete else "interrupted before anything was measured"
        raise LoadTestError(reason)
    raise LoadTestError(
        f"all {len(samples)} requests failed; the first: {failure.code}: {failure.message}"
    )


def _series(lanes: Sequence[Lane], settings: Settings) -> list[Any]:
    per_series = len(settings.seq_lens)
    groups = [lanes[i : i + per_series] for i in range(0, len(lanes), per_series)]
    return [
        summarise_series(
            group[0].model,
            group[0].variant,
            [
                LengthResult(lane.payload.seq_len, lane.payload.request_bytes, tuple(lane.slices))
                for lane in group
            ],
            settings.batch,
        )
        for group in groups
    ]
