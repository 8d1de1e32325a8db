"""The blocking client."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc
import grpc.experimental

from attnserve_client import _arguments as arguments
from attnserve_client._client_flows import ClientFlows
from attnserve_client._flows import Runner, blocking
from attnserve_client._session_state import Connection
from attnserve_client._session_stream import SessionStream, SessionStreams
from attnserve_client._sessions import Batch, Session
from attnserve_client._settings import ClientOptions, settings
from attnserve_client._sharing import SharedArrays, Sharing
from attnserve_client._sharing_flows import SharingFlows
from attnserve_client._stream import AttendStream
from attnserve_client._transport import BlockingTransport

# The answers to a single message are read by the thread that sent it, not by one that wakes it.
_ANSWERS_READ_BY_CALLER: list[tuple[str, str | int]] = [
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)
]


class AttentionClient(SharedArrays):
    """Calls an attnserve server. Safe to share between threads; close it, or use it in `with`.

    Args:
        target: `host:port`, or any target that grpc understands.
        options: credentials, metadata, shared memory and more: see `ClientOptions`.

    All calls but those of a stream are repeated, with growing pauses, while no server answers them
    (UNAVAILABLE, CANCELLED by the server, a connection that breaks): until their `timeout`, or,
    without one, for 30 s. So a server may be started anew beneath them.

    The proxy that the environment names, as grpc reads it (`http_proxy`, `no_proxy`), is used for
    every target but those on this host's loopback and Unix sockets.
    """

    def __init__(self, target: str, **options: Unpack[ClientOptions]) -> None:
        given = settings(target, **options)
        channel_options = [*given.channel_options, *_ANSWERS_READ_BY_CALLER]
        self._channel = (
            grpc.secure_channel(target, given.credentials, channel_options, given.compression)
            if given.credentials
            else grpc.insecure_channel(target, channel_options, given.compression)
        )
        self._runner = Runner()
        self._transport = BlockingTransport(self._channel, given.metadata)
        self._streams = SessionStreams(lambda: SessionStream(self._transport.decode_call))
        shared = given.shared_memory_bytes
        super().__init__(None if shared is None else Sharing(shared))
        memory = None if self._sharing is None else SharingFlows(self._sharing, self._transport)
        self._connection = Connection(self._streams, self._runner, memory)
        self._flows = ClientFlows(
            self._transport, given.stream_threshold_bytes, memory, self._connection, Session
        )

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
        self._streams.close()
        if self._sharing is not None and (region := self._sharing.close()) is not None:
            self._transport.unregister_now(region)
        self._channel.close()

    attend = blocking(ClientFlows.attend)

    def stream(self, *, timeout: float | None = None) -> AttendStream:
        """Open one stream for many requests in flight; use it in `with`.

        Nothing is repeated: what fails, fails in its future.

        Args:
            timeout: seconds that the whole stream may last; None is unlimited.
        """
        lasting = arguments.seconds("timeout", timeout)
        return AttendStream(self._transport.attend_stream, timeout=lasting)

    put_tensor = blocking(ClientFlows.put_tensor)
    renew_tensor = blocking(ClientFlows.renew_tensor)
    drop_tensor = blocking(ClientFlows.drop_tensor)

    session = blocking(ClientFlows[Session].session)
    sessions = blocking(ClientFlows[Session].sessions)

    def batch(self, sessions: Sequence[Session]) -> Batch:
        """Steps of several sessions of one model together, each with any number of new tokens.

        Use it in `with`: a step that has not ended then is abandoned.
        """
        return Batch(self._connection, sessions)

    save = blocking(ClientFlows[Session].save)
    load = blocking(ClientFlows[Session].load)

    attend_tokens = blocking(ClientFlows.attend_tokens)
    list_models = blocking(ClientFlows.list_models)
    get_model = blocking(ClientFlows.get_model)
    server_info = blocking(ClientFlows.server_info)
