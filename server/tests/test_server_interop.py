"""gRPC's interoperability cases, as far as they apply to this service.

https://github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md has their names.
"""

import asyncio
import queue
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import serving
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttentionServer]:
    repository = serving.write_causal(tmp_path_factory.mktemp("interop"))
    with serving.serving(repository) as running:
        yield running


@pytest.fixture
def channel(server: AttentionServer) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=options) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.AttentionServiceStub:
    return pb_grpc.AttentionServiceStub(channel)


def asked(request_id: int, length: int = 8) -> pb.AttendStreamRequest:
    return pb.AttendStreamRequest(request_id=request_id, request=serving.attend_request(length))


def nothing_is_left(server: AttentionServer) -> bool:
    def at_rest() -> bool:
        gauges = server.plane.gauges()
        return not any(gauges[name] for name in ("inside", "running", "waiting", "bytes_in_flight"))

    return serving.eventually(at_rest)


def test_empty_unary(stub: pb_grpc.AttentionServiceStub) -> None:
    assert stub.ServerInfo(pb.ServerInfoRequest(), timeout=10).name == "attnserve"


def test_large_unary(stub: pb_grpc.AttentionServiceStub, server: AttentionServer) -> None:
    request = serving.attend_request(256, 64)  # 6 MiB there, 2 MiB back
    answer = stub.Attend(request, timeout=30)
    output = np.frombuffer(answer.output.data, np.float32)
    assert output.size * 4 == len(request.value.data)
    np.testing.assert_allclose(output, 1, atol=1e-5)
    assert nothing_is_left(server)


@pytest.mark.parametrize("way", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_client_compressed_unary(stub: pb_grpc.AttentionServiceStub, way: grpc.Compression) -> None:
    answer = stub.Attend(serving.attend_request(512), timeout=10, compression=way)
    np.testing.assert_allclose(np.frombuffer(answer.output.data, np.float32), 1, atol=1e-5)


def test_ping_pong(stub: pb_grpc.AttentionServiceStub) -> None:
    requests: queue.SimpleQueue[pb.AttendStreamRequest | None] = queue.SimpleQueue()
    call = stub.AttendStream(iter(requests.get, None), timeout=30)
    for request_id, length in enumerate((1, 512, 7, 64, 1), 1):
        requests.put(asked(request_id, length))
        answer = next(call)
        assert answer.request_id == request_id
        assert list(answer.response.output.shape) == [1, serving.HEADS, length, serving.DIM]
    requests.put(None)
    assert list(call) == []
    assert call.code() == grpc.StatusCode.OK


def test_empty_stream(stub: pb_grpc.AttentionServiceStub) -> None:
    call = stub.AttendStream(iter(()), timeout=10)
    assert list(call) == []
    assert call.code() == grpc.StatusCode.OK


def test_cancel_after_begin(stub: pb_grpc.AttentionServiceStub, server: AttentionServer) -> None:
    requests: queue.SimpleQueue[pb.PutTensorRequest | None] = queue.SimpleQueue()
    call = stub.PutTensor.future(iter(requests.get, None), timeout=30)
    call.cancel()
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    assert call.code() == grpc.StatusCode.CANCELLED
    requests.put(None)
    assert nothing_is_left(server)


def test_a_cancelled_call_is_counted_as_one(server: AttentionServer, channel: grpc.Channel) -> None:
    def counts() -> dict[str, int]:
        return {code: n for method, code, n in server.plane.requests() if method == "Attend"}

    before = counts()
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = channel.stream_unary(serving.ATTEND).future(iter(requests.get, None), timeout=30)
    assert serving.eventually(lambda: server.plane.gauges()["arriving"] == 1)
    call.cancel()
    requests.put(None)
    expected = before | {"CANCELLED": before.get("CANCELLED", 0) + 1}
    assert serving.eventually(lambda: counts() == expected)


def test_cancel_after_first_response(
    stub: pb_grpc.AttentionServiceStub, server: AttentionServer
) -> None:
    requests: queue.SimpleQueue[pb.AttendStreamRequest | None] = queue.SimpleQueue()
    call = stub.AttendStream(iter(requests.get, None), timeout=30)
    requests.put(asked(1))
    assert next(call).request_id == 1
    call.cancel()
    with pytest.raises(grpc.RpcError):
        next(call)
    assert call.code() == grpc.StatusCode.CANCELLED
    requests.put(None)
    assert nothing_is_left(server)


def test_timeout_on_sleeping_server(stub: pb_grpc.AttentionServiceStub) -> None:
    requests: queue.SimpleQueue[pb.AttendStreamRequest | None] = queue.SimpleQueue()
    call = stub.AttendStream(iter(requests.get, None), timeout=0.3)
    with pytest.raises(grpc.RpcError):
        next(call)
    assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    requests.put(None)


@pytest.mark.parametrize(
    "name",
    ["\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n", "100 % %zz %41", "naïve"],
)
def test_special_status_message(stub: pb_grpc.AttentionServiceStub, name: str) -> None:
    for call in (
        lambda: stub.Attend(pb.AttendRequest(model=name), timeout=10),
        lambda: stub.GetModel(pb.GetModelRequest(name=name), timeout=10),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert f"given {name!r}" in refused.value.details() or name in refused.value.details()


def test_unimplemented_method(channel: grpc.Channel) -> None:
    for path in ("/attnserve.v1.AttentionService/Guess", "/attnserve.v2.Other/Attend", "/x/y"):
        with pytest.raises(grpc.RpcError) as refused:
            serving.raw_call(channel, path)(b"", timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert serving.raw_call(channel, serving.HEALTH_CHECK)(b"", timeout=10)


async def many_calls_of_both_kinds(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)

        async def stream() -> None:
            call = stub.AttendStream(timeout=30)
            for request_id in range(1, 6):
                await call.write(asked(request_id))
                assert (await call.read()).request_id == request_id
            await call.done_writing()
            assert await call.code() == grpc.StatusCode.OK

        unary = (stub.Attend(serving.attend_request(), timeout=30) for _ in range(20))
        await asyncio.gather(*unary, *(stream() for _ in range(10)))


def test_concurrent_calls_on_one_connection(server: AttentionServer) -> None:
    asyncio.run(many_calls_of_both_kinds(f"127.0.0.1:{server.port}"))
    assert nothing_is_left(server)
