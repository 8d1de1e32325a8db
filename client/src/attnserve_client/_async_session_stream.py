"""The stream that the KV sessions of an asyncio client share."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
from attnserve_proto import attention_pb2 as pb
from google.protobuf.message import DecodeError

from attnserve_client import _errors, _session_messages
from attnserve_client._async_transport import send_all
from attnserve_client._errors import AttnserveError
from attnserve_client._session_messages import METHOD

T = TypeVar("T")


class AsyncSessionStream:
    """One Decode call. One task sends, one reads, and answers go to whoever awaits them.

    Its arguments are those of `SessionStream`.
    """

    def __init__(self, start: Callable[[], Any], told: Callable[[pb.MovedSession], None]) -> None:
        self._told = told
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._last_id = 0
        self._last_step = 0
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._failure: AttnserveError | None = None
        self._call = start()
        self._tasks = [
            asyncio.ensure_future(send_all(self._call, self._messages())),
            asyncio.ensure_future(self._read()),
        ]

    @property
    def failed(self) -> bool:
        """Whether it has failed, and its open steps with it."""
        return self._failure is not None

    def new_step(self) -> int:
        """An id for a step."""
        self._last_step += 1
        return self._last_step

    async def exchange(
        self, make: Callable[[int], bytes], read: Callable[[bytes], T], timeout: float | None
    ) -> T:
        """Send a request, and await what answers it; as `SessionStream.exchange`."""
        return await self._answer(await self.begin(make), read, timeout)

    async def begin(self, make: Callable[[int], bytes]) -> int:
        """Send a request, or its first part; as `SessionStream.begin`."""
        if self._failure is not None:
            raise self._failure
        request_id = self._last_id + 1
        message = make(request_id)
        self._last_id = request_id
        self._pending[request_id] = asyncio.get_running_loop().create_future()
        self._outgoing.put_nowait(message)
        return request_id

    async def finish(
        self,
        begun: int,
        make: Callable[[int], bytes],
        read: Callable[[bytes], T],
        timeout: float | None,
    ) -> T:
        """Send the last part of a request, and await what answers it; as `exchange`."""
        try:
            message = make(begun)
        except BaseException:
            self.drop(begun)
            raise
        self._outgoing.put_nowait(message)
        return await self._answer(begun, read, timeout)

    async def answer(self, begun: int, read: Callable[[bytes], T], timeout: float | None) -> T:
        """Await what answers a request that `begin` sent whole; as `exchange`."""
        return await self._answer(begun, read, timeout)

    def drop(self, begun: int) -> None:
        """Await no answer to a request that was begun."""
        answered = self._pending.pop(begun, None)
        if answered is not None:
            answered.cancel()

    async def _answer(
        self, request_id: int, read: Callable[[bytes], T], timeout: float | None
    ) -> T:
        answered = self._pending[request_id]
        try:
            async with asyncio.timeout(timeout):
                received = await answered
        except TimeoutError as late:
            self._fail(_errors.DeadlineExceededError("no answer in time", method=METHOD))
            raise self._failure or late from None
        finally:
            self._pending.pop(request_id, None)
        return read(received)

    def close(self) -> None:
        """End the stream; the server abandons its open steps."""
        self._fail(_errors.CancelledError("the client was closed", method=METHOD))

    async def _messages(self) -> AsyncIterator[bytes]:
        while True:
            yield await self._outgoing.get()

    async def _read(self) -> None:
        failure: AttnserveError = _errors.UnavailableError("the stream was ended", method=METHOD)
        try:
            async for received in self._call:
                request_id = _session_messages.request_id_of(received)
                moved = None if request_id else _session_messages.moved_in(received)
                if moved is not None:
                    self._told(moved)
                answered = self._pending.get(request_id)
                if answered is not None and not answered.done():
                    answered.set_result(received)
        except grpc.RpcError as error:
            failure = _errors.from_rpc_error(error, METHOD)
        except DecodeError as error:  # not such a server's
            failure = _errors.InternalError(f"the stream cannot be read: {error}", method=METHOD)
        except asyncio.CancelledError:
            if self._failure is None:
                self._fail(_errors.CancelledError("the stream was cancelled", method=METHOD))
            return
        self._fail(failure)

    def _fail(self, failure: AttnserveError) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        for answered in self._pending.values():
            if not answered.done():
                answered.set_exception(failure)
                answered.exception()  # it may be that nobody asks for it again
