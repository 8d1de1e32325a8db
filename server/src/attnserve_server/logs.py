"""Logs as JSON lines, or as text for people, on standard error."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar

_trace: ContextVar[tuple[str, str] | None] = ContextVar("trace", default=None)

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the record's extras."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, then extras as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the library's name)
        """The line of a record, without its exception."""
        extras = " ".join(f"{key}={value}" for key, value in _extras(record).items())
        return f"{super().formatMessage(record)} {extras}".rstrip()


def configure(form: str, level: str) -> None:
    """Send all logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


@contextlib.contextmanager
def traced(trace: tuple[str, str] | None) -> Iterator[None]:
    """Let what is logged within say the trace and the span that it belongs to, if there is one."""
    token = _trace.set(trace)
    try:
        yield
    finally:
        _trace.reset(token)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    extras = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    trace = _trace.get()  # handlers run on the thread that logs
    if trace is not None:
        extras |= {"trace_id": trace[0], "span_id": trace[1]}
    return extras
