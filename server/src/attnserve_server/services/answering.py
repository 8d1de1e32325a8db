"""What the methods with one answer share: errors become statuses, and answers are counted."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

from attnserve_server.errors import CancelledError, InvalidRequestError
from attnserve_server.metrics import Metrics
from attnserve_server.scheduler.gate import Gate
from attnserve_server.services.runtime import ticket_for
from attnserve_server.services.statuses import say_when_to_retry, status_of

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


def answering(
    metrics: Metrics,
    method: str,
    behaviour: Callable[[RequestT, grpc.ServicerContext], ResponseT],
) -> Callable[[RequestT, grpc.ServicerContext], ResponseT]:
    """A behaviour whose errors end the call with their status, and which is counted."""
    counts = metrics.requests
    fine = counts.labels(method, "OK")

    def answer(request: RequestT, context: grpc.ServicerContext) -> ResponseT:
        try:
            response = behaviour(request, context)
        except Exception as error:
            code, details = status_of(error, method)
            counts.labels(method, code.name).inc()
            say_when_to_retry(context, error)
            context.abort(code, details)
        fine.inc()
        return response

    return answer


def answering_at_the_gate(
    metrics: Metrics,
    gate: Gate,
    method: str,
    behaviour: Callable[[bytes, grpc.ServicerContext], ResponseT],
) -> Callable[[Iterator[bytes], grpc.ServicerContext], ResponseT]:
    """As `answering`, for the one message of a method that may be refused before it is read.

    To grpc it is a method that takes a stream: then the message is read when it is asked for. On
    the wire the two are the same.
    """

    def admitted(requests: Iterator[bytes], context: grpc.ServicerContext) -> ResponseT:
        with gate.inside_of(lambda: ticket_for(context)):
            try:
                request = next(requests, None)
            except grpc.RpcError:
                raise CancelledError("the caller cancelled the call") from None
            if request is None:
                raise InvalidRequestError.of("message", "nothing", f"one request of {method}")
            return behaviour(request, context)

    return answering(metrics, method, admitted)
