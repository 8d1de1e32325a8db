"""Exceptions, one to one with the gRPC statuses that the server answers with.

AttnserveError
├── CancelledError            the call was cancelled (by the server: already retried)
├── InvalidArgumentError      the request is wrong in itself; the message names the field
├── DeadlineExceededError     no answer within `timeout`
├── NotFoundError             no such model, version, variant or stored tensor
├── PermissionDeniedError     shared memory that this caller may not use
├── ResourceExhaustedError    over a limit, or the queue is full: the message says which
├── FailedPreconditionError   the model cannot do what is asked
├── UnimplementedError        this server does not have it
├── UnavailableError          no server, it is draining (already retried), or model unloaded
├── UnauthenticatedError
└── InternalError             a fault in the server
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import grpc
from attnserve_proto import attention_pb2 as pb

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MovedSession:
    """Where a session is now that its server has handed to another one.

    Attributes:
        session_id: as it was.
        address: of the server that it is at.
        authority: the name that this server goes by; empty: the address.
        new_session_id: of the session there.
        length: tokens that it holds.
    """

    session_id: str
    address: str
    authority: str
    new_session_id: str
    length: int

    @classmethod
    def of(cls, message: pb.MovedSession) -> Self:
        """As a server says it."""
        return cls(
            message.session_id,
            message.address,
            message.authority,
            message.new_session_id,
            message.length,
        )


class AttnserveError(Exception):
    """A call failed. It can be copied and pickled, so that worker processes may raise it.

    Attributes:
        code: the gRPC status.
        message: what the server said.
        method: the method called, e.g. `Attend`.
        retry_after: seconds after which a refused request may be taken; None: not said.
        server: the address of the server that failed, by a client of several; else None.
        trace_id: of the trace that the call belonged to, 32 digits; None: it belonged to none.
        moved: where the session is that the request was for, if its server has handed it to another
            one: nothing was done. Else None.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    moved: MovedSession | None = None

    def __init__(
        self,
        message: str,
        *,
        method: str,
        code: grpc.StatusCode | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.code = code or type(self).code
        self.message = message
        self.method = method
        self.retry_after = retry_after
        self.server: str | None = None
        self.trace_id: str | None = None
        super().__init__(f"{self.code.name} from {method}: {message}")

    def __str__(self) -> str:
        said = super().__str__()
        if self.server is not None:
            said = f"{said} (server {self.server})"
        return said if self.trace_id is None else f"{said} (trace {self.trace_id})"

    def of_server(self, address: str) -> Self:
        """The same error, that says which server it is of."""
        self.server = self.server or address
        return self

    def of_trace(self, trace_id: str | None) -> Self:
        """The same error, that says which trace its call belonged to."""
        self.trace_id = self.trace_id or trace_id
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is copied by calling its class with `args`, which this one does not take.
        return _copied, (type(self), self.args), self.__dict__


def _copied(kind: type[AttnserveError], args: tuple[Any, ...]) -> AttnserveError:
    error = kind.__new__(kind)
    error.args = args
    return error


class CancelledError(AttnserveError):
    """CANCELLED."""

    code = grpc.StatusCode.CANCELLED


class InvalidArgumentError(AttnserveError, ValueError):
    """INVALID_ARGUMENT: the request is wrong in itself."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class DeadlineExceededError(AttnserveError, TimeoutError):
    """DEADLINE_EXCEEDED: no answer within the timeout."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class NotFoundError(AttnserveError, LookupError):
    """NOT_FOUND: no such model, version, variant or stored tensor."""

    code = grpc.StatusCode.NOT_FOUND


class PermissionDeniedError(AttnserveError):
    """PERMISSION_DENIED: the caller lacks the role for it, or may not use that shared memory."""

    code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhaustedError(AttnserveError):
    """RESOURCE_EXHAUSTED: over a limit, or the queue is full; `retry_after` says when to retry."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPreconditionError(AttnserveError):
    """FAILED_PRECONDITION: the model cannot do what is asked."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnimplementedError(AttnserveError, NotImplementedError):
    """UNIMPLEMENTED: this server does not have it."""

    code = grpc.StatusCode.UNIMPLEMENTED


class UnavailableError(AttnserveError, ConnectionError):
    """UNAVAILABLE: no server there, or it is draining, or has unloaded the model."""

    code = grpc.StatusCode.UNAVAILABLE


class UnauthenticatedError(AttnserveError):
    """UNAUTHENTICATED: the server wants to know who calls, and was shown nothing that it knows."""

    code = grpc.StatusCode.UNAUTHENTICATED


class InternalError(AttnserveError):
    """INTERNAL: a fault in the server."""

    code = grpc.StatusCode.INTERNAL


_BY_CODE = {error.code: error for error in AttnserveError.__subclasses__()}
# grpc's words for a request that found no server.
_NEVER_SENT = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")
_MAY_STILL_RUN = {
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
}
_CODE_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def from_status(
    code: grpc.StatusCode, message: str, method: str, retry_after: float | None = None
) -> AttnserveError:
    """The exception of a gRPC status."""
    kind = _BY_CODE.get(code, AttnserveError)
    return kind(message, method=method, code=code, retry_after=retry_after)


def from_stream_error(error: pb.Error, method: str) -> AttnserveError:
    """The exception of a failed request within a stream."""
    made = from_status(code_of(error.code), error.message, method, error.retry_after / 1e6 or None)
    if error.HasField("moved"):
        made.moved = MovedSession.of(error.moved)
    return made


def code_of(number: int) -> grpc.StatusCode:
    """A status by its number; UNKNOWN for one that there is not."""
    return _CODE_BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


def from_rpc_error(error: grpc.RpcError, method: str) -> AttnserveError:
    """The exception of what grpc raised."""
    code = getattr(error, "code", lambda: None)() or grpc.StatusCode.UNKNOWN
    details = getattr(error, "details", lambda: None)() or str(error)
    trailing = getattr(error, "trailing_metadata", lambda: None)()
    return from_status(code, details, method, retry_after_of(trailing))


def from_call(error: Exception, method: str) -> AttnserveError:
    """The exception of what a call raised: grpc's, or one of these already."""
    if isinstance(error, AttnserveError):
        return error
    assert isinstance(error, grpc.RpcError)
    return from_rpc_error(error, method)


def result_of(finished: T | AttnserveError | None, method: str) -> T:
    """What a stream ended with, if that is a result.

    Raises:
        AttnserveError: it is an error, or there was no answer.
    """
    if finished is None:
        raise InternalError("the stream ended without an answer", method=method)
    if isinstance(finished, AttnserveError):
        raise finished
    return finished


def is_unknown_region(error: grpc.RpcError, name: str) -> bool:
    """Whether a call failed because the server does not know the memory shared with it as `name`.

    It forgets it with the connection over which it was registered, and when it is started anew.
    """
    code = getattr(error, "code", lambda: None)()
    details = getattr(error, "details", lambda: None)() or ""
    known_as = details.startswith("shared_memory region") or name in details
    return code == grpc.StatusCode.NOT_FOUND and known_as


def may_still_run(error: BaseException) -> bool:
    """Whether the server may go on computing, and write its answer, after a call ended so."""
    if not isinstance(error, grpc.RpcError):
        return True
    code = getattr(error, "code", lambda: None)()
    details = getattr(error, "details", lambda: None)() or ""
    if code == grpc.StatusCode.UNAVAILABLE:
        # All else may be a connection that broke under a running request.
        return not details.startswith(_NEVER_SENT)
    return code in _MAY_STILL_RUN


def is_unloaded_model(error: AttnserveError) -> bool:
    """Whether a call failed because its model is unloaded: that lasts until somebody loads it."""
    return error.code == grpc.StatusCode.UNAVAILABLE and error.message.startswith("model: ")


def retry_after_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> float | None:
    """Seconds after which a refused call may be repeated, as trailing metadata says; None: not."""
    for name, value in metadata or ():
        if name == "retry-after":
            try:
                return float(value)
            except ValueError:  # not this server's
                return None
    return None
