"""Many attend requests in flight on one stream, in asyncio."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from attnserve_client import _arguments as arguments
from attnserve_client import _attend, _errors
from attnserve_client._assembly import Assembler
from attnserve_client._async_transport import send_all
from attnserve_client._attend import AttendOptions
from attnserve_client._results import AttendResult

_METHOD = "AttendStream"


class AsyncAttendStream:
    """One AttendStream call; answers come in order of completion, each to its own future.

    >>> async with client.stream() as stream:
    ...     futures = [stream.submit(q, k, v, model="causal") for q, k, v in work]
    ...     results = await asyncio.gather(*futures)

    Arrays given to `submit` must not be changed before their future is done: they are sent from
    where they lie.
    """

    def __init__(
        self,
        start: Callable[[float | None], Any],
        *,
        timeout: float | None,
        trace_id: str | None = None,
    ) -> None:
        self._trace_id = trace_id
        self._outgoing: asyncio.Queue[Iterator[bytes] | None] = asyncio.Queue()
        self._assembler = Assembler()
        self._waiting: dict[int, asyncio.Future[AttendResult]] = {}
        self._last_id = 0
        self._closed = False
        self._failure: _errors.AttnserveError | None = None
        self._incoming = start(timeout)
        self._sender = asyncio.ensure_future(send_all(self._incoming, self._messages()))
        self._reader = asyncio.ensure_future(self._read())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def submit(
        self,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        timeout: float | None = None,
        **options: Unpack[AttendOptions],
    ) -> "asyncio.Future[AttendResult]":
        """Send a request, without waiting for anything; as `AttendStream.submit`."""
        timeout = arguments.seconds("timeout", timeout)
        call = _attend.attend_call(query, key, value, **options)
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError("this stream is closed")
        self._last_id += 1
        future: asyncio.Future[AttendResult] = asyncio.get_running_loop().create_future()
        self._waiting[self._last_id] = future
        self._assembler.expect(self._last_id, call)
        self._outgoing.put_nowait(call.to_stream(self._last_id, timeout))
        return future

    async def close(self) -> None:
        """Send nothing more, and wait for the answers that are due."""
        if not self._closed:
            self._closed = True
            self._outgoing.put_nowait(None)
        await asyncio.wait([self._reader])

    async def _messages(self) -> AsyncIterator[bytes]:
        while (messages := await self._outgoing.get()) is not None:
            for message in messages:
                yield message

    async def _read(self) -> None:
        failure: _errors.AttnserveError = _errors.CancelledError(
            "the stream ended without an answer", method=_METHOD
        )
        try:
            async for message in self._incoming:
                done = self._assembler.add(message)
                if done is None:
                    continue
                future = self._waiting.pop(done[0])
                if future.done():  # nobody waits for it any more
                    continue
                if isinstance(done[1], _errors.AttnserveError):
                    future.set_exception(done[1].of_trace(self._trace_id))
                else:
                    future.set_result(done[1])
        except grpc.RpcError as error:
            failure = _errors.from_rpc_error(error, _METHOD)
        except Exception as error:  # not such a server's: nobody may wait for ever all the same
            failure = _errors.InternalError(
                f"the stream cannot be read: {type(error).__name__}: {error}", method=_METHOD
            )
        finally:
            self._failure = failure.of_trace(self._trace_id)
            self._incoming.cancel()
            self._sender.cancel()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(failure)
            self._waiting.clear()
