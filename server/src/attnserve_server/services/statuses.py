"""Errors to gRPC statuses: the one place where they meet."""

import logging
import uuid

import grpc
from google.protobuf.message import DecodeError

from attnserve_server.errors import RequestError

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
    reference = uuid.uuid4().hex[:12]
    _log.error("request failed", extra={"method": method, "reference": reference}, exc_info=error)
    return (
        grpc.StatusCode.INTERNAL,
        f"a fault in the server; its log has the details under {reference}",
    )
