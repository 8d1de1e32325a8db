"""A collector of traces for tests: gRPC's own server with OpenTelemetry's own service."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Span:
    """A span as it came; ids in hex, times in nanoseconds since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start: int
    end: int
    status: int
    state: str
    attributes: dict[str, Any]


class Collector(pb_grpc.TraceServiceServicer):
    """Keeps every span that comes."""

    def __init__(self) -> None:
        self._came = threading.Condition()
        self._spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.address = ""

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 (the service's name)
        """The service's one method."""
        with self._came:
            for resource in request.resource_spans:
                self.resources.append(_plain(resource.resource.attributes))
                for scope in resource.scope_spans:
                    self._spans += map(_span, scope.spans)
            self._came.notify_all()
        return pb.ExportTraceServiceResponse()

    def wait(self, enough: Callable[[list[Span]], bool], seconds: float = 20) -> list[Span]:
        """All spans, as soon as they are enough."""
        deadline = time.monotonic() + seconds
        with self._came:
            while not enough(self._spans):
                left = deadline - time.monotonic()
                assert left > 0, f"only {[span.name for span in self._spans]}"
                self._came.wait(left)
            return list(self._spans)

    def trace(self, trace_id: str, roots: int = 1) -> list[Span]:
        """The spans of a trace, once so many calls of it have come."""

        def of(spans: list[Span]) -> list[Span]:
            return [span for span in spans if span.trace_id == trace_id]

        return of(self.wait(lambda spans: sum(s.kind == 2 for s in of(spans)) >= roots))

    @property
    def spans(self) -> list[Span]:
        """All that have come."""
        with self._came:
            return list(self._spans)


def _span(span: Any) -> Span:
    return Span(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code,
        span.trace_state,
        _plain(span.attributes),
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextlib.contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """A collector on this machine."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()
