"""What can go wrong with a request, each kind with its gRPC status.

Raised where the fact is known; turned into a status once, in `handlers`. Messages name the field,
what was given and what is allowed.
"""

from enum import IntEnum


class Code(IntEnum):
    """google.rpc.Code."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class RequestError(Exception):
    """A request cannot be answered; `code` is the gRPC status."""

    code = Code.INTERNAL


class InvalidRequestError(RequestError):
    """The request is wrong in itself."""

    code = Code.INVALID_ARGUMENT

    @classmethod
    def of(cls, field: str, given: object, allowed: object) -> "InvalidRequestError":
        """The usual sentence: field, what was given, what is allowed."""
        return cls(f"{field}: given {given}; allowed: {allowed}")


class NotFoundError(RequestError):
    """No such model, version or variant."""

    code = Code.NOT_FOUND


class PreconditionError(RequestError):
    """The request is well formed, but this model cannot do it."""

    code = Code.FAILED_PRECONDITION


class LateError(RequestError):
    """It was not done in time."""

    code = Code.DEADLINE_EXCEEDED


class ExhaustedError(RequestError):
    """Over a limit of this server."""

    code = Code.RESOURCE_EXHAUSTED


class UnimplementedError(RequestError):
    """This server does not have it, or has it turned off."""

    code = Code.UNIMPLEMENTED


class UnauthenticatedError(RequestError):
    """The caller has not shown who it is."""

    code = Code.UNAUTHENTICATED


class UnloadedError(RequestError):
    """The model is in the repository, but not loaded now."""

    code = Code.UNAVAILABLE
