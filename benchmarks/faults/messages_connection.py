"""Thousands of gRPC calls a second over one HTTP/2 connection (RFC 9113), whatever they send.

What grpc would not send, such as a wrong length before a message, is sent here: a call's body is
bytes. HPACK is the library `hpack`'s; the server is told to keep no table of headers, so that equal
headers of answers are equal bytes, and are read once.
"""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import hpack

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK, _PADDED = 1, 4, 1, 8
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 4, 5
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_LARGEST_WINDOW = 2**31 - 1
_DEFAULT_WINDOW = 65_535
_MOST_REMEMBERED = 20_000
_HEADER = struct.Struct(">BHBBI")

NO_STATUS = -1
"""The code of a call that ended without grpc-status."""


class ConnectionEndedError(Exception):
    """The server has closed the connection, or says nothing any more."""


@dataclass(slots=True)
class Answer:
    """How a call ended.

    Attributes:
        code: grpc-status.
        text: grpc-message, as it is sent.
        body: the messages, each with the five bytes before it.
    """

    code: int
    text: str
    body: bytes


@dataclass(slots=True)
class _Call:
    unsent: bytes
    window: int
    received: list[bytes] = field(default_factory=list)


def prefixed(message: bytes, flag: int = 0) -> bytes:
    """A message as gRPC sends it."""
    return bytes((flag,)) + len(message).to_bytes(4, "big") + message


def messages_of(body: bytes) -> Iterator[bytes]:
    """The messages of an answer."""
    at = 0
    while at + 5 <= len(body):
        size = int.from_bytes(body[at + 1 : at + 5], "big")
        yield body[at + 5 : at + 5 + size]
        at += 5 + size


class Connection:
    """One connection, for one thread.

    Args:
        port: of a server on this machine.
        patience: seconds without a byte from the server after which it hangs.
    """

    def __init__(self, port: int, patience: float) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=patience)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        settings = struct.pack(
            ">HIHI", _HEADER_TABLE_SIZE, 0, _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW
        )
        self._output = bytearray(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
        grown = _LARGEST_WINDOW - _DEFAULT_WINDOW
        self._output += _frame(_WINDOW_UPDATE, 0, 0, grown.to_bytes(4, "big"))
        self._input = bytearray()
        self._calls: dict[int, _Call] = {}
        self._waiting: dict[int, _Call] = {}  # those whose bodies wait for room
        self._next = 1
        self._window, self._first_window, self._frame_size = _DEFAULT_WINDOW, _DEFAULT_WINDOW, 16384
        self._blocks: dict[tuple[str, bool], bytes] = {}
        self._ends: dict[bytes, tuple[int, str]] = {}

    def close(self) -> None:
        """Close it; calls under way are given up."""
        self._socket.close()

    @property
    def open(self) -> int:
        """Calls that have not ended."""
        return len(self._calls)

    def call(self, path: str, body: bytes, *, gzip: bool = False) -> int:
        """Begin a call with all that it sends; `answers` sends it. Gives its number."""
        stream, self._next = self._next, self._next + 2
        self._output += _frame(_HEADERS, _END_HEADERS, stream, self._block(path, gzip))
        call = _Call(body, self._first_window)
        self._calls[stream] = call
        self._send_body(stream, call)
        return stream

    def answers(self) -> Iterator[tuple[int, Answer]]:
        """Send what there is to send, wait for the server, and give the calls that have ended.

        Raises:
            ConnectionEndedError: it is gone, or hangs.
        """
        try:
            if self._output:
                output, self._output = self._output, bytearray()
                self._socket.sendall(output)
            received = self._socket.recv(1 << 20)
        except TimeoutError:
            raise ConnectionEndedError("nothing came from the server for too long") from None
        except OSError as error:
            raise ConnectionEndedError(str(error)) from None
        if not received:
            raise ConnectionEndedError("the server closed the connection")
        self._input += received
        yield from self._read()

    def _read(self) -> Iterator[tuple[int, Answer]]:
        at, data = 0, bytes(self._input)
        while len(data) - at >= 9:
            high, low, kind, flags, stream = _HEADER.unpack_from(data, at)
            end = at + 9 + (high << 16 | low)
            if end > len(data):
                break
            payload = data[at + 9 : end]
            at = end
            call = self._calls.get(stream)
            if kind in (_DATA, _HEADERS) and call is not None:
                if flags & _PADDED or (kind == _HEADERS and not flags & _END_HEADERS):
                    raise ConnectionEndedError("frames that this reader does not know")
                if kind == _DATA:
                    call.received.append(payload)
                if flags & _END_STREAM:
                    code, text = self._end(payload) if kind == _HEADERS else (NO_STATUS, "DATA")
                    yield stream, self._ended(stream, code, text)
            elif kind == _RST_STREAM and call is not None:
                reason = int.from_bytes(payload, "big")
                yield stream, self._ended(stream, NO_STATUS, f"RST_STREAM {reason}")
            elif stream == 0 or kind == _WINDOW_UPDATE:
                self._control(kind, flags, stream, payload)
        del self._input[:at]

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == _INITIAL_WINDOW_SIZE:
                    for call in self._waiting.values():
                        call.window += value - self._first_window
                    self._first_window = value
                elif name == _MAX_FRAME_SIZE:
                    self._frame_size = min(value, 1 << 16)
            self._output += _frame(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and not flags & _ACK:
            self._output += _frame(_PING, _ACK, 0, payload)
        elif kind == _GOAWAY:
            reason = int.from_bytes(payload[4:8], "big")
            raise ConnectionEndedError(f"GOAWAY {reason}: {payload[8:200]!r}")
        elif kind == _WINDOW_UPDATE:
            grown = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += grown
            elif stream in self._waiting:
                self._waiting[stream].window += grown
        for number, call in list(self._waiting.items()):
            self._send_body(number, call)

    def _send_body(self, stream: int, call: _Call) -> None:
        """As much of a body as there is room for."""
        while True:
            size = min(len(call.unsent), call.window, self._window, self._frame_size)
            last = size == len(call.unsent)
            if size <= 0 and not last:
                self._waiting[stream] = call
                return
            part, call.unsent = call.unsent[:size], call.unsent[size:]
            self._output += _frame(_DATA, _END_STREAM if last else 0, stream, part)
            call.window -= size
            self._window -= size
            if last:
                self._waiting.pop(stream, None)
                return

    def _ended(self, stream: int, code: int, text: str) -> Answer:
        call = self._calls.pop(stream)
        self._waiting.pop(stream, None)
        return Answer(code, text, b"".join(call.received))

    def _end(self, block: bytes) -> tuple[int, str]:
        known = self._ends.get(block)
        if known is None:
            decoder = hpack.Decoder()
            decoder.max_allowed_table_size = decoder.header_table_size = 0
            fields = dict(decoder.decode(block, raw=True))
            code = int(fields.get(b"grpc-status", str(NO_STATUS).encode()))
            known = code, fields.get(b"grpc-message", b"").decode("latin-1")
            if len(self._ends) >= _MOST_REMEMBERED:
                self._ends.clear()
            self._ends[block] = known
        return known

    def _block(self, path: str, gzip: bool) -> bytes:
        block = self._blocks.get((path, gzip))
        if block is None:
            fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "test"}
            fields |= {"content-type": "application/grpc", "te": "trailers"}
            if gzip:
                fields["grpc-encoding"] = "gzip"
            # RFC 7541, 6.2.2: literals without indexing, so that the block means always the same.
            block = b"".join(
                b"\0" + b"".join(bytes((len(text),)) + text.encode() for text in field)
                for field in fields.items()
            )
            self._blocks[path, gzip] = block
        return block


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    size = len(payload)
    return _HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload
