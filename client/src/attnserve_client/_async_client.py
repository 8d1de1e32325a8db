"""The asyncio client."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from attnserve_client import _channel, _tensors
from attnserve_client._async_session_stream import AsyncSessionStream
from attnserve_client._async_stream import AsyncAttendStream
from attnserve_client._async_transport import AsyncTransport
from attnserve_client._client_flows import ClientFlows
from attnserve_client._flows import AsyncRunner, awaited
from attnserve_client._results import Array
from attnserve_client._session_state import Connection
from attnserve_client._session_stream import SessionStreams
from attnserve_client._sessions import AsyncBatch, AsyncSession
from attnserve_client._sharing import Sharing, shared_by


class AsyncAttentionClient:
    """Calls an attnserve server from asyncio; many calls may be under way at once.

    Its arguments are those of `AttentionClient`, and so are its calls, which are awaited.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        stream_threshold_bytes: int = _channel.STREAM_THRESHOLD_BYTES,
        shared_memory: bool = False,
        shared_memory_bytes: int = _channel.SHARED_MEMORY_BYTES,
    ) -> None:
        options = _channel.options(target)
        self._channel = (
            grpc.aio.secure_channel(target, credentials, options=options)
            if credentials
            else grpc.aio.insecure_channel(target, options=options)
        )
        self._runner = AsyncRunner()
        self._transport = AsyncTransport(self._channel, ())
        self._streams = SessionStreams(lambda: AsyncSessionStream(self._transport.decode_call))
        self._connection = Connection(self._streams, self._runner)
        self._sharing = Sharing(shared_memory_bytes) if shared_memory else None
        self._flows = ClientFlows(
            self._transport, stream_threshold_bytes, self._sharing, self._connection, AsyncSession
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled. Arrays live on."""
        self._runner.close()
        self._streams.close()
        if self._sharing is not None and (region := self._sharing.close()) is not None:
            await self._transport.unregister_now(region)
        await self._channel.close(None)

    def shared_empty(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        """As `AttentionClient.shared_empty`; not awaited."""
        return shared_by(self._sharing).arena.empty(tuple(shape), np.dtype(dtype))

    def shared(self, array: Any) -> Array:
        """As `AttentionClient.shared`; not awaited."""
        return shared_by(self._sharing).copy(_tensors.as_array(array, "array"))

    attend = awaited(ClientFlows.attend)

    def stream(self, *, timeout: float | None = None) -> AsyncAttendStream:
        """Open one stream for many requests in flight; use it in `async with`.

        Nothing is repeated: what fails, fails in its future.

        Args:
            timeout: seconds that the whole stream may last; None is unlimited.
        """
        return AsyncAttendStream(self._transport.attend_stream, timeout=timeout)

    put_tensor = awaited(ClientFlows.put_tensor)
    renew_tensor = awaited(ClientFlows.renew_tensor)
    drop_tensor = awaited(ClientFlows.drop_tensor)

    session = awaited(ClientFlows[AsyncSession].session)
    sessions = awaited(ClientFlows[AsyncSession].sessions)

    def batch(self, sessions: Sequence[AsyncSession]) -> AsyncBatch:
        """Steps of several sessions of one model together, each with any number of new tokens.

        Use it in `async with`: a step that has not ended then is abandoned.
        """
        return AsyncBatch(self._connection, sessions)

    save = awaited(ClientFlows[AsyncSession].save)
    load = awaited(ClientFlows[AsyncSession].load)

    attend_tokens = awaited(ClientFlows.attend_tokens)
    list_models = awaited(ClientFlows.list_models)
    get_model = awaited(ClientFlows.get_model)
    server_info = awaited(ClientFlows.server_info)
