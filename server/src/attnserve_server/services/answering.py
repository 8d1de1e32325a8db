"""What the unary methods share: errors become statuses, and answers are counted."""

from collections.abc import Callable
from typing import TypeVar

import grpc

from attnserve_server.metrics import Metrics
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
