"""Calls outlast servers that go away and come back, refusals, and broken connections."""

import asyncio
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    CancelledError,
    StoredTensor,
    UnavailableError,
    _retries,
)
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from plain_server import served, start

Q = np.ones((1, 2, 3, 4), np.float32)
STORED = StoredTensor("handle", 60.0, Q.shape, Q.dtype)

# Every call that the SDK repeats; the second goes over AttendStream.
CALLS: dict[str, Callable[[Any], Any]] = {
    "attend": lambda client: client.attend(Q, Q, Q, model="m"),
    "chunked": lambda client: client.attend(Q, Q, Q, model="chunked", return_weights=True),
    "attend_tokens": lambda client: client.attend_tokens([[1, 2]], model="m"),
    "put_tensor": lambda client: client.put_tensor(Q),
    "renew_tensor": lambda client: client.renew_tensor(STORED),
    "drop_tensor": lambda client: client.drop_tensor(STORED),
    "list_models": lambda client: client.list_models(),
    "get_model": lambda client: client.get_model("m"),
    "server_info": lambda client: client.server_info(),
}
# Bytes of tensors that "attend" is not above and "chunked" is.
THRESHOLD = 4 * Q.nbytes


@contextmanager
def away_for(seconds: float) -> Iterator[str]:
    """The address of a server that answered once, has gone, and is back after so many seconds."""
    first, port = start()
    with AttentionClient(f"127.0.0.1:{port}") as client:
        client.server_info()
    first.stop(0).wait()
    back: list[Any] = []
    timer = threading.Timer(seconds, lambda: back.extend(start(port=port)))
    timer.start()
    yield f"127.0.0.1:{port}"
    timer.join()
    back[0].stop(0).wait()


def test_every_call_outlasts_a_server_that_is_away_for_2_seconds() -> None:
    with (
        away_for(2.0) as address,
        AttentionClient(address, stream_threshold_bytes=THRESHOLD) as client,
        ThreadPoolExecutor(len(CALLS)) as pool,
    ):
        started = time.monotonic()
        for done in [pool.submit(call, client) for call in CALLS.values()]:
            done.result(20)
        assert 1.5 < time.monotonic() - started < 8


def test_every_asyncio_call_outlasts_a_server_that_is_away_for_2_seconds() -> None:
    async def call_all(address: str) -> None:
        async with AsyncAttentionClient(address, stream_threshold_bytes=THRESHOLD) as client:
            await asyncio.gather(*(call(client) for call in CALLS.values()))

    with away_for(2.0) as address:
        started = time.monotonic()
        asyncio.run(asyncio.wait_for(call_all(address), 20))
        assert 1.5 < time.monotonic() - started < 8


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_every_call_outlasts_refusals(code: grpc.StatusCode) -> None:
    """More of them than there once were tries."""
    counts = {method: itertools.count() for method in ("AttendStream", *pb_methods())}

    def refuse(method: str, context: grpc.ServicerContext) -> None:
        if next(counts[method]) < 5:
            context.abort(code, "shutting down")

    async def call_all(address: str) -> None:
        async with AsyncAttentionClient(address, stream_threshold_bytes=THRESHOLD) as client:
            await asyncio.gather(*(call(client) for call in CALLS.values()))

    with served(refuse) as address:
        with (
            AttentionClient(address, stream_threshold_bytes=THRESHOLD) as client,
            ThreadPoolExecutor(len(CALLS)) as pool,
        ):
            for done in [pool.submit(call, client) for call in CALLS.values()]:
                done.result(20)
        counts.update((method, itertools.count()) for method in counts)
        asyncio.run(asyncio.wait_for(call_all(address), 20))


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_chunked_request_refused_within_its_stream_is_repeated(code: grpc.StatusCode) -> None:
    refusals = itertools.count()

    class Refusing(pb_grpc.AttentionServiceServicer):
        def AttendStream(self, requests, context):  # type: ignore[no-untyped-def]  # noqa: N802
            number = next(requests).request_id
            if next(refusals) % 3 < 2:
                error = pb.Error(code=code.value[0], message="draining")
                yield pb.AttendStreamResponse(request_id=number, error=error)
            else:
                yield pb.AttendStreamResponse(request_id=number, response=pb.AttendResponse())

    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_AttentionServiceServicer_to_server(Refusing(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with AttentionClient(address, stream_threshold_bytes=THRESHOLD) as client:
        CALLS["chunked"](client)

    async def call() -> None:
        async with AsyncAttentionClient(address, stream_threshold_bytes=THRESHOLD) as client:
            await CALLS["chunked"](client)

    asyncio.run(call())
    server.stop(0).wait()
    assert next(refusals) == 6


def test_sixteen_callers_see_nothing_of_a_server_that_is_started_anew() -> None:
    def work(method: str, context: grpc.ServicerContext) -> None:
        time.sleep(0.05)

    first, port = start(work)
    stop = threading.Event()

    def call_on(client: AttentionClient) -> int:
        calls = 0
        while not stop.is_set():
            client.attend(Q, Q, Q, model="m")
            calls += 1
        return calls

    with (
        AttentionClient(f"127.0.0.1:{port}") as client,
        ThreadPoolExecutor(16) as pool,
    ):
        callers = [pool.submit(call_on, client) for _ in range(16)]
        time.sleep(0.5)
        first.stop(0).wait()  # cancels what runs
        time.sleep(1.5)
        second, _ = start(work, port)
        time.sleep(2.5)
        stop.set()
        assert all(caller.result(10) > 10 for caller in callers)
        second.stop(0).wait()


@contextmanager
def resetting(address: str, resets: int) -> Iterator[str]:
    """Forwards connections to an address; the first ones are reset under their first request."""
    host, _, port = address.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def forward(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)

    def accept() -> None:
        for number in itertools.count():
            try:
                caller, _ = listener.accept()
            except OSError:  # closed
                return
            if number < resets:
                caller.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # SETTINGS of HTTP/2, empty
                received = b""
                while b"Attend" not in received:
                    received += caller.recv(65536)
                # With no time to linger, closing resets the connection.
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                caller.close()
                continue
            server = socket.create_connection((host, int(port)))
            for pair in ((caller, server), (server, caller)):
                threading.Thread(target=forward, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_connections_that_are_reset_are_outlasted() -> None:
    with (
        served() as address,
        resetting(address, 5) as way,
        AttentionClient(way) as client,
    ):
        assert client.attend(Q, Q, Q, model="m").model == "m"

    async def call(way: str) -> str:
        async with AsyncAttentionClient(way) as client:
            return (await client.attend(Q, Q, Q, model="m")).model

    with served() as address, resetting(address, 5) as way:
        assert asyncio.run(call(way)) == "m"


def test_tries_last_until_the_timeout_and_end_with_the_reason() -> None:
    started = time.monotonic()
    with (
        AttentionClient("127.0.0.1:1") as client,
        pytest.raises(UnavailableError, match="refused"),
    ):
        client.attend(Q, Q, Q, model="m", timeout=3.0)
    assert 1.7 < time.monotonic() - started < 3.2


def test_tries_without_a_timeout_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _retries.UNTIMED_SECONDS == 30
    monkeypatch.setattr(_retries, "UNTIMED_SECONDS", 2.0)
    started = time.monotonic()
    with AttentionClient("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.attend(Q, Q, Q, model="m", timeout=None)
    assert 0.9 < time.monotonic() - started < 2.5


def test_a_server_that_names_a_time_is_not_asked_before_it() -> None:
    times = []

    def refuse(method: str, context: grpc.ServicerContext) -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            context.set_trailing_metadata([("retry-after", "0.5")])
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    with served(refuse) as address, AttentionClient(address) as client:
        client.server_info()
    assert 0.5 <= times[1] - times[0] < 2


def test_an_unloaded_model_is_not_waited_for() -> None:
    calls = []

    def refuse(method: str, context: grpc.ServicerContext) -> None:
        calls.append(method)
        context.abort(grpc.StatusCode.UNAVAILABLE, "model: m is unloaded; load it, or call another")

    with (
        served(refuse) as address,
        AttentionClient(address) as client,
        pytest.raises(UnavailableError, match="unloaded"),
    ):
        client.attend(Q, Q, Q, model="m")
    assert calls == ["Attend"]


def test_closing_the_client_ends_its_tries() -> None:
    client = AttentionClient("127.0.0.1:1")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.attend, Q, Q, Q, model="m", timeout=None)
        time.sleep(1.0)
        client.close()
        with pytest.raises(CancelledError, match="closed"):
            call.result(2)


def test_closing_the_client_cancels_a_call_under_way_for_good() -> None:
    calls = []

    def hang(method: str, context: grpc.ServicerContext) -> None:
        calls.append(method)
        time.sleep(1.0)

    with served(hang) as address, ThreadPoolExecutor(1) as pool:
        client = AttentionClient(address)
        call = pool.submit(client.attend, Q, Q, Q, model="m")
        time.sleep(0.3)
        client.close()
        with pytest.raises(CancelledError):
            call.result(2)
    assert calls == ["Attend"]


def test_closing_an_asyncio_client_ends_its_tries() -> None:
    async def close_after_a_second() -> None:
        client = AsyncAttentionClient("127.0.0.1:1")
        call = asyncio.create_task(client.attend(Q, Q, Q, model="m", timeout=None))
        await asyncio.sleep(1.0)
        await client.close()
        with pytest.raises(CancelledError, match="closed"):
            await asyncio.wait_for(call, 2)

    asyncio.run(close_after_a_second())


def test_a_task_that_is_cancelled_is_not_tried_again() -> None:
    calls = []

    def hang(method: str, context: grpc.ServicerContext) -> None:
        calls.append(method)
        time.sleep(0.5)

    async def cancel(address: str) -> None:
        async with AsyncAttentionClient(address) as client:
            call = asyncio.create_task(client.attend(Q, Q, Q, model="m"))
            await asyncio.sleep(0.2)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.sleep(0.5)

    with served(hang) as address:
        asyncio.run(cancel(address))
    assert calls == ["Attend"]


def pb_methods() -> list[str]:
    service = pb.DESCRIPTOR.services_by_name["AttentionService"]
    return [method.name for method in service.methods]
