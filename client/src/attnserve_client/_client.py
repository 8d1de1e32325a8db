"""The blocking client."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc
import grpc.experimental

from attnserve_client import _arguments as arguments
from attnserve_client._client_flows import ClientFlows
from attnserve_client._flows import Flow, Runner, blocking
from attnserve_client._moves import Following, Moves
from attnserve_client._servers import Server
from attnserve_client._session_state import Connection
from attnserve_client._session_stream import SessionStream, SessionStreams
from attnserve_client._sessions import Batch, Session, ShardedSession
from attnserve_client._settings import ClientOptions, ClientSettings, settings
from attnserve_client._sharded_flows import ShardedFlows
from attnserve_client._sharing import Sharing
from attnserve_client._sharing_flows import SharingFlows
from attnserve_client._stream import AttendStream
from attnserve_client._targets import Target, Targeted
from attnserve_client._tracing import Propagation
from attnserve_client._transport import BlockingTransport

# The answers to a single message are read by the thread that sent it, not by one that wakes it.
_ANSWERS_READ_BY_CALLER: list[tuple[str, str | int]] = [
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)
]


class AttentionClient(Targeted[Session]):
    """Calls an attnserve server. Safe to share between threads; close it, or use it in `with`.

    Args:
        target: `host:port`, or any target that grpc understands. A list of them: several servers
            (docs/cluster.md), as are all addresses behind the name of `dns:///name:port`, and those
            that the file of `file:///path` has, one a line.
        options: credentials, metadata, shared memory and more: see `ClientOptions`.

    All calls but those of a stream are repeated, with growing pauses, while no server answers them
    (UNAVAILABLE, CANCELLED by the server, a connection that breaks): until their `timeout`, or,
    without one, for 30 s. So a server may be started anew beneath them.

    The proxy that the environment names, as grpc reads it (`http_proxy`, `no_proxy`), is used for
    every target but those on this host's loopback and Unix sockets.
    """

    def __init__(self, target: Target, **options: Unpack[ClientOptions]) -> None:
        given = settings(**options)
        self._runner = runner = Runner(Propagation(given.metadata))

        def reach(address: str, *, authority: str | None = None) -> Server[Session]:
            return _server(address, authority, given, runner, moves)

        def start(flow: Flow[None]) -> None:
            threading.Thread(
                target=runner.run, args=(flow,), name="attnserve-servers", daemon=True
            ).start()

        def make_sharded(flows: ShardedFlows[Session], model: str, num_layers: int) -> Session:
            return ShardedSession(runner, flows, model, num_layers)

        moves = Moves(Following(self._reached, start) if given.follow_moved else None)
        super().__init__(target, reach, start, lambda look_up: look_up(), make_sharded)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled. Arrays live on."""
        self._runner.close()
        for server in self._to_close():
            server.close()

    attend = blocking(ClientFlows.attend)

    def stream(self, *, timeout: float | None = None) -> AttendStream:
        """Open one stream for many requests in flight; use it in `with`.

        Nothing is repeated: what fails, fails in its future.

        Args:
            timeout: seconds that the whole stream may last; None is unlimited.
        """
        lasting = arguments.seconds("timeout", timeout)
        server = self._server_to_stay()
        transport = server.transport
        stream = AttendStream(transport.attend_stream, timeout=lasting, trace_id=transport.trace_id)
        server.connection.held.add(stream)
        return stream

    put_tensor = blocking(ClientFlows.put_tensor)
    renew_tensor = blocking(ClientFlows.renew_tensor)
    drop_tensor = blocking(ClientFlows.drop_tensor)

    session = blocking(ClientFlows[Session].session)
    sessions = blocking(ClientFlows[Session].sessions)

    def batch(self, sessions: Sequence[Session]) -> Batch:
        """Steps of several sessions of one model together, each with any number of new tokens.

        Use it in `with`: a step that has not ended then is abandoned.
        """
        return Batch(self._runner, sessions)

    save = blocking(ClientFlows[Session].save)
    load = blocking(ClientFlows[Session].load)

    attend_tokens = blocking(ClientFlows.attend_tokens)
    list_models = blocking(ClientFlows.list_models)
    get_model = blocking(ClientFlows.get_model)
    server_info = blocking(ClientFlows.server_info)


def _server(
    address: str, authority: str | None, given: ClientSettings, runner: Runner, moves: Moves
) -> Server[Session]:
    """What reaches a server; `authority`: the name that it goes by, None: the address."""
    channel_options = [
        *given.channel_options(address, authority),
        *_ANSWERS_READ_BY_CALLER,
    ]
    channel = (
        grpc.secure_channel(address, given.credentials, channel_options, given.compression)
        if given.credentials
        else grpc.insecure_channel(address, channel_options, given.compression)
    )
    transport = BlockingTransport(channel, given.metadata)
    streams = SessionStreams(lambda: SessionStream(transport.decode_call, moves.told))
    shared = given.shared_memory_bytes
    sharing = None if shared is None else Sharing(shared)
    memory = None if sharing is None else SharingFlows(sharing, transport)
    connection = Connection(address, streams, runner, transport, moves, memory)
    threshold = given.stream_threshold_bytes
    flows, once = (
        ClientFlows(transport, threshold, memory, connection, Session, patient=patient)
        for patient in (True, False)
    )

    def close() -> None:
        streams.close()
        if sharing is not None and (region := sharing.close()) is not None:
            transport.unregister_now(region)
        channel.close()

    return Server(address, transport, connection, sharing, flows, once, close)
