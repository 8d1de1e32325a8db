"""Errors to gRPC statuses: the one place where they meet in the control plane."""

import logging
import uuid

from attnserve_dataplane import RequestError as PlaneError
from google.protobuf.message import DecodeError

from attnserve_server.errors import Code, RequestError

# What a caller sent, and a message repeats, may be of any size: what is wrong stands at its start.
_MOST_CHARACTERS = 640

_log = logging.getLogger(__name__)


def status_of(error: Exception, method: str) -> tuple[int, str, float]:
    """Status, message and seconds to retry after (0: not known); faults of ours are logged."""
    if isinstance(error, PlaneError):
        code, message, retry_after = error.args
        return code, message, retry_after
    if isinstance(error, RequestError):
        return error.code, _shortened(str(error)), 0.0
    if isinstance(error, MemoryError) or (
        isinstance(error, DecodeError) and "Arena alloc failed" in str(error)  # protobuf's words
    ):
        return Code.RESOURCE_EXHAUSTED, "memory: none is left for this request", 0.0
    if isinstance(error, DecodeError):
        return (
            Code.INVALID_ARGUMENT,
            f"message: given bytes that are not the request of {method} ({error}); "
            "allowed: the message that its .proto file describes",
            0.0,
        )
    reference = uuid.uuid4().hex[:12]
    _log.error("request failed", extra={"method": method, "reference": reference}, exc_info=error)
    return (
        Code.INTERNAL,
        f"a fault in the server; its log has the details under {reference}",
        0.0,
    )


def _shortened(message: str) -> str:
    if len(message) <= _MOST_CHARACTERS:
        return message
    return f"{message[:_MOST_CHARACTERS]} ..."
