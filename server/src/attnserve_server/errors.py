"""What can go wrong with a request, each kind with its gRPC status.

Raised where the fact is known; turned into a status once, in `services`. Messages name the field,
what was given and what is allowed.
"""

import grpc


class RequestError(Exception):
    """A request cannot be answered; `code` is the gRPC status."""

    code = grpc.StatusCode.INTERNAL


class InvalidRequestError(RequestError):
    """The request is wrong in itself."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    @classmethod
    def of(cls, field: str, given: object, allowed: object) -> "InvalidRequestError":
        """The usual sentence: field, what was given, what is allowed."""
        return cls(f"{field}: given {given}; allowed: {allowed}")


class NotFoundError(RequestError):
    """No such model, version, variant, kept tensor, region or shared-memory object."""

    code = grpc.StatusCode.NOT_FOUND


class PreconditionError(RequestError):
    """The request is well formed, but this model cannot do it."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ExhaustedError(RequestError):
    """Over a limit of this server, or its queue is full.

    Attributes:
        retry_after: seconds after which the same request may be taken; None: not known, or
            never: it is too large.
    """

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(RequestError):
    """The caller's deadline has passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledError(RequestError):
    """The caller has gone."""

    code = grpc.StatusCode.CANCELLED


class DrainingError(RequestError):
    """The server is shutting down."""

    code = grpc.StatusCode.UNAVAILABLE


class UnimplementedError(RequestError):
    """This server does not have it, or has it turned off."""

    code = grpc.StatusCode.UNIMPLEMENTED


class ForbiddenError(RequestError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class TakenError(RequestError):
    """A name is in use already."""

    code = grpc.StatusCode.ALREADY_EXISTS


class UnloadedError(RequestError):
    """The model is in the repository, but not loaded now."""

    code = grpc.StatusCode.UNAVAILABLE
