"""Errors to gRPC statuses: the one place where they meet."""

import logging
import uuid

import grpc
from google.protobuf.message import DecodeError

from attnserve_server.errors import ExhaustedError, RequestError

# In trailing metadata: seconds, as a decimal number.
RETRY_AFTER = "retry-after"

# A status travels in a header: grpc refuses headers beyond 8 KB, and writes all but ASCII as up to
# twelve bytes a character. What is wrong stands at the beginning.
_MOST_CHARACTERS = 640

_log = logging.getLogger(__name__)


def status_of(error: Exception, method: str) -> tuple[grpc.StatusCode, str]:
    """The status and the message for a caller; what is not a caller's business is logged."""
    if isinstance(error, RequestError):
        return error.code, _shortened(str(error))
    if isinstance(error, DecodeError):
        return (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"message: given bytes that are not the request of {method} ({error}); "
            "allowed: the message that its .proto file describes",
        )
    if isinstance(error, MemoryError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, "memory: none is left for this request"
    reference = uuid.uuid4().hex[:12]
    _log.error("request failed", extra={"method": method, "reference": reference}, exc_info=error)
    return (
        grpc.StatusCode.INTERNAL,
        f"a fault in the server; its log has the details under {reference}",
    )


def retry_after(error: Exception) -> float | None:
    """Seconds after which a refused request may be taken; None: not known, or never."""
    return error.retry_after if isinstance(error, ExhaustedError) else None


def say_when_to_retry(context: grpc.ServicerContext, error: Exception) -> None:
    """Put `retry_after` of an error into the call's trailing metadata."""
    seconds = retry_after(error)
    if seconds is not None:
        context.set_trailing_metadata(((RETRY_AFTER, f"{seconds:.3f}"),))


def _shortened(message: str) -> str:
    """A message that fits into a status: what a caller sent, and it repeats, may be of any size."""
    if len(message) <= _MOST_CHARACTERS:
        return message
    return f"{message[:_MOST_CHARACTERS]} ..."
