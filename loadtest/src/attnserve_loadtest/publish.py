"""Tells Locust of a request."""

import logging
from typing import Any

from attnserve_loadtest.payloads import row_name
from attnserve_loadtest.samples import Sample

_log = logging.getLogger(__name__)
_MOST_MESSAGES = 50
_messages: set[tuple[str, str]] = set()


class CallFailed(Exception):  # noqa: N818  (never raised)
    """What Locust gets as the exception of a failed request: it lists failures by its repr.

    The repr is the gRPC status alone, so that messages which differ in a number are one row.
    """

    def __repr__(self) -> str:
        return str(self)


def publish(environment: Any, sample: Sample, variant: str, **context: Any) -> None:
    """Fire Locust's request event; the sample travels to listeners in its context.

    Args:
        environment: Locust's.
        sample: the request.
        variant: names the row of a failed request, whose own variant is not known.
        context: more for the listeners.
    """
    failure = sample.failure
    if failure is not None:
        _log_once(failure.code, failure.message)
    environment.events.request.fire(
        request_type=sample.method,
        name=row_name(sample.model, sample.variant or variant, sample.seq_len),
        response_time=sample.end_to_end_us / 1e3,
        response_length=sample.response_bytes,
        response=None,
        exception=None if failure is None else CallFailed(failure.code),
        context={"sample": sample} | context,
    )


def _log_once(code: str, message: str) -> None:
    """The statistics show the status only; the log has each message the first time."""
    if (code, message) not in _messages and len(_messages) < _MOST_MESSAGES:
        _messages.add((code, message))
        _log.warning("%s: %s", code, message)
