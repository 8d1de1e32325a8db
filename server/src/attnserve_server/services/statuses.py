"""Errors to gRPC statuses: the one place where they meet."""

import logging
import uuid

import grpc
from google.protobuf.message import DecodeError

from attnserve_server.errors import ExhaustedError, RequestError

# In trailing metadata: seconds, as a decimal number.
RETRY_AFTER = "retry-after"

_log = logging.getLogger(__name__)


def status_of(error: Exception, method: str) -> tuple[grpc.StatusCode, str]:
    """The status and the message for a caller; what is not a caller's business is logged."""
    if isinstance(error, RequestError):
        return error.code, str(error)
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
    """Seconds after which a refused request may be taken; None: it is refused for good."""
    return error.retry_after if isinstance(error, ExhaustedError) else None


def say_when_to_retry(context: grpc.ServicerContext, error: Exception) -> None:
    """Put that into the call's trailing metadata."""
    seconds = retry_after(error)
    if seconds is not None:
        context.set_trailing_metadata(((RETRY_AFTER, f"{seconds:.3f}"),))
