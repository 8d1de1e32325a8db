"""The blocking client."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.experimental
import numpy as np

from attnserve_client import _channel, _tensors
from attnserve_client._client_flows import ClientFlows
from attnserve_client._flows import Runner, blocking
from attnserve_client._results import Array
from attnserve_client._session_state import Connection
from attnserve_client._session_stream import SessionStream, SessionStreams
from attnserve_client._sessions import Batch, Session
from attnserve_client._sharing import Sharing, shared_by
from attnserve_client._stream import AttendStream
from attnserve_client._transport import BlockingTransport

# The answers to a single message are read by the thread that sent it, not by one that wakes it.
_ANSWERS_READ_BY_CALLER: list[tuple[str, str | int]] = [
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)
]


class AttentionClient:
    """Calls an attnserve server. Safe to share between threads; close it, or use it in `with`.

    Args:
        target: `host:port`, or any target that grpc understands.
        credentials: for TLS; None is a plaintext channel.
        stream_threshold_bytes: requests whose tensors, both ways, exceed this go over
            AttendStream in chunks.
        shared_memory: put the tensors of `attend`, both ways, into memory shared with the server,
            which must be on this host and run as this user. Arrays that `shared_empty` or `shared`
            made are not copied. A result's arrays take up shared memory as long as they live.
        shared_memory_bytes: how much to share, at most; pages are claimed as arrays need them.

    All calls but those of a stream are repeated, with growing pauses, while no server answers them
    (UNAVAILABLE, CANCELLED by the server, a connection that breaks): until their `timeout`, or,
    without one, for 30 s. So a server may be started anew beneath them.

    The proxy that the environment names, as grpc reads it (`http_proxy`, `no_proxy`), is used for
    every target but those on this host's loopback and Unix sockets.
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
        options = [*_channel.options(target), *_ANSWERS_READ_BY_CALLER]
        self._channel = (
            grpc.secure_channel(target, credentials, options=options)
            if credentials
            else grpc.insecure_channel(target, options=options)
        )
        self._runner = Runner()
        self._transport = BlockingTransport(self._channel, ())
        self._streams = SessionStreams(lambda: SessionStream(self._transport.decode_call))
        self._connection = Connection(self._streams, self._runner)
        self._sharing = Sharing(shared_memory_bytes) if shared_memory else None
        self._flows = ClientFlows(
            self._transport, stream_threshold_bytes, self._sharing, self._connection, Session
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

    def shared_empty(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        """An array in the memory shared with the server, its elements undefined.

        Args:
            shape: of it.
            dtype: float32, float16 or bfloat16, as the model has it.

        Raises:
            RuntimeError: this client shares no memory.
            MemoryError: not so much of it is free.
        """
        return shared_by(self._sharing).arena.empty(tuple(shape), np.dtype(dtype))

    def shared(self, array: Any) -> Array:
        """A copy of an array in the memory shared with the server; errors as `shared_empty`."""
        return shared_by(self._sharing).copy(_tensors.as_array(array, "array"))

    attend = blocking(ClientFlows.attend)

    def stream(self, *, timeout: float | None = None) -> AttendStream:
        """Open one stream for many requests in flight; use it in `with`.

        Nothing is repeated: what fails, fails in its future.

        Args:
            timeout: seconds that the whole stream may last; None is unlimited.
        """
        return AttendStream(self._transport.attend_stream, timeout=timeout)

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
