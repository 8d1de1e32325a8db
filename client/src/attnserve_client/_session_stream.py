"""The stream that the KV sessions of a client share."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from attnserve_proto import attention_pb2 as pb
from google.protobuf.message import DecodeError

from attnserve_client import _deadlines, _errors, _session_messages
from attnserve_client._decode_call import DecodeCall
from attnserve_client._errors import AttnserveError
from attnserve_client._session_messages import METHOD

T = TypeVar("T")
# Makes a request, given its id.
Make = Callable[[int], bytes]
# Takes an answer apart, whose bytes nobody else holds; raises the error that it says.
Read = Callable[[bytes], T]

# How often it is looked at whether a request has waited for too long, seconds.
_GUARD_SECONDS = 0.25


class _Pending:
    """A request that is not answered yet."""

    __slots__ = ("answer", "request_id", "until", "waited_for")

    def __init__(self, request_id: int, until: float | None, waited_for: bool) -> None:
        self.answer: bytes | None = None
        self.request_id = request_id
        self.until = until
        self.waited_for = waited_for


class SessionStream:
    """One Decode call. Safe to share between threads.

    Whoever waits for an answer reads what comes, for all, until its own is there: that saves a
    change of threads for each answer. A thread of its own reads only while nobody waits, so that it
    is known when the stream has ended, and where sessions went.

    Args:
        start: opens the call.
        told: takes what the server says of sessions that have moved; waits for nothing.
    """

    def __init__(
        self, start: Callable[[], DecodeCall], told: Callable[[pb.MovedSession], None]
    ) -> None:
        self._told = told
        self._sending_order = threading.Lock()  # from a request's id until it is handed over
        self._state = threading.Condition(threading.Lock())
        self._reading = False
        self._sending = False
        self._outgoing: deque[bytes] = deque()
        self._last_id = 0
        self._last_step = 0
        self._pending: dict[int, _Pending] = {}
        self._failure: AttnserveError | None = None
        self._call = start()
        self._call.receive()
        threading.Thread(target=self._guard, name="decode-guard", daemon=True).start()

    @property
    def failed(self) -> bool:
        """Whether it has failed, and its open steps with it."""
        return self._failure is not None

    def new_step(self) -> int:
        """An id for a step."""
        with self._sending_order:
            self._last_step += 1
            return self._last_step

    def exchange(self, make: Make, read: Read[T], timeout: float | None) -> T:
        """Send a request, and wait for what answers it.

        Args:
            make: the request, given its id.
            read: what is answered.
            timeout: seconds after which the stream is given up; None waits for ever.

        Raises:
            AttnserveError: the request failed, or the stream.
        """
        return self._answered(self._sent(make, timeout, True), read)

    def begin(self, make: Make) -> _Pending:
        """Send a request, or its first part, without waiting for an answer.

        `answer` waits for it, `finish` sends the rest and waits for it, `drop` forgets it.

        Raises:
            AttnserveError: the stream failed.
        """
        return self._sent(make, None, False)

    def finish(self, begun: _Pending, make: Make, read: Read[T], timeout: float | None) -> T:
        """Send the last part of a request, and wait for what answers it; as `exchange`."""
        try:
            message = make(begun.request_id)
            with self._sending_order, self._state:
                begun.until = _deadlines.until(timeout)
                begun.waited_for = True
                self._send(message)
        except BaseException:
            self.drop(begun)
            raise
        return self._answered(begun, read)

    def answer(self, begun: _Pending, read: Read[T], timeout: float | None) -> T:
        """Wait for what answers a request that `begin` sent whole; as `exchange`."""
        with self._state:
            begun.until = _deadlines.until(timeout)
            begun.waited_for = True
        return self._answered(begun, read)

    def drop(self, begun: _Pending) -> None:
        """Wait for no answer to a request that was begun."""
        with self._state:
            self._pending.pop(begun.request_id, None)

    def _sent(self, make: Make, timeout: float | None, waited_for: bool) -> _Pending:
        with self._sending_order:
            pending = _Pending(self._last_id + 1, _deadlines.until(timeout), waited_for)
            message = make(pending.request_id)
            self._last_id = pending.request_id
            with self._state:
                self._send(message)
                self._pending[pending.request_id] = pending
        return pending

    def _answered(self, pending: _Pending, read: Read[T]) -> T:
        with self._state:
            try:
                received = self._wait(pending)
            finally:
                del self._pending[pending.request_id]
        return read(received)

    def close(self) -> None:
        """End the stream; the server abandons its open steps."""
        with self._state:
            self._fail(_errors.CancelledError("the client was closed", method=METHOD))
            self._call.cancel()
            while self._call.due and not self._reading:
                self._read_one()

    def _send(self, message: bytes) -> None:
        if self._failure is not None:
            raise self._failure
        if self._sending:
            self._outgoing.append(message)
        else:
            self._call.send(message)
            self._sending = True

    def _wait(self, pending: _Pending) -> bytes:
        while pending.answer is None:
            if self._failure is not None:
                raise self._failure
            if not self._reading:
                self._read_one()
                continue
            left = None if pending.until is None else pending.until - time.monotonic()
            if left is not None and left <= 0:
                self._give_up()
            else:
                self._state.wait(left)
        return pending.answer

    def _read_one(self) -> None:
        """Read what comes next, for whoever waits. Holds the lock, but not while it reads."""
        self._reading = True
        self._state.release()
        event = None
        try:
            event = self._call.next()
        finally:
            self._state.acquire()
            self._reading = False
            if event is None:  # an interrupt
                self._fail(_errors.CancelledError("the stream was interrupted", method=METHOD))
            else:
                if event.received is not None:
                    self._deliver(event.received)
                if event.sent:
                    self._sending = False
                    if self._outgoing:
                        self._call.send(self._outgoing.popleft())
                        self._sending = True
                if event.failure is not None:
                    self._fail(event.failure)
            self._state.notify_all()

    def _deliver(self, received: bytes) -> None:
        try:
            request_id = _session_messages.request_id_of(received)
            moved = None if request_id else _session_messages.moved_in(received)
        except DecodeError as error:  # not such a server's
            self._fail(_errors.InternalError(f"the stream cannot be read: {error}", method=METHOD))
            self._call.cancel()
            return
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.answer = received
        if moved is not None:
            self._told(moved)
        self._call.receive()

    def _fail(self, failure: AttnserveError) -> None:
        if self._failure is None:
            self._failure = failure
            self._outgoing.clear()
            self._state.notify_all()

    def _give_up(self) -> None:
        self._fail(_errors.DeadlineExceededError("no answer in time", method=METHOD))
        self._call.cancel()

    def _nobody_reads(self) -> bool:
        waiting = any(each.waited_for for each in self._pending.values())
        return self._failure is not None or not waiting

    def _guard(self) -> None:
        """End the stream if a request waits for too long; read, while nobody waits."""
        while True:
            with self._state:
                now = time.monotonic()
                if any(
                    each.until is not None and now > each.until for each in self._pending.values()
                ):
                    self._give_up()
                while self._nobody_reads() and self._call.due and not self._reading:
                    self._read_one()
                if not self._call.due:
                    return
            time.sleep(_GUARD_SECONDS)


class Ending(Protocol):
    """A stream, as `SessionStreams` has it."""

    @property
    def failed(self) -> bool:
        """Whether it has failed."""

    def close(self) -> None:
        """End it."""


E = TypeVar("E", bound=Ending)


class SessionStreams(Generic[E]):
    """The stream of a client, opened when it is needed, and again after it has failed."""

    def __init__(self, make: Callable[[], E]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._closed = False
        self._stream: E | None = None

    def get(self) -> E:
        """One that can be used, as far as is known.

        Raises:
            CancelledError: the client was closed.
        """
        stream = self._stream
        if stream is not None and not stream.failed:
            return stream
        with self._lock:
            if self._closed:
                raise _errors.CancelledError("the client was closed", method=METHOD)
            if self._stream is None or self._stream.failed:
                self._stream = self._make()
            return self._stream

    def close(self) -> None:
        """End the stream, if there is one, and open no other."""
        with self._lock:
            self._closed = True
            if self._stream is not None:
                self._stream.close()
