"""The trace that calls belong to: https://www.w3.org/TR/trace-context/

What the caller's metadata says goes before OpenTelemetry's current span, which is looked for where
`opentelemetry-api` is installed.
"""

import re

from attnserve_client._call_events import Metadata

try:
    from opentelemetry import propagate, trace
except ImportError:
    _has_api = False
else:
    _has_api = True

_HEADER = "traceparent"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class Propagation:
    """What is sent with each call.

    Args:
        metadata: as the caller gives it.
    """

    def __init__(self, metadata: Metadata = ()) -> None:
        self._given = metadata
        self._names = {name for name, _ in metadata}
        found = _TRACEPARENT.fullmatch(str(dict(metadata).get(_HEADER, "")))
        self._trace_id = found[1] if found else None

    @property
    def metadata(self) -> Metadata:
        """That of a call that begins now, in this context."""
        if _HEADER in self._names or not _current():
            return self._given
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        more = [pair for pair in carrier.items() if pair[0] not in self._names]
        return (*self._given, *more)

    @property
    def trace_id(self) -> str | None:
        """The trace of such a call, 32 digits; None: it belongs to none."""
        return self._trace_id if _HEADER in self._names else _current()


def _current() -> str | None:
    if not _has_api:
        return None
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None
