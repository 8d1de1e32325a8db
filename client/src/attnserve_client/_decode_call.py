"""One call of messages both ways, moved on by whoever waits for it."""

import queue
from collections.abc import Iterator
from typing import Any, Protocol

import grpc

from attnserve_client import _errors
from attnserve_client._call_events import Event, Metadata


class DecodeCall(Protocol):
    """A call that has been opened.

    One thread at a time may be in `next`, and one at a time in the other methods.
    """

    @property
    def due(self) -> bool:
        """Whether anything is still to happen; then `next` can be called."""

    def send(self, message: bytes) -> None:
        """Begin to send a message; the one before must have been sent."""

    def receive(self) -> None:
        """Begin to wait for a message; there must be no such wait."""

    def next(self) -> Event:
        """Wait for something to happen. An interrupt of it ends the call."""

    def cancel(self) -> None:
        """End it: what is due happens soon."""


def open_call(channel: grpc.Channel, path: str, method: str, metadata: Metadata) -> DecodeCall:
    """Open a call: the quick kind, if this version of grpc has what it stands on."""
    try:
        from attnserve_client._direct_call import DirectCall

        return DirectCall(channel, path, method, metadata)
    except (ImportError, AttributeError, TypeError):
        return PublicCall(channel, path, method, metadata)


class PublicCall:
    """A call by grpc's public interface, which has two threads of its own beneath."""

    def __init__(self, channel: grpc.Channel, path: str, method: str, metadata: Metadata) -> None:
        self._method = method
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._handed_over = False
        self._ended = False
        open_stream = channel.stream_stream(path, None, None)
        self._call: Any = open_stream(self._messages(), metadata=metadata or None)

    @property
    def due(self) -> bool:
        """As `DecodeCall.due`."""
        return not self._ended

    def send(self, message: bytes) -> None:
        """As `DecodeCall.send`: grpc keeps what it cannot send at once."""
        self._outgoing.put(message)
        self._handed_over = True

    def receive(self) -> None:
        """As `DecodeCall.receive`: grpc always waits for one."""

    def next(self) -> Event:
        """As `DecodeCall.next`."""
        if self._handed_over:
            self._handed_over = False
            return Event(sent=True)
        try:
            return Event(received=next(self._call))
        except StopIteration:
            code = grpc.StatusCode.UNAVAILABLE
            failure = _errors.from_status(code, "the stream was ended", self._method, None)
        except grpc.RpcError as error:
            failure = _errors.from_rpc_error(error, self._method)
        except BaseException:
            self._end()
            self._call.cancel()
            raise
        self._end()
        return Event(failure=failure)

    def cancel(self) -> None:
        """As `DecodeCall.cancel`."""
        self._call.cancel()

    def _messages(self) -> Iterator[bytes]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _end(self) -> None:
        self._ended = True
        self._outgoing.put(None)
