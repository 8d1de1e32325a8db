"""A caller that sends whatever HTTP/2 frames it likes (RFC 9113), where client libraries would not.

Headers go without compression; of answers, headers are not read.
"""

import contextlib
import socket
import struct
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import NamedTuple, Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
CANCEL, ENHANCE_YOUR_CALM = 8, 11

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Frame(NamedTuple):
    """One frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    def encoded(self) -> bytes:
        """As it is sent."""
        size = len(self.payload).to_bytes(3, "big")
        return size + struct.pack(">BBI", self.kind, self.flags, self.stream) + self.payload


def headers(
    stream: int, path: str, *, end: bool = False, more: Mapping[str, str] | None = None
) -> bytes:
    """The headers of a call."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "test"}
    fields |= {"content-type": "application/grpc", "te": "trailers", **(more or {})}
    # RFC 7541, 6.2.2: a literal without indexing, its name a literal too.
    block = b"".join(
        b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in field)
        for field in fields.items()
    )
    return Frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block).encoded()


def message(stream: int, content: bytes, *, end: bool = True) -> bytes:
    """A whole gRPC message, small enough for one frame."""
    return data(stream, b"\0" + len(content).to_bytes(4, "big") + content, end=end)


def data(stream: int, content: bytes, *, end: bool = False) -> bytes:
    """Bytes of a body."""
    return Frame(DATA, END_STREAM if end else 0, stream, content).encoded()


def reset(stream: int) -> bytes:
    """The caller's end of a call."""
    return Frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big")).encoded()


class Http2Connection:
    """A connection over TCP, its preface and SETTINGS sent."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.send(_PREFACE + Frame(SETTINGS, 0, 0, b"").encoded())
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()

    def send(self, *frames: bytes) -> None:
        """Send them, waiting for room."""
        self.socket.sendall(b"".join(frames))

    def frames(self) -> Iterator[Frame]:
        """Frames as they come, until the server closes the connection."""
        while (header := self._take(9)) is not None:
            size = int.from_bytes(header[:3], "big")
            kind, flags, stream = struct.unpack(">BBI", header[3:])
            payload = self._take(size)
            if payload is None:
                return
            if kind == SETTINGS and not flags & ACK:
                with contextlib.suppress(OSError):
                    self.send(Frame(SETTINGS, ACK, 0, b"").encoded())
            yield Frame(kind, flags, stream, payload)

    def answer(self, stream: int) -> bytes:
        """The body of one answer, read to its end; empty for a refusal."""
        body = b""
        for frame in self.frames():
            if frame.stream == stream:
                body += frame.payload if frame.kind == DATA else b""
                if frame.kind == RST_STREAM or frame.flags & END_STREAM:
                    return body
        raise ConnectionError("the server closed the connection")

    def _take(self, size: int) -> bytes | None:
        while len(self._received) < size:
            try:
                received = self.socket.recv(1 << 16)
            except ConnectionResetError:
                received = b""
            if not received:
                return None
            self._received += received
        taken, self._received = self._received[:size], self._received[size:]
        return taken
