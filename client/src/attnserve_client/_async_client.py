"""The asyncio client."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from attnserve_client import _arguments as arguments
from attnserve_client._async_session_stream import AsyncSessionStream
from attnserve_client._async_stream import AsyncAttendStream
from attnserve_client._async_transport import AsyncTransport
from attnserve_client._client_flows import ClientFlows
from attnserve_client._flows import AsyncRunner, awaited
from attnserve_client._session_state import Connection
from attnserve_client._session_stream import SessionStreams
from attnserve_client._sessions import AsyncBatch, AsyncSession
from attnserve_client._settings import ClientOptions, settings
from attnserve_client._sharing import SharedArrays, Sharing
from attnserve_client._sharing_flows import SharingFlows


class AsyncAttentionClient(SharedArrays):
    """Calls an attnserve server from asyncio; many calls may be under way at once.

    Its arguments are those of `AttentionClient`, and so are its calls, which are awaited.
    """

    def __init__(self, target: str, **options: Unpack[ClientOptions]) -> None:
        given = settings(target, **options)
        channel_options = given.channel_options
        self._channel = (
            grpc.aio.secure_channel(target, given.credentials, channel_options, given.compression)
            if given.credentials
            else grpc.aio.insecure_channel(target, channel_options, given.compression)
        )
        self._runner = AsyncRunner()
        self._transport = AsyncTransport(self._channel, given.metadata)
        self._streams = SessionStreams(lambda: AsyncSessionStream(self._transport.decode_call))
        shared = given.shared_memory_bytes
        super().__init__(None if shared is None else Sharing(shared))
        memory = None if self._sharing is None else SharingFlows(self._sharing, self._transport)
        self._connection = Connection(self._streams, self._runner, memory)
        self._flows = ClientFlows(
            self._transport,
            given.stream_threshold_bytes,
            memory,
            self._connection,
            AsyncSession,
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

    attend = awaited(ClientFlows.attend)

    def stream(self, *, timeout: float | None = None) -> AsyncAttendStream:
        """Open one stream for many requests in flight; use it in `async with`.

        Nothing is repeated: what fails, fails in its future.

        Args:
            timeout: seconds that the whole stream may last; None is unlimited.
        """
        lasting = arguments.seconds("timeout", timeout)
        return AsyncAttendStream(self._transport.attend_stream, timeout=lasting)

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
