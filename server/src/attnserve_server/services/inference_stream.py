"""One ModelStreamInfer call: computations side by side, answers in the order of the requests."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue

import grpc
from attnserve_proto import inference_wire
from attnserve_proto.inference import open_inference_pb2 as oip

from attnserve_server.errors import CancelledError, DrainingError
from attnserve_server.scheduler import Ticket
from attnserve_server.services.infer import Inference
from attnserve_server.services.runtime import Runtime, ticket_for
from attnserve_server.services.statuses import status_of

METHOD = "ModelStreamInfer"


class InferStreamCall:
    """One call. Its reader and each computation run on threads of the runtime's pool; the thread
    that grpc gave to the call sends the answers.

    Args:
        runtime: what requests need.
        inference: answers one request.
        context: the call.
    """

    def __init__(
        self, runtime: Runtime, inference: Inference, context: grpc.ServicerContext
    ) -> None:
        self._runtime = runtime
        self._inference = inference
        self._context = context
        self._peer = context.peer()
        self._call_ticket = ticket_for(context)
        # Requests that compute, or whose answers have not been sent yet.
        self._room = threading.Semaphore(runtime.limits.max_stream_requests)
        # Answers to come, in order; then what ends the call.
        self._outgoing: SimpleQueue[Future[bytes] | Exception | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._tickets: set[Ticket] = set()
        self._draining = False
        self._ended = not context.add_callback(self._end)

    def answers(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The messages to send, as long as the call lasts."""
        self._runtime.pool.submit(self._read, requests)
        try:
            while not self._ended and (answer := self._outgoing.get()) is not None:
                if isinstance(answer, Exception):
                    code, details = status_of(answer, METHOD)
                    self._runtime.metrics.requests.labels(METHOD, code.name).inc()
                    self._context.abort(code, details)
                else:
                    yield answer.result()
                    self._room.release()
        finally:
            self._end()

    def drain(self) -> None:
        """Take no more requests; end the call once all that came have been answered."""
        with self._lock:
            self._draining = True
            self._outgoing.put(DrainingError("the server is shutting down; try another one"))

    def _end(self) -> None:
        """The call is over, for whatever reason: wake everything that waits."""
        with self._lock:
            self._ended = True
            tickets = list(self._tickets)
        self._outgoing.put(None)
        self._room.release(self._runtime.limits.max_stream_requests)
        for ticket in tickets:
            ticket.cancel()

    def _read(self, requests: Iterator[bytes]) -> None:
        failure: Exception | None = None
        try:
            for request in requests:
                arrived = time.perf_counter_ns()
                # Reading stops here while too many are under way.
                self._room.acquire()
                ticket = Ticket(self._call_ticket.deadline, self._call_ticket.caller)
                with self._lock:
                    if self._ended or self._draining:
                        return
                    self._tickets.add(ticket)
                    future = self._runtime.pool.submit(self._compute, request, ticket, arrived)
                    self._outgoing.put(future)
        except grpc.RpcError:
            failure = CancelledError("the caller cancelled the stream")
        except Exception as error:  # the stream must end with its status
            failure = error
        self._outgoing.put(failure)

    def _compute(self, request: bytes, ticket: Ticket, arrived: int) -> bytes:
        """The answer to one request, or its error, as a message. Raises nothing."""
        message: oip.ModelInferRequest | None = None
        code = grpc.StatusCode.OK
        try:
            runtime = self._runtime
            with runtime.gate.inside_of(lambda: ticket), runtime.budget.lending(len(request)):
                message, raw = inference_wire.split(request)
                response, contents = self._inference.answer(
                    message, raw, self._peer, ticket, arrived
                )
                _mark_final(response)
                return inference_wire.join_stream(response, contents)
        except Exception as error:
            code, details = status_of(error, METHOD)
            return _error(message, details)
        finally:
            self._runtime.metrics.requests.labels(METHOD, code.name).inc()
            with self._lock:
                self._tickets.discard(ticket)


def _error(message: oip.ModelInferRequest | None, details: str) -> bytes:
    answer = oip.ModelStreamInferResponse(error_message=details)
    if message is not None:
        # Says which request it was that failed.
        answer.infer_response.id = message.id
        answer.infer_response.model_name = message.model_name
    _mark_final(answer.infer_response)
    return answer.SerializeToString()


def _mark_final(response: oip.ModelInferResponse) -> None:
    """Each request has one answer, so each is its request's last."""
    response.parameters["triton_final_response"].bool_param = True
