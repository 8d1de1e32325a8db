"""Many attend requests in flight on one stream."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from attnserve_client import _arguments as arguments
from attnserve_client import _attend, _errors
from attnserve_client._assembly import Assembler
from attnserve_client._attend import AttendOptions
from attnserve_client._results import AttendResult


class AttendStream:
    """One AttendStream call; answers come in order of completion, each to its own future.

    >>> with client.stream() as stream:
    ...     futures = [stream.submit(q, k, v, model="causal") for q, k, v in work]
    ...     results = [future.result() for future in futures]

    Arrays given to `submit` must not be changed before their future is done: they are sent from
    where they lie.
    """

    def __init__(
        self,
        start: Callable[..., Any],
        *,
        timeout: float | None = None,
        trace_id: str | None = None,
    ) -> None:
        self._trace_id = trace_id
        self._outgoing: SimpleQueue[Iterator[bytes] | None] = SimpleQueue()
        self._assembler = Assembler()
        self._waiting: dict[int, Future[AttendResult]] = {}
        self._lock = threading.Lock()
        self._last_id = 0
        self._closed = False
        self._failure: _errors.AttnserveError | None = None
        self._incoming = start(self._messages(), timeout=timeout)
        self._reader = threading.Thread(target=self._read, name="attend-stream", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def submit(
        self,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        timeout: float | None = None,
        **options: Unpack[AttendOptions],
    ) -> Future[AttendResult]:
        """Send a request; arguments as those of `AttentionClient.attend`.

        Args:
            timeout: seconds from its arrival at the server after which it is given up.

        Returns:
            A future that gives the result or raises an `AttnserveError`.

        Raises:
            RuntimeError: the stream is closed.
            AttnserveError: the stream has failed.
        """
        timeout = arguments.seconds("timeout", timeout)
        call = _attend.attend_call(query, key, value, **options)
        future: Future[AttendResult] = Future()
        # It cannot be cancelled: the request is on its way, and its answer will come.
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise RuntimeError("this stream is closed")
            self._last_id += 1
            self._waiting[self._last_id] = future
            self._assembler.expect(self._last_id, call)
            self._outgoing.put(call.to_stream(self._last_id, timeout))
        return future

    def close(self) -> None:
        """Send nothing more, and wait for the answers that are due."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._outgoing.put(None)
        self._reader.join()

    def _messages(self) -> Iterator[bytes]:
        while (call := self._outgoing.get()) is not None:
            yield from call

    def _read(self) -> None:
        failure: _errors.AttnserveError = _errors.CancelledError(
            "the stream ended without an answer", method="AttendStream"
        )
        try:
            for message in self._incoming:
                done = self._assembler.add(message)
                if done is None:
                    continue
                with self._lock:
                    future = self._waiting.pop(done[0])
                if isinstance(done[1], _errors.AttnserveError):
                    future.set_exception(done[1].of_trace(self._trace_id))
                else:
                    future.set_result(done[1])
        except grpc.RpcError as error:
            failure = _errors.from_rpc_error(error, "AttendStream")
        except Exception as error:  # not such a server's: nobody may wait for ever all the same
            failure = _errors.InternalError(
                f"the stream cannot be read: {type(error).__name__}: {error}", method="AttendStream"
            )
            self._incoming.cancel()
        with self._lock:
            self._failure = failure.of_trace(self._trace_id)
            orphans = list(self._waiting.values())
            self._waiting.clear()
        self._outgoing.put(None)
        for future in orphans:
            future.set_exception(failure)
