"""One AttendStream call: a reader, computations, and the answers as they are done."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from queue import SimpleQueue

import grpc
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire

from attnserve_server import validation
from attnserve_server.dtypes import Array
from attnserve_server.engine.work import AttendWork
from attnserve_server.errors import (
    CancelledError,
    DrainingError,
    ExhaustedError,
    InvalidRequestError,
)
from attnserve_server.scheduler import Ticket
from attnserve_server.scheduler.job import NORMAL
from attnserve_server.services import inputs, outputs
from attnserve_server.services.early import EarlyHeads
from attnserve_server.services.reception import Receiver, Reception, RefusedChunkError
from attnserve_server.services.runtime import Runtime, ticket_for
from attnserve_server.services.statuses import retry_after, say_when_to_retry, status_of
from attnserve_server.wire import answers

METHOD = "AttendStream"

# How long an overloaded server does not read a stream after it refused one of its requests.
_PAUSE_SECONDS = 0.05

_log = logging.getLogger(__name__)


class StreamCall:
    """One call. Its reader and each computation run on threads of the pool; the thread that grpc
    gave to the call sends the answers.

    Args:
        runtime: what requests need.
        context: the call.
    """

    def __init__(self, runtime: Runtime, context: grpc.ServicerContext) -> None:
        self._runtime = runtime
        self._context = context
        self._call_ticket = ticket_for(context)
        self._receiver = Receiver(
            runtime.limits.max_stream_requests, runtime.budget, runtime.limits.chunk_bytes
        )
        # Requests that are computing, or whose answers have not been sent yet.
        self._room = threading.Semaphore(runtime.limits.max_stream_requests)
        self._outgoing: SimpleQueue[Iterator[bytes] | Exception | None] = SimpleQueue()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._unanswered = 0
        self._reading = True
        self._draining = False
        self._tickets: set[Ticket] = set()
        self._inside: set[int] = set()
        # Requests whose chunks are coming, with the moment they were announced.
        self._arriving: dict[int, tuple[Ticket, int]] = {}
        # Those of them whose first heads may be computed already.
        self._early: dict[int, EarlyHeads] = {}
        self._ended = not context.add_callback(self._end)

    def answers(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The messages to send, as long as the call lasts."""
        self._runtime.pool.submit(self._read, requests)
        try:
            while not self._ended and (answer := self._outgoing.get()) is not None:
                if isinstance(answer, Exception):
                    code, details = status_of(answer, METHOD)
                    self._runtime.metrics.requests.labels(METHOD, code.name).inc()
                    say_when_to_retry(self._context, answer)
                    self._context.abort(code, details)
                else:
                    yield from answer
                    self._room.release()
                    self._answered()
        finally:
            self._end()

    def drain(self) -> None:
        """Take no more requests; end the call once all that came have been answered."""
        with self._lock:
            self._draining = True
            idle = self._unanswered == 0
        if idle:
            self._outgoing.put(DrainingError("the server is shutting down; try another one"))

    def _end(self) -> None:
        """The call is over, for whatever reason: wake everything that waits."""
        self._ended = True
        self._over.set()
        self._outgoing.put(None)
        self._room.release(self._runtime.limits.max_stream_requests)
        with self._lock:
            tickets = list(self._tickets)
        for ticket in tickets:
            ticket.cancel()

    def _read(self, requests: Iterator[bytes]) -> None:
        failure: Exception | None = None
        try:
            for message in requests:
                arrived = time.perf_counter_ns()
                chunk = wire.decode_chunk(message)
                if chunk is None:
                    self._take_request(message, arrived)
                else:
                    self._take_chunk(chunk)
                if self._ended:
                    break
        except grpc.RpcError:
            failure = CancelledError("the caller cancelled the stream")
        except Exception as error:  # the stream must end with its status
            failure = error
        unfinished = self._receiver.close()
        for request_id in unfinished:
            self._leave(request_id)
        if failure is None and unfinished and not self._ended:
            failure = InvalidRequestError.of(
                "stream", f"its end, with chunks of request {unfinished[0]} missing", "all chunks"
            )
        if failure is not None:
            self._outgoing.put(failure)
        with self._lock:
            self._reading = False
            idle = self._unanswered == 0
        if idle:
            self._outgoing.put(None)

    def _take_request(self, message: bytes, arrived: int) -> None:
        request = pb.AttendStreamRequest.FromString(message)
        self._receiver.announce(request)
        request_id, attend = request.request_id, request.request
        ticket = self._ticket(request)
        try:
            if self._draining:
                raise DrainingError("the server is shutting down; try another one")
            # Small tensors may come inline; they are taken out by protobuf here.
            views = _inline(attend)
            plan = validation.plan(
                attend,
                {name: view.nbytes for name, view in views.items()},
                self._runtime.store,
                self._runtime.limits,
                chunks_allowed=True,
                kept=self._runtime.kept.get,
            )
            self._runtime.scheduler.check_room(ticket)
            self._enter(request_id, ticket)
            arrays = inputs.arrays(plan, views, self._runtime, ticket.caller)
            reception = self._receiver.begin(request_id, plan, arrays)
        except Exception as error:
            self._leave(request_id)
            self._receiver.discard(request_id, attend)
            self._begun()
            self._fail(request_id, error)
            if isinstance(error, ExhaustedError):
                # Its chunks are not worth reading: a caller who hears of it stops sending them.
                self._over.wait(_PAUSE_SECONDS)
            return
        self._begun()
        self._arriving[request_id] = (ticket, arrived)
        if not reception.missing:
            self._submit(request_id, reception)

    def _enter(self, request_id: int, ticket: Ticket) -> None:
        self._runtime.gate.enter(lambda: ticket)
        with self._lock:
            self._inside.add(request_id)

    def _leave(self, request_id: int) -> None:
        """A request has been computed, or never will be."""
        with self._lock:
            inside = request_id in self._inside
            self._inside.discard(request_id)
        if inside:
            self._runtime.gate.leave()

    def _take_chunk(self, chunk: wire.Chunk) -> None:
        request_id = chunk.request_id
        try:
            reception = self._receiver.add(chunk)
        except RefusedChunkError as error:
            ticket, _ = self._arriving.pop(request_id)
            ticket.cancel()
            self._leave(request_id)
            early = self._early.pop(request_id, None)
            if early is None or early.failed():
                self._fail(request_id, error, room_taken=early is not None and early.begun)
            return
        if reception is None:
            return
        if reception.early is not None:
            self._take_heads(request_id, reception, reception.early)
        elif not reception.missing:
            self._submit(request_id, reception)

    def _take_heads(self, request_id: int, reception: Reception, early: EarlyHeads) -> None:
        """Compute heads of a request whose other heads are still arriving."""
        self._early[request_id] = early
        ticket, arrived = self._arriving[request_id]
        begun = early.begun
        while (work := early.take(reception.received)) is not None:
            if not begun:
                begun = True
                self._start(ticket)
            self._runtime.pool.submit(
                self._compute_heads, request_id, reception, early, work, ticket, arrived
            )
        if not reception.missing:
            del self._arriving[request_id], self._early[request_id]
            if early.settle():
                self._runtime.budget.give_back(reception.plan.sent_bytes)

    def _submit(self, request_id: int, reception: Reception) -> None:
        ticket, arrived = self._arriving.pop(request_id)
        self._start(ticket)
        self._runtime.pool.submit(self._compute, request_id, reception, ticket, arrived)

    def _start(self, ticket: Ticket) -> None:
        """A computation is about to be handed to the pool."""
        # Reading stops here while too many are under way: they end without any more of it.
        self._room.acquire()
        with self._lock:
            self._tickets.add(ticket)
        if self._ended:
            ticket.cancel()

    def _compute_heads(
        self,
        request_id: int,
        reception: Reception,
        early: EarlyHeads,
        work: AttendWork,
        ticket: Ticket,
        arrived: int,
    ) -> None:
        try:
            _, clock = self._runtime.attend(work, ticket, arrived)
        except Exception as error:
            if not early.failed():
                return
            self._fail(request_id, error, room_taken=True)
        else:
            if not early.finished(clock):
                return
            timings = early.clock(clock).timings(time.perf_counter_ns())
            response = answers.attend_response(early.work, timings)
            output = reception.plan.results[0]
            first = answers.stream_announcement(request_id, response, output)
            self._succeed(chain((first,), early.messages()))
        self._leave(request_id)
        with self._lock:
            self._tickets.discard(ticket)
        if early.settle():
            self._runtime.budget.give_back(reception.plan.sent_bytes)

    def _compute(self, request_id: int, reception: Reception, ticket: Ticket, arrived: int) -> None:
        plan = reception.plan
        try:
            answer = self._answer(request_id, reception, ticket, arrived)
        except Exception as error:
            self._fail(request_id, error, room_taken=True)
        else:
            self._succeed(answer)
        finally:
            self._leave(request_id)
            self._runtime.budget.give_back(plan.sent_bytes)
            with self._lock:
                self._tickets.discard(ticket)

    def _answer(
        self, request_id: int, reception: Reception, ticket: Ticket, arrived: int
    ) -> Iterator[bytes]:
        """Compute the messages of an answer."""
        plan, runtime = reception.plan, self._runtime
        if plan.output_region is not None:
            shared = outputs.begin(outputs.frame(plan), runtime, ticket.caller)
            work = validation.complete(plan, reception.arrays, shared.into)
            _, clock = runtime.attend(work, ticket, arrived)
            response = shared.finish(clock.timings(time.perf_counter_ns()))
            return iter((answers.stream_response(request_id, response),))
        work = validation.complete(plan, reception.arrays)
        results, clock = runtime.attend(work, ticket, arrived)
        return self._messages(request_id, work, results, clock.timings(time.perf_counter_ns()))

    def _messages(
        self, request_id: int, work: AttendWork, results: Mapping[str, Array], timings: pb.Timings
    ) -> Iterator[bytes]:
        response = answers.attend_response(work, timings)
        chunk_bytes = self._runtime.limits.chunk_bytes
        return answers.attend_stream(request_id, response, results, chunk_bytes)

    def _succeed(self, answer: Iterator[bytes]) -> None:
        self._runtime.metrics.requests.labels(METHOD, "OK").inc()
        self._outgoing.put(answer)

    def _fail(self, request_id: int, error: Exception, *, room_taken: bool = False) -> None:
        if not room_taken:
            self._room.acquire()
        code, details = status_of(error, METHOD)
        self._runtime.metrics.requests.labels(METHOD, code.name).inc()
        number: int = code.value[0]
        after = retry_after(error)
        self._outgoing.put(iter((answers.stream_error(request_id, number, details, after),)))

    def _ticket(self, request: pb.AttendStreamRequest) -> Ticket:
        """A request's ticket: the stream's deadline, or its own if that is sooner."""
        call = self._call_ticket
        ticket = Ticket(call.deadline, call.caller, request.request.priority or NORMAL)
        ticket.shorten(request.timeout / 1e6)
        return ticket

    def _begun(self) -> None:
        with self._lock:
            self._unanswered += 1

    def _answered(self) -> None:
        with self._lock:
            self._unanswered -= 1
            idle = self._unanswered == 0
        if idle and not self._reading:
            self._outgoing.put(None)
        elif idle and self._draining:
            self._outgoing.put(DrainingError("the server is shutting down; try another one"))


def _inline(request: pb.AttendRequest) -> dict[str, memoryview]:
    """The elements of tensors that came within the announcement."""
    views = {}
    for name in wire.REQUEST_TENSORS.values():
        tensor: pb.Tensor = getattr(request, name)
        if tensor.WhichOneof("content") == "data":
            views[name] = memoryview(tensor.data)
    return views
