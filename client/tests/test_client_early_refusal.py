"""A server that refuses a request before it has read it, over plain HTTP/2 frames.

It answers the headers of a request with trailers alone and RST_STREAM(NO_ERROR), as RFC 9113,
section 8.1, has it, and never opens its flow control window: most of the request cannot be sent.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    AttnserveError,
    ResourceExhaustedError,
    UnavailableError,
)

LARGE = np.ones((1, 8, 4096, 16), np.float32)  # 2 MiB
ALWAYS, NEVER = 0, 1 << 40

DATA, HEADERS, RST_STREAM, SETTINGS, PING = 0, 1, 3, 4, 6
END_STREAM, END_HEADERS, ACK = 1, 4, 1
NO_ERROR = 0


class Refuser:
    """Refuses every request; counts them, and the bytes of their bodies."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.requests = self.body_bytes = 0
        self._trailers = b"\x88" + b"".join(  # :status 200
            literal(name, value)
            for name, value in (
                ("content-type", "application/grpc"),
                ("grpc-status", str(code.value[0])),
                ("grpc-message", "queue: full"),
                ("retry-after", str(RETRY_AFTER)),
            )
        )

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as received:
            received.read(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
            connection.sendall(frame(SETTINGS))
            while header := received.read(9):
                length = int.from_bytes(header[:3], "big")
                kind, flags, stream = struct.unpack(">BBI", header[3:])
                payload = received.read(length)
                if kind == SETTINGS and not flags & ACK:
                    connection.sendall(frame(SETTINGS, ACK))
                elif kind == PING and not flags & ACK:
                    connection.sendall(frame(PING, ACK, payload=payload))
                elif kind == HEADERS:
                    self.requests += 1
                    connection.sendall(
                        frame(HEADERS, END_STREAM | END_HEADERS, stream, self._trailers)
                        + frame(RST_STREAM, 0, stream, struct.pack(">I", NO_ERROR))
                    )
                elif kind == DATA:
                    self.body_bytes += length


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header field, not indexed, as HPACK has it (RFC 7541, section 6.2.2)."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))


@contextmanager
def refusing(code: grpc.StatusCode) -> Iterator[tuple[str, Refuser]]:
    listener = socket.create_server(("127.0.0.1", 0))
    refuser = Refuser(code)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=serve, args=[connection], daemon=True).start()

    def serve(connection: socket.socket) -> None:
        with suppress(OSError):  # the caller has gone
            refuser.serve(connection)

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}", refuser
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


CODES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}
# Longer than any timeout here, or UNAVAILABLE would be tried again.
RETRY_AFTER = 60
REPEATS = 30  # each is a race between the refusal and what is being sent


def check(error: AttnserveError, code: grpc.StatusCode) -> None:
    assert type(error) is CODES[code]
    assert (error.message, error.retry_after) == ("queue: full", RETRY_AFTER)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("threshold", [ALWAYS, NEVER], ids=["chunked", "one message"])
def test_a_refused_request_is_the_servers_own_error(code: grpc.StatusCode, threshold: int) -> None:
    with (
        refusing(code) as (address, refuser),
        AttentionClient(address, stream_threshold_bytes=threshold) as client,
    ):
        for _ in range(REPEATS):
            with pytest.raises(AttnserveError) as caught:
                client.attend(LARGE, LARGE, LARGE, model="m")
            check(caught.value, code)
            with pytest.raises(AttnserveError) as caught:
                client.put_tensor(LARGE)
            check(caught.value, code)
        assert refuser.requests == 2 * REPEATS
        assert refuser.body_bytes < 1 << 20


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("threshold", [ALWAYS, NEVER], ids=["chunked", "one message"])
def test_a_request_refused_to_asyncio_is_the_servers_own_error(
    code: grpc.StatusCode, threshold: int
) -> None:
    async def call(address: str) -> None:
        async with AsyncAttentionClient(address, stream_threshold_bytes=threshold) as client:
            for _ in range(REPEATS):
                with pytest.raises(AttnserveError) as caught:
                    await client.attend(LARGE, LARGE, LARGE, model="m")
                check(caught.value, code)
                with pytest.raises(AttnserveError) as caught:
                    await client.put_tensor(LARGE)
                check(caught.value, code)

    with refusing(code) as (address, refuser):
        asyncio.run(asyncio.wait_for(call(address), 30))
        assert refuser.requests == 2 * REPEATS


@pytest.mark.parametrize("code", CODES)
def test_a_refused_stream_fails_all_its_futures(code: grpc.StatusCode) -> None:
    with refusing(code) as (address, _), AttentionClient(address) as client:
        for _ in range(REPEATS):
            futures = []
            with client.stream() as stream:
                try:
                    for _ in range(3):
                        futures.append(stream.submit(LARGE, LARGE, LARGE, model="m"))  # noqa: PERF401
                except AttnserveError as error:  # it failed before all were handed over
                    check(error, code)
            for future in futures:
                error = future.exception(5)
                assert isinstance(error, AttnserveError)
                check(error, code)
            with pytest.raises(CODES[code]):
                stream.submit(LARGE, LARGE, LARGE, model="m")
