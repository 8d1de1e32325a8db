"""Records of calls to spans, by OpenTelemetry's conventions for RPC.

https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
"""

from collections.abc import Iterator
from urllib.parse import unquote

from attnserve_dataplane import CallRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from attnserve_server import __version__
from attnserve_server.tracing.phases import phases

# Of a server's spans, statuses that are its own fault.
_FAULTS = {2, 4, 12, 13, 14, 15}
_NAMES = {
    0: "OK", 1: "CANCELLED", 2: "UNKNOWN", 3: "INVALID_ARGUMENT", 4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND", 6: "ALREADY_EXISTS", 7: "PERMISSION_DENIED", 8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION", 10: "ABORTED", 11: "OUT_OF_RANGE", 12: "UNIMPLEMENTED",
    13: "INTERNAL", 14: "UNAVAILABLE", 15: "DATA_LOSS", 16: "UNAUTHENTICATED",
}  # fmt: skip
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("attnserve", __version__)
_UNSET = Status(StatusCode.UNSET)


class SpanMaker:
    """Makes the spans of records.

    Args:
        resource: that they are of.
    """

    def __init__(self, resource: Resource) -> None:
        self._resource = resource
        self._ids = RandomIdGenerator()

    def spans(self, record: CallRecord, epoch: int) -> Iterator[ReadableSpan]:
        """A span of the call or request, and one of each of its phases.

        They are made as the SDK's exporters take them: its tracer would give them ids and times of
        its own, and takes several times as long.

        Args:
            record: what was recorded.
            epoch: nanoseconds since 1970 at which the data plane's clock was 0.
        """
        state = TraceState.from_header([record.trace_state]) if record.trace_state else None
        trace_id = int.from_bytes(record.trace_id)

        def context(span_id: int, is_remote: bool = False) -> SpanContext:
            return SpanContext(trace_id, span_id, is_remote, _SAMPLED, state)

        own = context(int.from_bytes(record.span_id))
        parent_id = int.from_bytes(record.parent_id)
        marks = record.marks
        name = record.path.removeprefix("/")
        yield ReadableSpan(
            f"{name} request" if record.of_stream else name,
            own,
            context(parent_id, not record.of_stream) if parent_id else None,
            self._resource,
            attributes(record),
            kind=SpanKind.INTERNAL if record.of_stream else SpanKind.SERVER,
            status=_status(record.code),
            start_time=epoch + marks[0],
            end_time=epoch + marks[-1],
            instrumentation_scope=_SCOPE,
        )
        for phase, start, end in phases(marks, name):
            yield ReadableSpan(
                phase,
                context(self._ids.generate_span_id()),
                own,
                self._resource,
                start_time=epoch + start,
                end_time=epoch + end,
                status=_UNSET,
                instrumentation_scope=_SCOPE,
            )


def attributes(record: CallRecord) -> dict[str, str | int]:
    """What is said of a call or request: conventional names, and ours for what has none."""
    service, _, method = record.path.removeprefix("/").rpartition("/")
    found: dict[str, str | int] = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "rpc.grpc.status_code": record.code,
    }
    kind, _, host = record.peer.partition(":")
    if kind in ("ipv4", "ipv6"):
        found["client.address"] = unquote(host).strip("[]")
    texts = {
        "attnserve.caller": record.caller.removeprefix("@"),
        "attnserve.request_id": record.request_id,
        "attnserve.model": record.model,
        "attnserve.variant": record.variant,
    }
    found |= {name: text for name, text in texts.items() if text}
    if record.model:
        found |= {
            "attnserve.model_version": record.version,
            "attnserve.sequences": record.sequences,
            "attnserve.query_len": record.query_len,
            "attnserve.key_len": record.key_len,
        }
    if record.together:
        found["attnserve.batch_sequences"] = record.together
    return found


def _status(code: int) -> Status:
    if code not in _FAULTS:
        return _UNSET
    return Status(StatusCode.ERROR, _NAMES[code])
