"""Heads of a streamed request are computed while the others are still arriving."""

import itertools
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import grpc
import numpy as np
import pytest
import serving
from attnserve_client import AttentionClient
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Limits, Settings
from handmade import attention, write_core
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.needs_library

# As short as a request may be and still be computed in parts.
HEADS, DIM, LENGTH = 4, 64, 700
FIELD = {"query": 4, "key": 5, "value": 6}
SIZE = HEADS * DIM * LENGTH * 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttentionServer]:
    folder = tmp_path_factory.mktemp("early")
    write_core(folder, "causal", attention(HEADS, DIM, mask="causal"))
    running = AttentionServer(Settings(folder, port=0, metrics_port=None, provider="cpu"))
    running.start()
    yield running
    running.drain()


@pytest.fixture(scope="module")
def client(server: AttentionServer) -> Iterator[AttentionClient]:
    with AttentionClient(f"127.0.0.1:{server.port}") as opened:
        yield opened


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {n: generator.standard_normal((1, HEADS, LENGTH, DIM), np.float32) for n in FIELD}


@pytest.fixture(scope="module")
def expected(client: AttentionClient, arrays: dict[str, np.ndarray]) -> bytes:
    output = client.attend(**arrays, model="causal").output
    assert output is not None
    return output.tobytes()


@pytest.fixture(scope="module")
def stub(server: AttentionServer) -> Iterator[pb_grpc.AttentionServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield pb_grpc.AttentionServiceStub(channel)


def announced(arrays: dict[str, np.ndarray], request_id: int = 1) -> pb.AttendStreamRequest:
    request = pb.AttendRequest(model="causal")
    for name, array in arrays.items():
        tensor = pb.Tensor(dtype=pb.FP32, shape=array.shape)
        tensor.chunked.byte_size = array.nbytes
        getattr(request, name).CopyFrom(tensor)
    return pb.AttendStreamRequest(request_id=request_id, request=request)


def chunk(
    arrays: dict[str, np.ndarray], name: str, start: int, end: int, request_id: int = 1
) -> pb.AttendStreamRequest:
    data = arrays[name].tobytes()[start:end]
    piece = pb.TensorChunk(tensor=FIELD[name], offset=start, data=data)
    return pb.AttendStreamRequest(request_id=request_id, chunk=piece)


def by_heads(
    arrays: dict[str, np.ndarray], together: int = 1, request_id: int = 1
) -> Iterator[pb.AttendStreamRequest]:
    step = together * SIZE // HEADS
    for start in range(0, SIZE, step):
        for name in FIELD:
            yield chunk(arrays, name, start, min(SIZE, start + step), request_id)


def outputs(answers: Iterator[pb.AttendStreamResponse]) -> dict[int, bytes | pb.Error]:
    """What each request was answered with."""
    found: dict[int, bytes | pb.Error] = {}
    for answer in answers:
        if answer.HasField("error"):
            assert answer.request_id not in found
            found[answer.request_id] = answer.error
        elif answer.HasField("response"):
            assert answer.request_id not in found
            found[answer.request_id] = answer.response.output.data
        else:
            so_far = found[answer.request_id]
            assert isinstance(so_far, bytes)
            assert answer.chunk.offset == len(so_far)
            found[answer.request_id] = so_far + answer.chunk.data
    return found


def settled(server: AttentionServer) -> None:
    """No memory is lent any more, and nothing waits."""
    deadline = time.monotonic() + 10
    gauges = server.plane.gauges
    while gauges()["bytes_in_flight"] or gauges()["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_whole_heads_are_computed_as_they_come(
    stub: pb_grpc.AttentionServiceStub,
    server: AttentionServer,
    arrays: dict[str, np.ndarray],
    expected: bytes,
    together: int,
) -> None:
    messages = [announced(arrays), *by_heads(arrays, together)]
    assert outputs(stub.AttendStream(iter(messages))) == {1: expected}
    settled(server)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cuts=st.tuples(*[st.lists(st.integers(1, SIZE - 1), max_size=6, unique=True)] * 3),
    whole_heads=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_however_the_chunks_are_cut_and_ordered_the_answer_is_the_same(
    stub: pb_grpc.AttentionServiceStub,
    arrays: dict[str, np.ndarray],
    expected: bytes,
    cuts: tuple[list[int], ...],
    whole_heads: bool,
    order: "st.Random",  # type: ignore[name-defined]
) -> None:
    queues = []
    for name, at in zip(FIELD, cuts, strict=True):
        if whole_heads:
            at = sorted({cut * HEADS // SIZE * SIZE // HEADS for cut in at} - {0})
        edges = [0, *sorted(at), SIZE]
        queues.append([chunk(arrays, name, *edge) for edge in itertools.pairwise(edges)])
    messages = [announced(arrays)]
    while any(queues):
        messages.append(order.choice([queue for queue in queues if queue]).pop(0))
    assert outputs(stub.AttendStream(iter(messages))) == {1: expected}


def test_requests_on_one_stream_do_not_mix(
    stub: pb_grpc.AttentionServiceStub, arrays: dict[str, np.ndarray], expected: bytes
) -> None:
    first, second = (list(by_heads(arrays, 1, request_id)) for request_id in (1, 2))
    mixed = itertools.chain.from_iterable(zip(first, second, strict=True))
    messages = [announced(arrays, 1), announced(arrays, 2), *mixed]
    assert outputs(stub.AttendStream(iter(messages))) == {1: expected, 2: expected}


def test_a_stream_full_of_requests_that_have_begun_is_read_on(
    tmp_path: Path, arrays: dict[str, np.ndarray], expected: bytes
) -> None:
    write_core(tmp_path, "causal", attention(HEADS, DIM, mask="causal"))
    ids = range(1, 5)
    each = [list(by_heads(arrays, 1, request_id)) for request_id in ids]
    mixed = itertools.chain.from_iterable(zip(*each, strict=True))
    messages = [*(announced(arrays, request_id) for request_id in ids), *mixed]
    with (
        serving.serving(tmp_path, limits=Limits(max_stream_requests=len(ids))) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = pb_grpc.AttentionServiceStub(channel)
        found = outputs(stub.AttendStream(iter(messages), timeout=60))
        assert found == dict.fromkeys(ids, expected)
        settled(server)


def test_an_announcement_takes_no_room_for_its_answer(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    write_core(tmp_path, "causal", attention(HEADS, DIM, mask="causal"))
    over = threading.Event()

    def messages() -> Iterator[pb.AttendStreamRequest]:
        yield from (announced(arrays, request_id) for request_id in range(1, 9))
        over.wait(60)

    with (
        serving.serving(tmp_path, limits=Limits(max_bytes_in_flight=6 * SIZE)) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        AttentionClient(f"127.0.0.1:{server.port}") as other,
    ):
        call = pb_grpc.AttentionServiceStub(channel).AttendStream(messages())
        try:
            assert serving.eventually(lambda: server.plane.gauges()["arriving"] == 8)
            assert server.plane.gauges()["bytes_in_flight"] < SIZE
            assert other.attend(**arrays, model="causal").output is not None
        finally:
            over.set()
            call.cancel()


def test_a_wrong_chunk_after_the_first_heads_fails_that_request_alone(
    stub: pb_grpc.AttentionServiceStub,
    server: AttentionServer,
    arrays: dict[str, np.ndarray],
    expected: bytes,
) -> None:
    good = list(by_heads(arrays))
    wrong = chunk(arrays, "query", 0, 128)  # sent already
    rest = good[6:]
    messages = [announced(arrays), *good[:6], wrong]
    messages += [announced(arrays, 2), *by_heads(arrays, 2, request_id=2), *rest[:1]]
    found = outputs(stub.AttendStream(iter(messages)))
    assert found[2] == expected
    assert isinstance(found[1], pb.Error)
    assert "chunk.offset of query" in found[1].message
    settled(server)


def test_a_stream_that_ends_after_the_first_heads_leaves_nothing_behind(
    stub: pb_grpc.AttentionServiceStub, server: AttentionServer, arrays: dict[str, np.ndarray]
) -> None:
    messages = [announced(arrays), *itertools.islice(by_heads(arrays), 7)]
    with pytest.raises(grpc.RpcError, match="its end, with chunks of request 1 missing"):
        outputs(stub.AttendStream(iter(messages)))
    settled(server)


def test_a_stream_cancelled_after_the_first_heads_leaves_nothing_behind(
    stub: pb_grpc.AttentionServiceStub, server: AttentionServer, arrays: dict[str, np.ndarray]
) -> None:
    def messages() -> Iterator[pb.AttendStreamRequest]:
        yield announced(arrays)
        yield from itertools.islice(by_heads(arrays), 7)
        time.sleep(0.2)
        call.cancel()

    call = stub.AttendStream(messages())
    with pytest.raises(grpc.RpcError):
        outputs(call)
    settled(server)


def test_timings_count_one_request(
    stub: pb_grpc.AttentionServiceStub, server: AttentionServer, arrays: dict[str, np.ndarray]
) -> None:
    def counted() -> float:
        labels = {"model": "causal", "variant": "native"}
        return server.metrics.registry.get_sample_value("attnserve_sequences_total", labels) or 0

    before = counted()
    first, *_ = stub.AttendStream(iter([announced(arrays), *by_heads(arrays)]))
    assert first.response.timings.batch_size == 1
    assert first.response.timings.compute > 0
    assert counted() == before + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"returns": {"entropy": True}},
        {"scale": 0.7},
        {"variant": "reference"},
        {"bias": {"dtype": "FP32", "shape": [1, 1, 1, 1], "data": bytes(4)}},
    ],
)
def test_what_cannot_be_divided_is_computed_as_a_whole(
    stub: pb_grpc.AttentionServiceStub,
    arrays: dict[str, np.ndarray],
    changes: dict,
) -> None:
    first = announced(arrays)
    first.request.MergeFrom(pb.AttendRequest(**changes))
    found = outputs(stub.AttendStream(iter([first, *by_heads(arrays)])))
    assert isinstance(found[1], bytes)


def test_lengths_that_vanished_from_shared_memory_are_said(
    stub: pb_grpc.AttentionServiceStub,
    server: AttentionServer,
    arrays: dict[str, np.ndarray],
) -> None:
    settled(server)
    memory = SharedMemory(create=True, size=4096)
    try:
        np.ndarray(1, np.int64, memory.buf)[0] = LENGTH
        register = pb.RegisterSharedMemoryRequest(key=memory.name, byte_size=4096)
        region = stub.RegisterSharedMemory(register).name
        first = announced(arrays)
        first.request.key_lengths.CopyFrom(pb.Tensor(dtype=pb.INT64, shape=[1]))
        first.request.key_lengths.shared_memory.CopyFrom(
            pb.SharedMemoryRegion(name=region, byte_size=8)
        )

        def messages() -> Iterator[pb.AttendStreamRequest]:
            yield first
            assert serving.eventually(lambda: server.plane.gauges()["arriving"] == 1)
            os.truncate(f"/dev/shm/{memory.name}", 0)
            yield from by_heads(arrays)

        found = outputs(stub.AttendStream(messages()))
    finally:
        memory.close()
        memory.unlink()
    assert isinstance(found[1], pb.Error)
    assert "was truncated after it was registered" in found[1].message
