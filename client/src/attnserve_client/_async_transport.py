"""How the asyncio client reaches its server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from attnserve_client import _channel, _errors, _session_messages
from attnserve_client._assembly import Assembler
from attnserve_client._attend import AttendCall
from attnserve_client._call_events import Metadata
from attnserve_client._errors import AttnserveError
from attnserve_client._results import AttendResult
from attnserve_client._session_messages import METHOD
from attnserve_client._tracing import Propagation


class AsyncTransport:
    """The methods of `_client_flows.Transport`, whose answers are awaited.

    Args:
        channel: to the server.
        metadata: sent with each call.
    """

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata) -> None:
        self._propagation = Propagation(metadata)
        self._stub: pb_grpc.AttentionServiceAsyncStub = pb_grpc.AttentionServiceStub(channel)
        self._attend = channel.unary_unary(_channel.method_path("Attend"), None, None)
        self._attend_stream = channel.stream_stream(
            _channel.method_path("AttendStream"), None, None
        )
        self._health = channel.unary_unary(_channel.HEALTH_CHECK, None, None)
        self._put_tensor = channel.stream_unary(_channel.method_path("PutTensor"), None, None)
        self._decode = channel.stream_stream(_channel.method_path(METHOD), None, None)
        self._tasks: set[asyncio.Task[None]] = set()  # that nobody else holds

    @property
    def _metadata(self) -> Metadata:
        return self._propagation.metadata

    @property
    def trace_id(self) -> str | None:
        """As `BlockingTransport.trace_id`."""
        return self._propagation.trace_id

    def unary(self, method: str, request: Any, left: float | None) -> Any:
        """Call a method of one request and one answer."""
        return getattr(self._stub, method)(request, timeout=left, metadata=self._metadata)

    def health(self, left: float | None) -> Any:
        """Ask whether the server serves; gives a HealthCheckResponse, as bytes."""
        return self._health(b"", timeout=left, metadata=self._metadata)

    def attend(self, request: bytes, left: float | None) -> Any:
        """Call Attend, with and for bytes."""
        return self._attend(request, timeout=left, metadata=self._metadata)

    async def attend_streamed(self, call: AttendCall, left: float | None) -> AttendResult:
        """A request over an AttendStream of its own; its result."""
        assembler = Assembler()
        assembler.expect(1, call)
        finished = None
        stream = self.attend_stream(left)
        async with sending(stream, call.to_stream(1, None)):
            async for message in stream:
                done = assembler.add(message)
                if done is not None:
                    finished = done[1]
                    if isinstance(finished, AttnserveError):
                        stream.cancel()  # what is left of the request need not be sent
                        break
        return _errors.result_of(finished, "AttendStream")

    def attend_stream(self, timeout: float | None) -> Any:
        """Open an AttendStream."""
        return self._attend_stream(None, timeout=timeout, metadata=self._metadata)

    async def put(self, messages: Iterable[bytes], left: float | None) -> bytes:
        """Call PutTensor, with and for bytes."""
        call: Any = self._put_tensor(None, timeout=left, metadata=self._metadata)
        async with sending(call, messages):
            answer: bytes = await call
        return answer

    async def decode(
        self,
        messages: Iterator[bytes],
        take: Callable[[pb.DecodeResponse], None],
        left: float | None,
    ) -> None:
        """A Decode call of its own: `take` takes its answers, one after another.

        Raises:
            AttnserveError: a request failed, or the stream.
            Exception: what `messages` raises.
        """
        call = self.decode_call(left)
        try:
            async with sending(call, messages):
                async for received in call:
                    take(_session_messages.read(received))
        except grpc.RpcError as error:
            raise _errors.from_rpc_error(error, METHOD) from None
        finally:
            call.cancel()

    def decode_call(self, timeout: float | None = None) -> Any:
        """Open a Decode call."""
        return self._decode(None, timeout=timeout, metadata=self._metadata)

    def unregister(self, region: str) -> None:
        """Have the server unmap shared memory, without waiting for it."""
        task = asyncio.ensure_future(self.unregister_now(region, timeout=10.0))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def unregister_now(self, region: str, timeout: float = 1.0) -> None:
        """Have the server unmap shared memory, before this client is closed."""
        request = pb.UnregisterSharedMemoryRequest(name=region)
        # The server, or this client, may be gone.
        with contextlib.suppress(grpc.RpcError, cygrpc.UsageError):
            await self._stub.UnregisterSharedMemory(
                request, timeout=timeout, metadata=self._metadata
            )


@asynccontextmanager
async def sending(call: Any, messages: Iterable[bytes]) -> AsyncIterator[None]:
    """Send a call's messages while its answer is awaited within."""
    task = asyncio.create_task(send_all(call, _each(messages)))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        # What the messages themselves raised says more than how the call ended then.
        fault = None if task.cancelled() else task.exception()
        if fault is not None:
            raise fault


async def send_all(call: Any, messages: AsyncIterator[bytes]) -> None:
    """Send a call's messages, as they come, and then its end.

    Not by grpc.aio's own `write`, nor by an iterator given to it: to those, a server that ends the
    call before it has read everything is "INTERNAL: Internal error from Core", and what the server
    said, its status and when to come back, is lost. Whoever awaits the answer hears it.
    """
    try:
        await call.wait_for_connection()
        async for message in messages:
            await call._cython_call.send_serialized_message(message)
        await call.done_writing()
    except (grpc.RpcError, cygrpc.InternalError):
        pass
    except Exception:  # of the messages: no answer will come
        call.cancel()
        raise


async def _each(messages: Iterable[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
