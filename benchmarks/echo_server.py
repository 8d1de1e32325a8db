"""A bare grpcio server that takes bytes and gives bytes back: the floor of the transport.

The first 8 bytes of a request say how long the answer is to be, the next 8 how long the request
is (little-endian). No message is parsed, no array is made.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

CHUNK_BYTES = 1 << 20
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

_answers: dict[int, bytes] = {}


def request(size: int, answer_size: int) -> bytes:
    """A request of `size` bytes that asks for an answer of `answer_size` bytes."""
    head = answer_size.to_bytes(8, "little") + size.to_bytes(8, "little")
    return head + bytes(size - len(head))


def unary(message: bytes, context: grpc.ServicerContext) -> bytes:
    """One message in, one message out."""
    size = int.from_bytes(message[:8], "little")
    return _answers.setdefault(size, bytes(size))


def stream(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """The same bytes in chunks, both ways."""
    first = next(messages)
    left, missing = (int.from_bytes(first[i : i + 8], "little") for i in (0, 8))
    missing -= len(first)
    while missing > 0:
        missing -= len(next(messages))
    chunk = _answers.setdefault(CHUNK_BYTES, bytes(CHUNK_BYTES))
    while left > 0:
        yield chunk[: min(CHUNK_BYTES, left)]
        left -= CHUNK_BYTES


class EchoClient:
    """Calls the echo server by either transport."""

    def __init__(self, address: str) -> None:
        channel = grpc.insecure_channel(address, options=OPTIONS)
        self._unary: Any = channel.unary_unary("/echo/unary", None, None)
        self._stream: Any = channel.stream_stream("/echo/stream", None, None)

    def unary(self, message: bytes) -> None:
        """Send and receive in one message each."""
        self._unary(message)

    def stream(self, message: bytes) -> None:
        """Send and receive in chunks."""
        starts = range(0, len(message), CHUNK_BYTES)
        for _ in self._stream(message[start : start + CHUNK_BYTES] for start in starts):
            pass


def main() -> None:
    """Serve on a free port, and print it."""
    handlers = {
        "unary": grpc.unary_unary_rpc_method_handler(unary),
        "stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server = grpc.server(ThreadPoolExecutor(8), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"listening on 127.0.0.1:{port} (echo)", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
