"""What one caller does, by mistake or by intent, delays no other and takes bounded memory."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import grpc
import http2
import numpy as np
import pytest
import serving
from attnserve_client import AttentionClient, ResourceExhaustedError
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from attnserve_server.settings import MIB, Limits
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_causal(tmp_path_factory.mktemp("overload"))


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[AttentionServer]:
    # On a machine that is busy with other tests, tiny requests take milliseconds too.
    with serving.serving(repository, limits=Limits(max_queue_seconds=3)) as running:
        yield running


@pytest.fixture
def channel(server: AttentionServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.AttentionServiceStub:
    return pb_grpc.AttentionServiceStub(channel)


def healthy(channel: grpc.Channel) -> bool:
    check = health_pb2_grpc.HealthStub(channel).Check
    return check(health_pb2.HealthCheckRequest(), timeout=10).status == SERVING


def infer_request(length: int = 8) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="causal")
    shape = [1, serving.HEADS, length, serving.DIM]
    for name in ("query", "key", "value"):
        request.inputs.add(name=name, datatype="FP32", shape=shape)
        request.raw_input_contents.append(np.ones(shape, np.float32).tobytes())
    return request


def test_idle_streams_are_not_noticed(server: AttentionServer, channel: grpc.Channel) -> None:
    paths = [
        serving.ATTEND_STREAM,
        serving.MODEL_STREAM_INFER,
        serving.PUT_TENSOR,
        serving.ATTEND,
        serving.LIST_MODELS,
        serving.REFLECTION,
    ]
    with http2.Http2Connection(server.port) as idle:
        for number in range(330):
            idle.send(http2.headers(2 * number + 1, paths[number % len(paths)]))
        attend = serving.attend_request().SerializeToString()
        idle.send(http2.headers(1001, serving.HEALTH_CHECK), http2.message(1001, b""))
        assert idle.answer(1001) == b"\0\0\0\0\2\x08\1"
        idle.send(http2.headers(1003, serving.ATTEND), http2.message(1003, attend))
        assert pb.AttendResponse.FromString(idle.answer(1003)[5:]).model == "causal"
        assert healthy(channel)
        stub = pb_grpc.AttentionServiceStub(channel)
        assert stub.Attend(serving.attend_request(), timeout=10).model == "causal"
        assert stub.ListModels(pb.ListModelsRequest(), timeout=10).models


def test_a_body_that_does_not_come_holds_no_place(
    server: AttentionServer, stub: pb_grpc.AttentionServiceStub
) -> None:
    with http2.Http2Connection(server.port) as waiting:
        for number in range(60):
            waiting.send(http2.headers(2 * number + 1, serving.ATTEND))
        assert serving.eventually(lambda: server.plane.gauges()["arriving"] == 60)
        assert server.plane.gauges()["inside"] == 0
        calls = [stub.Attend.future(serving.attend_request(32), timeout=20) for _ in range(100)]
        assert [call.code() for call in calls] == [grpc.StatusCode.OK] * 100
        assert server.plane.gauges()["arriving"] == 60
    assert serving.eventually(lambda: server.plane.gauges()["arriving"] == 0)


async def streams_of_both_protocols(port: int) -> list[int]:
    """Answers on busy ModelStreamInfer streams, by the time that all AttendStream have theirs."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        inference = oip_grpc.GRPCInferenceServiceStub(channel)
        attention = pb_grpc.AttentionServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        enough = asyncio.Event()

        async def infer() -> int:
            async def requests() -> AsyncIterator[oip.ModelInferRequest]:
                for _ in range(2):
                    yield infer_request(64)
                while not enough.is_set():
                    await answered.acquire()
                    yield infer_request(64)

            count, answered = 0, asyncio.Semaphore(0)
            async for answer in inference.ModelStreamInfer(requests()):
                assert not answer.error_message
                count += 1
                answered.release()
            return count

        async def attend() -> None:
            call = attention.AttendStream()
            for request_id in range(1, 6):
                request = serving.attend_request(64)
                await call.write(pb.AttendStreamRequest(request_id=request_id, request=request))
                answer = await call.read()
                assert (answer.request_id, answer.WhichOneof("body")) == (request_id, "response")
            await call.done_writing()

        async def check() -> None:
            for _ in range(10):
                answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
                assert answer.status == SERVING

        busy = [asyncio.create_task(infer()) for _ in range(40)]
        await asyncio.wait_for(asyncio.gather(check(), *(attend() for _ in range(8))), 60)
        enough.set()
        return await asyncio.wait_for(asyncio.gather(*busy), 60)


def test_busy_streams_of_one_protocol_leave_room_for_the_other(server: AttentionServer) -> None:
    assert min(asyncio.run(streams_of_both_protocols(server.port))) > 0


def test_a_slow_upload_is_not_computing(
    server: AttentionServer, stub: pb_grpc.AttentionServiceStub
) -> None:
    for _ in range(8):
        stub.Attend(serving.attend_request(32), timeout=10)
    content = serving.attend_request(32).SerializeToString()
    with http2.Http2Connection(server.port) as slow:
        framed = b"\0" + len(content).to_bytes(4, "big") + content
        slow.send(http2.headers(1, serving.ATTEND))
        for part in range(10):
            cut = slice(part * len(framed) // 10, (part + 1) * len(framed) // 10)
            slow.send(http2.data(1, framed[cut], end=part == 9))
            time.sleep(0.15)
        assert slow.answer(1)
    burst = [stub.Attend.future(serving.attend_request(32), timeout=20) for _ in range(64)]
    assert [call.code() for call in burst] == [grpc.StatusCode.OK] * 64


def test_long_requests_of_a_few_callers_are_all_served(
    stub: pb_grpc.AttentionServiceStub,
) -> None:
    calls = [stub.Attend.future(serving.attend_request(4096), timeout=60) for _ in range(6)]
    assert [call.code() for call in calls] == [grpc.StatusCode.OK] * 6


@pytest.mark.parametrize("cancelled", [False, True], ids=["deadline", "cancelled"])
def test_a_computation_that_nobody_waits_for_is_stopped(
    repository: Path, stub: pb_grpc.AttentionServiceStub, cancelled: bool
) -> None:
    wanted = pb.ReturnOptions(no_output=True, mass_by_distance=4096)
    four = serving.attend_request(4096, 4, returns=wanted)
    stub.Attend(four, timeout=60)
    started = time.monotonic()
    stub.Attend(four, timeout=60)
    batch = 32
    expected = (time.monotonic() - started) * batch / 4  # seconds, sending included
    timeout = None if cancelled else expected / 2
    request = serving.attend_request(4096, batch, returns=wanted)
    # One that has computed nothing yet, and cannot say beforehand that the time is too short.
    with (
        serving.serving(repository) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        anew = pb_grpc.AttentionServiceStub(channel)
        for _ in range(5):  # on a busy machine its deadline may pass before it begins
            call = anew.Attend.future(request, timeout=timeout)
            assert serving.eventually(
                lambda call=call: server.plane.gauges()["running"] == 1 or call.done(), 60
            )
            if not call.done():
                break
        if cancelled:
            call.cancel()
        else:
            assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        # Long before it would have ended.
        assert serving.eventually(lambda: server.plane.gauges()["running"] == 0, expected / 4)


def test_rapid_resets_cost_others_nothing(
    server: AttentionServer, stub: pb_grpc.AttentionServiceStub
) -> None:
    over = threading.Event()
    told: list[int] = []

    def reset_all() -> None:
        request = http2.message(1, serving.attend_request(32).SerializeToString())
        while not over.is_set():
            with http2.Http2Connection(server.port) as rude:
                try:
                    for stream in range(1, 4001, 2):
                        body = request[:5] + stream.to_bytes(4, "big") + request[9:]
                        rude.send(http2.headers(stream, serving.ATTEND), body, http2.reset(stream))
                except OSError:
                    pass
                goodbyes = (frame for frame in rude.frames() if frame.kind == http2.GOAWAY)
                told.extend(int.from_bytes(frame.payload[4:8], "big") for frame in goodbyes)

    with ThreadPoolExecutor(1) as pool:
        resetting = pool.submit(reset_all)
        try:
            calls = 0
            while calls < 100 or not (told or resetting.done()):
                assert stub.Attend(serving.attend_request(), timeout=10).model == "causal"
                calls += 1
        finally:
            over.set()
        resetting.result(30)
    assert http2.ENHANCE_YOUR_CALM in told


def test_announced_bytes_that_do_not_come_are_nobodys(repository: Path) -> None:
    limits = Limits(
        max_stored_bytes=64 * MIB, max_bytes_in_flight=64 * MIB, max_request_bytes=64 * MIB
    )
    until = threading.Event()

    def put() -> Iterator[pb.PutTensorRequest]:
        tensor = pb.Tensor(dtype=pb.FP32, shape=[16 << 20])
        tensor.chunked.byte_size = 64 * MIB
        yield pb.PutTensorRequest(header=pb.PutTensorHeader(tensor=tensor))
        until.wait(30)

    def attend() -> Iterator[pb.AttendStreamRequest]:
        for request_id in range(1, 9):
            request = serving.announced(4096, 40)  # 60 MiB
            yield pb.AttendStreamRequest(request_id=request_id, request=request)
        until.wait(30)

    with serving.serving(repository, limits=limits) as server:
        address = f"127.0.0.1:{server.port}"
        with grpc.insecure_channel(address) as channel, AttentionClient(address) as client:
            stub = pb_grpc.AttentionServiceStub(channel)
            calls = [stub.PutTensor.future(put()), stub.AttendStream(attend())]
            assert serving.eventually(lambda: server.plane.gauges()["arriving"] == 8)
            client.put_tensor(np.zeros(1 << 20, np.float32))
            assert stub.Attend(serving.attend_request(4096), timeout=10).model == "causal"
            until.set()
            for call in calls:
                call.cancel()


class Upload:
    """A PutTensor, sent message by message until it is told to stop, and then no more."""

    def __init__(self, stub: pb_grpc.AttentionServiceStub, size: int) -> None:
        self._messages: SimpleQueue[pb.PutTensorRequest | None] = SimpleQueue()
        tensor = pb.Tensor(dtype=pb.FP32, shape=[size // 4])
        tensor.chunked.byte_size = size
        self._messages.put(pb.PutTensorRequest(header=pb.PutTensorHeader(tensor=tensor)))
        self._sent = 0
        self.call = stub.PutTensor.future(iter(self._messages.get, None))

    def send(self, size: int) -> None:
        """Go on with so many bytes."""
        end = self._sent + size
        while self._sent < end:
            data = bytes(min(MIB, end - self._sent))
            chunk = pb.TensorChunk(offset=self._sent, data=data)
            self._messages.put(pb.PutTensorRequest(chunk=chunk))
            self._sent += len(data)

    def end(self) -> None:
        """Say no more."""
        self._messages.put(None)


def told(call: grpc.Future) -> tuple[grpc.StatusCode, str]:
    """How a call ended that the server was to end."""
    with pytest.raises(grpc.RpcError) as refused:
        call.result(30)
    return refused.value.code(), refused.value.details()


def test_an_upload_that_stops_is_given_up_and_its_room_is_free(repository: Path) -> None:
    limits = Limits(max_stored_bytes=8 * MIB)
    with (
        serving.serving(repository, limits=limits, upload_grace=0.5) as server,
        grpc.insecure_channel(server.address) as channel,
        AttentionClient(server.address) as client,
    ):
        kept = lambda: server.plane.gauges()["stored_bytes"]  # noqa: E731
        stalled = Upload(pb_grpc.AttentionServiceStub(channel), 8 * MIB)
        stalled.send(7 * MIB)
        assert serving.eventually(lambda: kept() == 7 * MIB)
        code, details = told(stalled.call)
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert details.startswith("stream: given less than 16384.0 bytes a second")
        assert serving.eventually(lambda: kept() == 0)
        client.put_tensor(np.zeros(2 * MIB, np.float32))
        stalled.end()


def test_an_upload_that_goes_on_slowly_enough_is_served(repository: Path) -> None:
    with (
        serving.serving(repository, upload_grace=1) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        slow = Upload(pb_grpc.AttentionServiceStub(channel), 6 << 16)
        for _ in range(6):
            slow.send(1 << 16)  # at four seconds' worth, twice a second
            time.sleep(0.5)
        slow.end()
        assert slow.call.result(10).byte_size == 6 << 16


def test_chunks_that_stop_fail_their_request_alone(repository: Path) -> None:
    with (
        serving.serving(repository, upload_grace=0.5) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        lent = lambda: server.plane.gauges()["bytes_in_flight"]  # noqa: E731
        messages: SimpleQueue[pb.AttendStreamRequest | None] = SimpleQueue()
        stub = pb_grpc.AttentionServiceStub(channel)
        answers = stub.AttendStream(iter(messages.get, None), timeout=60)
        request = serving.announced(4096)  # half a MiB each of query, key and value
        messages.put(pb.AttendStreamRequest(request_id=1, request=request))
        chunk = pb.TensorChunk(tensor=4, data=bytes(400_000))
        messages.put(pb.AttendStreamRequest(request_id=1, chunk=chunk))
        late = next(answers)
        assert (late.request_id, late.error.code) == (1, grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
        assert late.error.message.startswith("chunks: given less than 16384.0 bytes a second")
        assert serving.eventually(lambda: lent() == 0)
        assert server.plane.gauges()["arriving"] == 0
        # What comes of it after all is thrown away; the stream goes on.
        chunk.offset = 400_000
        messages.put(pb.AttendStreamRequest(request_id=1, chunk=chunk))
        messages.put(pb.AttendStreamRequest(request_id=2, request=serving.attend_request()))
        assert next(answers).response.model == "causal"
        messages.put(None)
        assert list(answers) == []


def test_a_deadline_passes_while_chunks_are_missing(
    server: AttentionServer, stub: pb_grpc.AttentionServiceStub
) -> None:
    messages: SimpleQueue[pb.AttendStreamRequest | None] = SimpleQueue()
    answers = stub.AttendStream(iter(messages.get, None), timeout=60)
    request = serving.announced(32)
    messages.put(pb.AttendStreamRequest(request_id=1, request=request, timeout=200_000))
    late = next(answers)
    assert (late.request_id, late.error.code) == (1, grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    assert late.error.message == "the deadline passed before all chunks had come"
    messages.put(None)
    assert list(answers) == []


def test_one_callers_uploads_leave_room_for_anothers(repository: Path) -> None:
    limits = Limits(max_stored_bytes=8 * MIB)
    with (
        serving.serving(repository, limits=limits, host="::", insecure=True) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        AttentionClient(f"[::1]:{server.port}") as other,
    ):
        kept = lambda: server.plane.gauges()["stored_bytes"]  # noqa: E731
        stub = pb_grpc.AttentionServiceStub(channel)
        uploads = [Upload(stub, 4 * MIB) for _ in range(3)]
        for upload in uploads[:2]:
            upload.send(2 * MIB)
        assert serving.eventually(lambda: kept() == 4 * MIB)
        uploads[2].send(MIB)
        code, details = told(uploads[2].call)
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "half of --max-stored-mib" in details
        assert float(dict(uploads[2].call.trailing_metadata())["retry-after"]) > 0
        other.put_tensor(np.zeros(MIB, np.float32))
        for upload in uploads:
            upload.call.cancel()
            upload.end()


def test_one_callers_streams_leave_room_for_anothers(repository: Path) -> None:
    limits = Limits(max_bytes_in_flight=8 * MIB, max_request_bytes=8 * MIB)
    with (
        serving.serving(repository, limits=limits, host="::", insecure=True) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        AttentionClient(f"[::1]:{server.port}") as other,
    ):
        messages: SimpleQueue[pb.AttendStreamRequest | None] = SimpleQueue()
        stub = pb_grpc.AttentionServiceStub(channel)
        answers = stub.AttendStream(iter(messages.get, None), timeout=60)
        request = serving.announced(4096, 4)  # 2 MiB each of query, key and value
        for request_id in (1, 2, 3):
            messages.put(pb.AttendStreamRequest(request_id=request_id, request=request))
        for offset in range(0, 2 * MIB, MIB // 2):
            for request_id in (1, 2, 3):
                chunk = pb.TensorChunk(tensor=5, offset=offset, data=bytes(MIB // 2))
                messages.put(pb.AttendStreamRequest(request_id=request_id, chunk=chunk))
        refused = next(answers)
        assert refused.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert "half of --max-in-flight-mib" in refused.error.message
        assert refused.error.retry_after > 0
        assert serving.eventually(lambda: server.plane.gauges()["arriving"] == 2)
        tensor = np.ones((1, serving.HEADS, 4096, serving.DIM), np.float32)
        assert other.attend(tensor, tensor, tensor, model="causal").output is not None
        answers.cancel()
        messages.put(None)


def test_one_large_upload_gives_way_to_another_caller(repository: Path) -> None:
    limits = Limits(max_stored_bytes=8 * MIB)
    with (
        serving.serving(repository, limits=limits, host="::", insecure=True) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        AttentionClient(f"[::1]:{server.port}") as other,
    ):
        kept = lambda: server.plane.gauges()["stored_bytes"]  # noqa: E731
        large = Upload(pb_grpc.AttentionServiceStub(channel), 8 * MIB)
        large.send(6 * MIB)
        assert serving.eventually(lambda: kept() == 6 * MIB)
        tensor = np.zeros(MIB, np.float32)
        with pytest.raises(ResourceExhaustedError, match="max-stored-mib"):
            other.put_tensor(tensor)
        large.send(1)
        assert told(large.call)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        other.put_tensor(tensor)
        large.end()


def test_a_full_store_says_when_to_come_again(repository: Path) -> None:
    limits = Limits(max_stored_bytes=MIB)
    with (
        serving.serving(repository, limits=limits) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        tensor = pb.Tensor(dtype=pb.FP32, shape=[3 << 16], data=bytes(768 << 10))
        header = pb.PutTensorRequest(header=pb.PutTensorHeader(tensor=tensor))
        stub = pb_grpc.AttentionServiceStub(channel)
        stored = stub.PutTensor(iter([header]), timeout=10)
        with pytest.raises(grpc.RpcError) as refused:
            stub.PutTensor(iter([header]), timeout=10)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert float(dict(refused.value.trailing_metadata())["retry-after"]) > 0
        stub.DropTensor(pb.DropTensorRequest(handle=stored.handle))
        stub.PutTensor(iter([header]), timeout=10)
