"""The asyncio client."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from attnserve_client import _arguments as arguments
from attnserve_client._async_session_stream import AsyncSessionStream
from attnserve_client._async_stream import AsyncAttendStream
from attnserve_client._async_transport import AsyncTransport
from attnserve_client._client_flows import ClientFlows
from attnserve_client._flows import AsyncRunner, Flow, awaited
from attnserve_client._moves import Following, Moves
from attnserve_client._servers import Server
from attnserve_client._session_state import Connection
from attnserve_client._session_stream import SessionStreams
from attnserve_client._sessions import AsyncBatch, AsyncSession, ShardedAsyncSession
from attnserve_client._settings import ClientOptions, ClientSettings, settings
from attnserve_client._sharded_flows import ShardedFlows
from attnserve_client._sharing import Sharing
from attnserve_client._sharing_flows import SharingFlows
from attnserve_client._targets import Target, Targeted
from attnserve_client._tracing import Propagation


class AsyncAttentionClient(Targeted[AsyncSession]):
    """Calls an attnserve server from asyncio; many calls may be under way at once.

    Its arguments are those of `AttentionClient`, and so are its calls, which are awaited.
    """

    def __init__(self, target: Target, **options: Unpack[ClientOptions]) -> None:
        given = settings(**options)
        self._runner = runner = AsyncRunner(Propagation(given.metadata))
        self._tasks: set[asyncio.Task[None]] = set()  # that nobody else holds

        def reach(address: str, *, authority: str | None = None) -> Server[AsyncSession]:
            return _server(address, authority, given, runner, moves)

        def start(flow: Flow[None]) -> None:
            task = asyncio.ensure_future(runner.run(flow))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        def make_sharded(
            flows: ShardedFlows[AsyncSession], model: str, num_layers: int
        ) -> AsyncSession:
            return ShardedAsyncSession(runner, flows, model, num_layers)

        moves = Moves(Following(self._reached, start) if given.follow_moved else None)
        super().__init__(target, reach, start, asyncio.to_thread, make_sharded)

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
        for server in self._to_close():
            await server.close()

    attend = awaited(ClientFlows.attend)

    def stream(self, *, timeout: float | None = None) -> AsyncAttendStream:
        """Open one stream for many requests in flight; use it in `async with`.

        Nothing is repeated: what fails, fails in its future.

        Args:
            timeout: seconds that the whole stream may last; None is unlimited.
        """
        lasting = arguments.seconds("timeout", timeout)
        server = self._server_to_stay()
        transport = server.transport
        stream = AsyncAttendStream(
            transport.attend_stream, timeout=lasting, trace_id=transport.trace_id
        )
        server.connection.held.add(stream)
        return stream

    put_tensor = awaited(ClientFlows.put_tensor)
    renew_tensor = awaited(ClientFlows.renew_tensor)
    drop_tensor = awaited(ClientFlows.drop_tensor)

    session = awaited(ClientFlows[AsyncSession].session)
    sessions = awaited(ClientFlows[AsyncSession].sessions)

    def batch(self, sessions: Sequence[AsyncSession]) -> AsyncBatch:
        """Steps of several sessions of one model together, each with any number of new tokens.

        Use it in `async with`: a step that has not ended then is abandoned.
        """
        return AsyncBatch(self._runner, sessions)

    save = awaited(ClientFlows[AsyncSession].save)
    load = awaited(ClientFlows[AsyncSession].load)

    attend_tokens = awaited(ClientFlows.attend_tokens)
    list_models = awaited(ClientFlows.list_models)
    get_model = awaited(ClientFlows.get_model)
    server_info = awaited(ClientFlows.server_info)


def _server(
    address: str, authority: str | None, given: ClientSettings, runner: AsyncRunner, moves: Moves
) -> Server[AsyncSession]:
    """What reaches a server; `authority`: the name that it goes by, None: the address."""
    channel_options = given.channel_options(address, authority)
    channel = (
        grpc.aio.secure_channel(address, given.credentials, channel_options, given.compression)
        if given.credentials
        else grpc.aio.insecure_channel(address, channel_options, given.compression)
    )
    transport = AsyncTransport(channel, given.metadata)
    streams = SessionStreams(lambda: AsyncSessionStream(transport.decode_call, moves.told))
    shared = given.shared_memory_bytes
    sharing = None if shared is None else Sharing(shared)
    memory = None if sharing is None else SharingFlows(sharing, transport)
    connection = Connection(address, streams, runner, transport, moves, memory)
    threshold = given.stream_threshold_bytes
    flows, once = (
        ClientFlows(transport, threshold, memory, connection, AsyncSession, patient=patient)
        for patient in (True, False)
    )

    async def close() -> None:
        streams.close()
        if sharing is not None and (region := sharing.close()) is not None:
            await transport.unregister_now(region)
        await channel.close(None)

    return Server(address, transport, connection, sharing, flows, once, close)
