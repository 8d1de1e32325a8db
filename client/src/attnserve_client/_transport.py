"""How the blocking client reaches its server."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc

from attnserve_client import _channel, _errors, _session_messages
from attnserve_client._assembly import Assembler
from attnserve_client._attend import AttendCall
from attnserve_client._call_events import Metadata
from attnserve_client._decode_call import DecodeCall, open_call
from attnserve_client._errors import AttnserveError
from attnserve_client._results import AttendResult
from attnserve_client._session_messages import METHOD
from attnserve_client._tracing import Propagation


class BlockingTransport:
    """The methods of `_client_flows.Transport`, each of which waits for its answer.

    Args:
        channel: to the server.
        metadata: sent with each call.
    """

    def __init__(self, channel: grpc.Channel, metadata: Metadata) -> None:
        self._channel = channel
        self._propagation = Propagation(metadata)
        self._stub = pb_grpc.AttentionServiceStub(channel)
        # Raw bytes: the SDK places tensors in messages, and finds them there, without copies.
        self._attend = channel.unary_unary(_channel.method_path("Attend"), None, None)
        self._attend_stream = channel.stream_stream(
            _channel.method_path("AttendStream"), None, None
        )
        # The same method for requests of one message, which need no thread that sends them.
        self._attend_stream_of_one = channel.unary_stream(
            _channel.method_path("AttendStream"), None, None
        )
        self._health = channel.unary_unary(_channel.HEALTH_CHECK, None, None)
        self._put_tensor = channel.stream_unary(_channel.method_path("PutTensor"), None, None)
        self._decode = channel.stream_stream(_channel.method_path(METHOD), None, None)

    @property
    def _metadata(self) -> Metadata:
        return self._propagation.metadata

    @property
    def trace_id(self) -> str | None:
        """The trace that a call belongs to which begins now; None: there is none."""
        return self._propagation.trace_id

    def unary(self, method: str, request: Any, left: float | None) -> Any:
        """Call a method of one request and one answer."""
        return getattr(self._stub, method)(request, timeout=left, metadata=self._metadata)

    def health(self, left: float | None) -> Any:
        """Ask whether the server serves; gives a HealthCheckResponse, as bytes."""
        return self._health(b"", left, self._metadata)

    def attend(self, request: bytes, left: float | None) -> Any:
        """Call Attend, with and for bytes."""
        return self._attend(request, left, self._metadata)

    def attend_streamed(self, call: AttendCall, left: float | None) -> AttendResult:
        """A request over an AttendStream of its own; its result."""
        assembler = Assembler()
        assembler.expect(1, call)
        finished = None
        stream = (
            self.attend_stream(call.to_stream(1, None), timeout=left)
            if call.plan.streamed.chunks
            else self._attend_stream_of_one(
                call.announcement(1, None), timeout=left, metadata=self._metadata
            )
        )
        for message in stream:
            done = assembler.add(message)
            if done is not None:
                finished = done[1]
                if isinstance(finished, AttnserveError):
                    stream.cancel()  # what is left of the request need not be sent
                    break
        return _errors.result_of(finished, "AttendStream")

    def attend_stream(self, messages: Iterator[bytes], *, timeout: float | None) -> Any:
        """Open an AttendStream."""
        return self._attend_stream(messages, timeout=timeout, metadata=self._metadata)

    def put(self, messages: Iterable[bytes], left: float | None) -> Any:
        """Call PutTensor, with and for bytes."""
        return self._put_tensor(iter(messages), timeout=left, metadata=self._metadata)

    def decode(
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
        faults: list[Exception] = []

        def guarded() -> Iterator[bytes]:
            try:
                yield from messages
            except Exception as error:  # grpc would but log it
                faults.append(error)

        call = self._decode(guarded(), timeout=left, metadata=self._metadata)
        try:
            for received in call:
                take(_session_messages.read(received))
        except (grpc.RpcError, AttnserveError) as error:
            if not faults:
                raise _errors.from_call(error, METHOD) from None
        finally:
            call.cancel()  # type: ignore[no-untyped-call]
        if faults:
            raise faults[0]

    def decode_call(self) -> DecodeCall:
        """Open a Decode call that is moved on by whoever waits for it."""
        return open_call(self._channel, _channel.method_path(METHOD), METHOD, self._metadata)

    def unregister(self, region: str) -> None:
        """Have the server unmap shared memory, without waiting for it."""
        request = pb.UnregisterSharedMemoryRequest(name=region)
        with contextlib.suppress(ValueError):  # this client has been closed
            self._stub.UnregisterSharedMemory.future(request, timeout=10.0, metadata=self._metadata)

    def unregister_now(self, region: str) -> None:
        """Have the server unmap shared memory, before this client is closed."""
        request = pb.UnregisterSharedMemoryRequest(name=region)
        with contextlib.suppress(grpc.RpcError):  # the server may be gone
            self._stub.UnregisterSharedMemory(request, timeout=1.0, metadata=self._metadata)
