"""The stream that the KV sessions of a client share."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _errors
from attnserve_client._errors import AttnserveError
from attnserve_client._session_messages import METHOD, Answer, read

# Opens a call, given its requests and the seconds that it may last.
Start = Callable[[Iterator[bytes], float | None], Any]

# How often it is looked at whether a request has waited for too long, seconds.
_WATCH_SECONDS = 0.25


class SessionStream:
    """One Decode call. Safe to share between threads.

    It has no thread that reads: whoever waits for an answer reads what comes, for all, until its
    own is there. That saves a change of threads for each answer.
    """

    def __init__(self, start: Start) -> None:
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._sending = threading.Lock()  # held from a request's id until it is on its way
        self._state = threading.Condition()
        self._reading = False
        self._last_id = 0
        self._last_step = 0
        self._answers: dict[int, deque[Answer]] = {}
        self._failure: AttnserveError | None = None
        self._waiting: dict[int, float] = {}  # request and when its time is up
        self._watched = False
        self._incoming = start(iter(self._outgoing.get, None), None)

    @property
    def alive(self) -> bool:
        """Whether it can still be used, as far as is known."""
        return not self.failed and bool(self._incoming.is_active())

    @property
    def failed(self) -> bool:
        """Whether it has failed, and its open steps with it."""
        return self._failure is not None

    def new_step(self) -> int:
        """An id for a step."""
        with self._sending:
            self._last_step += 1
            return self._last_step

    def send(self, makers: Iterable[Callable[[int], bytes]]) -> list[int]:
        """Send requests one after another, with nothing between them.

        Args:
            makers: make each request, given its id.

        Raises:
            AttnserveError: the stream has failed.
        """
        ids = []
        with self._sending:
            if self._failure is not None:
                raise self._failure
            for make in makers:
                self._last_id += 1
                self._answers[self._last_id] = deque()
                self._outgoing.put(make(self._last_id))
                ids.append(self._last_id)
        return ids

    def answer(self, request_id: int, timeout: float | None) -> Answer:
        """Wait for a request's next answer, which is its last one unless it is a chunk.

        Args:
            timeout: seconds after which the stream is given up; None waits for ever.

        Raises:
            AttnserveError: the request failed, or the stream.
        """
        if timeout is not None:
            self._watch(request_id, timeout)
        try:
            answer = self._wait(request_id)
        finally:
            self._waiting.pop(request_id, None)
        result = answer.message.WhichOneof("result")
        if result != "chunk" or answer.message.chunk.last:
            self.forget(request_id)
        if result == "error":
            raise _errors.from_stream_error(answer.message.error, METHOD)
        return answer

    def forget(self, request_id: int) -> None:
        """Nobody waits for a request's answers any more."""
        self._answers.pop(request_id, None)

    def close(self) -> None:
        """End the stream; the server abandons its open steps."""
        with self._state:
            self._fail(_errors.CancelledError("the client was closed", method=METHOD))
            self._state.notify_all()
        self._incoming.cancel()

    def _wait(self, request_id: int) -> Answer:
        with self._state:
            mine = self._answers[request_id]
            while not mine:
                if self._failure is not None:
                    raise self._failure
                if self._reading:
                    self._state.wait()
                    continue
                self._read_one()
            return mine.popleft()

    def _read_one(self) -> None:
        """Read a message for whoever waits for it. Holds the lock, but not while it reads."""
        self._reading = True
        self._state.release()
        answer: Answer | None = None
        failure: AttnserveError | None = None
        try:
            answer = read(next(self._incoming))
        except StopIteration:
            failure = _errors.UnavailableError("the stream was ended", method=METHOD)
        except grpc.RpcError as error:
            failure = _errors.from_rpc_error(error, METHOD)
        except Exception as error:  # not such a server's
            failure = _errors.InternalError(
                f"the stream cannot be read: {type(error).__name__}: {error}", method=METHOD
            )
            self._incoming.cancel()
        finally:
            self._state.acquire()
            self._reading = False
            if failure is not None:
                self._fail(failure)
            elif answer is not None and answer.request_id in self._answers:
                self._answers[answer.request_id].append(answer)
            self._state.notify_all()

    def _fail(self, failure: AttnserveError) -> None:
        if self._failure is None:
            self._failure = failure
            self._outgoing.put(None)

    def _watch(self, request_id: int, timeout: float) -> None:
        self._waiting[request_id] = time.monotonic() + timeout
        if self._watched:
            return
        with self._state:
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._watch_all, name="decode-watch", daemon=True).start()

    def _watch_all(self) -> None:
        """End the stream if a request waits for longer than it may: grpc's reads cannot be told."""
        while self._failure is None:
            time.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            if any(now > until for until in list(self._waiting.values())):
                with self._state:
                    self._fail(_errors.DeadlineExceededError("no answer in time", method=METHOD))
                    self._state.notify_all()
                self._incoming.cancel()


class SessionStreams:
    """The stream of a client, opened when it is needed, and again after it has failed."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._closed = False
        self._stream: SessionStream | None = None

    def get(self) -> SessionStream:
        """One that can be used, as far as is known.

        Raises:
            CancelledError: the client was closed.
        """
        with self._lock:
            if self._closed:
                raise _errors.CancelledError("the client was closed", method=METHOD)
            if self._stream is None or not self._stream.alive:
                self._stream = SessionStream(self._start)
            return self._stream

    def call(self, request: pb.DecodeRequest, timeout: float | None) -> pb.DecodeResponse:
        """Send one request, whose id is filled in, and wait for its answer.

        Raises:
            AttnserveError: as `SessionStream.answer`.
        """

        def make(request_id: int) -> bytes:
            request.request_id = request_id
            return request.SerializeToString()

        stream = self.get()
        return stream.answer(stream.send([make])[0], timeout).message

    def once(self, messages: Iterator[bytes], timeout: float | None) -> Iterator[Answer]:
        """A stream of its own, for what takes long: the answers to some requests.

        Raises:
            AttnserveError: one of them failed, or the stream.
            Exception: what `messages` raises.
        """
        faults: list[Exception] = []

        def guarded() -> Iterator[bytes]:
            try:
                yield from messages
            except Exception as error:  # grpc would but log it
                faults.append(error)

        call = self._start(guarded(), timeout)
        try:
            for received in call:
                answer = read(received)
                if answer.message.WhichOneof("result") == "error":
                    raise _errors.from_stream_error(answer.message.error, METHOD)
                yield answer
        except (grpc.RpcError, AttnserveError) as error:
            if not faults:
                raise _errors.from_call(error, METHOD) from None
        finally:
            call.cancel()
        if faults:
            raise faults[0]

    def close(self) -> None:
        """End the stream, if there is one, and open no other."""
        with self._lock:
            self._closed = True
            if self._stream is not None:
                self._stream.close()
