"""Traces on their way to a collector, by OpenTelemetry's exporter.

A collector that is away, or slow, keeps nobody waiting: records that it does not take in time are
dropped in the data plane, and counted.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence

from attnserve_dataplane import DataPlane
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from attnserve_server import __version__
from attnserve_server.tracing.exemplars import Exemplars
from attnserve_server.tracing.spans import SpanMaker

_MOST_RECORDS = 256  # turned into spans at once
_MOST_SPANS = 8192  # that wait to be sent
_MOST_SPANS_OF_RECORD = 9
_MOST_SAID = 500  # characters
_PATIENCE_SECONDS = 0.5
_LAST_SECONDS = 2.0  # for what is left when the server stops

_log = logging.getLogger(__name__)


class TraceExport:
    """Takes records from the data plane and sends their spans, from a thread of its own.

    Args:
        plane: that records.
        endpoint: of the collector, with its scheme. What the exporter's own environment says of
            headers, certificates and time limits (`OTEL_EXPORTER_OTLP_...`) is heeded.
        exemplars: that are kept of them.
    """

    def __init__(self, plane: DataPlane, endpoint: str, exemplars: Exemplars) -> None:
        self._plane = plane
        self._exemplars = exemplars
        exporters = logging.getLogger("opentelemetry")
        exporters.setLevel(logging.WARNING)
        exporters.propagate = True  # a file that its environment names and it cannot read is logged
        self._exporter = _Counting(endpoint)
        # Then it says of each try that it failed; `_Counting` says it once.
        exporters.addHandler(_said)
        exporters.propagate = False
        self._processor = BatchSpanProcessor(
            self._exporter, max_queue_size=_MOST_SPANS, schedule_delay_millis=1000
        )
        self._maker = SpanMaker(_resource())
        self._handed = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Send what is left, if the collector takes it within a moment, and end."""
        self._stopped.set()
        self._thread.join(2 * _PATIENCE_SECONDS)
        last = threading.Thread(target=self._processor.shutdown, name="traces", daemon=True)
        last.start()
        last.join(_LAST_SECONDS)
        self._exporter.shutdown()  # what it waits for, it waits for no longer

    @property
    def spans(self) -> dict[str, int]:
        """Spans so far, by what became of them: exported, failed."""
        return {"exported": self._exporter.exported, "failed": self._exporter.failed}

    def _run(self) -> None:
        while not self._stopped.is_set():
            if self._handed - sum(self.spans.values()) > _MOST_SPANS - (
                _MOST_RECORDS * _MOST_SPANS_OF_RECORD
            ):
                self._stopped.wait(_PATIENCE_SECONDS)  # the collector is slow, or away
                continue
            self._take(_PATIENCE_SECONDS)
        self._take(0.0)

    def _take(self, timeout: float) -> None:
        records = self._plane.take_records(_MOST_RECORDS, timeout)
        epoch = time.time_ns() - time.monotonic_ns()
        for record in records:
            try:
                self._exemplars.add(record, epoch)
                for span in self._maker.spans(record, epoch):
                    self._handed += 1
                    self._processor.on_end(span)
            except Exception:
                _log.exception("a record cannot be turned into spans")


class _Said(logging.Handler):
    """Keeps what OpenTelemetry's exporter logged last."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.last = record.getMessage()[:_MOST_SAID]


_said = _Said()


class _Counting(SpanExporter):
    """The exporter, what became of spans counted; says once that the collector is away."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._exporter = OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https:"))
        self._away = False
        self.exported = self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; how that went."""
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            away = result is not SpanExportResult.SUCCESS
            if away:
                self.failed += len(spans)
            else:
                self.exported += len(spans)
            if away and not self._away:
                told = {"endpoint": self._endpoint, "said": _said.last}
                _log.warning("traces are not taken", extra=told)
            elif self._away and not away:
                _log.info("traces are taken again", extra={"endpoint": self._endpoint})
            self._away = away
        return result

    def shutdown(self) -> None:
        """End; what is being sent is given up."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing waits here."""
        return True


class _Resource(Resource):
    """One whose hash is known: the exporter asks for it for every span, and it is one of JSON."""

    def __init__(self, made: Resource) -> None:
        super().__init__(made.attributes, made.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


def _resource() -> Resource:
    return _Resource(
        Resource.create(
            {
                "service.name": os.environ.get("OTEL_SERVICE_NAME", "attnserve"),
                "service.version": __version__,
                "service.instance.id": str(uuid.uuid4()),
            }
        )
    )
