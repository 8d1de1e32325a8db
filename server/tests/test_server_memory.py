"""However a request is put, it takes bounded time and memory, and gives it back."""

import contextlib
import os
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import http2
import numpy as np
import pytest
import serving
from attnserve_client import AttentionClient
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.settings import MIB, Limits
from tritonclient.grpc import service_pb2 as oip

FOLDER = Path("/dev/shm")

# Sanitizers keep what is freed for a while, and have addresses of their own.
measured = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer changes what memory is used"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_causal(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def process(small: Path) -> Iterator[serving.ServerProcess]:
    """A server whose memory can be looked at, and whose death would be no other test's."""
    with serving.process(small, "--max-in-flight-mib", "16") as running:
        yield running


@pytest.fixture
def channel(process: serving.ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(process.address) as opened:
        yield opened
        stub = pb_grpc.AttentionServiceStub(opened)
        assert stub.Attend(serving.attend_request(), timeout=10).model == "causal"


@measured
def test_what_is_inflated_counts_while_it_is_inflated(
    process: serving.ServerProcess, channel: grpc.Channel
) -> None:
    stub = pb_grpc.AttentionServiceStub(channel)
    stub.Attend(serving.attend_request(), timeout=10)
    process.forget_peak()
    before = process.resident_bytes
    bomb = oip.ModelInferRequest(model_name="causal", raw_input_contents=[bytes(48 * MIB)])
    content = bomb.SerializeToString()
    infer = serving.raw_call(channel, serving.MODEL_INFER)

    def send(_: int) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as refused:
            infer(content, timeout=60, compression=grpc.Compression.Gzip)
        return refused.value.code()

    with ThreadPoolExecutor(4) as pool:
        bombs = [pool.submit(send, number) for number in range(8)]
        while not all(bomb.done() for bomb in bombs):
            assert stub.Attend(serving.attend_request(), timeout=10).model == "causal"
    assert {bomb.result() for bomb in bombs} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert process.peak_bytes - before < 48 * MIB  # less than a single one of them
    # All that they took is free again: a request of nearly as much as may be in flight.
    assert stub.Attend(serving.attend_request(4096, 7), timeout=30).model == "causal"


@measured
@pytest.mark.parametrize(
    ("path", "field"),
    [
        (serving.ATTEND, b"\xa8\x06\x01"),  # field 101: unknown
        (serving.ATTEND, b"\x7a\x00"),  # padding: known, and to be ignored
        (serving.MODEL_INFER, b"\xa8\x06\x01"),
        (serving.MODEL_INFER, b"\x3a\x00"),  # an empty raw_input_contents
        (serving.MODEL_INFER, b"\x2a\x00"),  # an empty input
    ],
)
def test_millions_of_tiny_fields_are_refused_quickly(small: Path, path: str, field: bytes) -> None:
    model = b"\x0a\x06causal"  # of both: field 1
    content = model + field * (24 * MIB // len(field))
    with serving.process(small) as process, grpc.insecure_channel(process.address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        stub.Attend(serving.attend_request(), timeout=10)
        process.forget_peak()
        before = process.resident_bytes
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as refused:
            serving.raw_call(channel, path)(content, timeout=30)
        assert time.monotonic() - started < 1
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert process.peak_bytes - before < 5 * len(content)


def test_unread_answers_are_within_the_bound_and_go_with_their_streams(small: Path) -> None:
    limits = Limits(max_bytes_in_flight=32 * MIB)
    with serving.serving(small, limits=limits) as server:
        lent = lambda: server.plane.gauges()["bytes_in_flight"]  # noqa: E731
        keys = np.ones((1, serving.HEADS, 4096, serving.DIM), np.float32)
        with (
            grpc.insecure_channel(server.address) as channel,
            AttentionClient(server.address) as client,
        ):
            stub = pb_grpc.AttentionServiceStub(channel)
            stored = pb.Tensor(stored=client.put_tensor(keys).handle)
            request = serving.attend_request(32, returns=pb.ReturnOptions(weights=True))
            request.key.CopyFrom(stored)
            request.value.CopyFrom(stored)  # 4 KiB of request, 2 MiB of answer
            message = pb.AttendStreamRequest(request=request)
            with http2.Http2Connection(server.port) as deaf:  # it opens no window
                for stream in range(1, 33, 2):
                    deaf.send(http2.headers(stream, serving.ATTEND_STREAM))
                    for request_id in range(1, 9):
                        message.request_id = request_id
                        content = message.SerializeToString()
                        deaf.send(http2.message(stream, content, end=False))
                assert serving.eventually(lambda: lent() > 16 * MIB)
                for _ in range(20):
                    assert lent() <= 32 * MIB
                    assert stub.ListModels(pb.ListModelsRequest(), timeout=10).models
            assert serving.eventually(lambda: lent() == 0)
            assert stub.Attend(serving.attend_request(), timeout=10).model == "causal"


@measured
def test_without_memory_a_request_fails_and_the_server_lives(small: Path) -> None:
    with serving.process(small) as process, grpc.insecure_channel(process.address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        assert stub.Attend(serving.attend_request(), timeout=10).model == "causal"
        most = process.virtual_bytes + 64 * MIB
        resource.prlimit(process.popen.pid, resource.RLIMIT_AS, (most, most))
        large = serving.attend_request(4096, 60).SerializeToString()  # 90 MiB
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as refused:
                serving.raw_call(channel, serving.ATTEND)(large, timeout=30)
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert stub.Attend(serving.attend_request(), timeout=10).model == "causal"
        assert process.popen.poll() is None


def shared_bytes(metrics_port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    name = "attnserve_shared_memory_bytes "
    return float(next(line for line in lines if line.startswith(name)).removeprefix(name))


def test_shared_memory_of_a_client_that_died_is_given_back(small: Path) -> None:
    code = (
        "import sys, time, numpy as np\n"
        "from attnserve_client import AttentionClient\n"
        "client = AttentionClient(sys.argv[1], shared_memory=True, shared_memory_bytes=8 << 20)\n"
        "client.attend(*[np.ones((1, 4, 8, 8), np.float32)] * 3, model='causal')\n"
        "print('attended', flush=True)\n"
        "time.sleep(60)\n"
    )
    with serving.serving(small, metrics_port=0) as server:
        mapped = lambda: server.plane.gauges()["shared_bytes"]  # noqa: E731
        for _ in range(2):
            client = subprocess.Popen(
                [sys.executable, "-c", code, server.address], stdout=subprocess.PIPE, text=True
            )
            assert client.stdout is not None
            assert client.stdout.readline() == "attended\n"
            assert server.metrics_port is not None
            assert mapped() == shared_bytes(server.metrics_port) >= 8 << 20
            client.send_signal(signal.SIGKILL)
            client.wait()
            assert serving.eventually(lambda: mapped() == 0)


@pytest.fixture
def key() -> Iterator[str]:
    name = f"attnserve-test-{secrets.token_hex(8)}"
    yield name
    (FOLDER / name).unlink(missing_ok=True)


def test_an_object_that_shrinks_while_it_is_used_costs_its_request_alone(
    process: serving.ServerProcess, channel: grpc.Channel, key: str
) -> None:
    stub = pb_grpc.AttentionServiceStub(channel)
    shape = [1, serving.HEADS, 2048, serving.DIM]
    size = int(np.prod(shape)) * 4
    outcomes = set()
    for attempt in range(12):
        (FOLDER / key).write_bytes(bytes(4 * size))
        name = stub.RegisterSharedMemory(
            pb.RegisterSharedMemoryRequest(key=f"/{key}", byte_size=4 * size)
        ).name
        request = pb.AttendRequest(model="causal")
        for place, tensor in enumerate((request.query, request.key, request.value)):
            where = pb.SharedMemoryRegion(name=name, offset=place * size, byte_size=size)
            tensor.CopyFrom(pb.Tensor(dtype=pb.FP32, shape=shape, shared_memory=where))
        request.output_region.CopyFrom(
            pb.SharedMemoryRegion(name=name, offset=3 * size, byte_size=size)
        )
        if attempt == 0:
            os.truncate(FOLDER / key, 0)
        call = stub.Attend.future(request, timeout=20)
        threading.Event().wait(attempt * 0.003)
        os.truncate(FOLDER / key, 0)
        outcomes.add(call.code())
        with contextlib.suppress(grpc.RpcError):
            stub.UnregisterSharedMemory(pb.UnregisterSharedMemoryRequest(name=name))
    assert process.popen.poll() is None
    assert grpc.StatusCode.INVALID_ARGUMENT in outcomes
    assert outcomes <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
