"""AttentionClient(shared_memory=True) against a real server on this host."""

import contextlib
import gc
import time
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest
from attnserve_client import (
    AttentionClient,
    DeadlineExceededError,
    InvalidArgumentError,
    _sharing,
)
from attnserve_client._arena import ALIGNMENT, Arena
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Settings
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture
def sharing(address: str):
    with AttentionClient(address, shared_memory=True, shared_memory_bytes=8 << 20) as opened:
        yield opened


def arrays(batch: int, query_len: int, key_len: int) -> list[np.ndarray]:
    generator = np.random.default_rng(query_len)
    shapes = [(batch, 4, query_len, 8), (batch, 4, key_len, 8), (batch, 4, key_len, 8)]
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 100), (1, 400)])
def test_shared_memory_gives_what_messages_give(
    sharing: AttentionClient, client: AttentionClient, batch: int, length: int
) -> None:
    query, key, value = arrays(batch, length, length)
    options = {
        "model": "causal",
        "key_lengths": [max(0, length - row) for row in range(batch)],
        "return_weights": True,
        "return_entropy": True,
        "top_k": 1,
        "return_mass_per_key": True,
        "mass_by_distance": 1,
    }
    sent = client.attend(query, key, value, **options)
    for q, k, v in ((query, key, value), tuple(map(sharing.shared, (query, key, value)))):
        shared = sharing.attend(q, k, v, **options)
        for name in ("output", "weights", "entropy", "top_k_indices", "top_k_weights",
                     "mass_per_key", "mass_by_distance"):  # fmt: skip
            np.testing.assert_array_equal(getattr(shared, name), getattr(sent, name))
            assert getattr(shared, name).dtype == getattr(sent, name).dtype


def test_layers_and_stored_tensors_work_beside_it(
    sharing: AttentionClient, client: AttentionClient
) -> None:
    hidden = np.random.default_rng(1).standard_normal((2, 5, 32)).astype(np.float32)
    for weights in (False, True):  # with weights it falls back to messages
        shared = sharing.attend(hidden_states=hidden, model="self", return_weights=weights)
        sent = client.attend(hidden_states=hidden, model="self", return_weights=weights)
        np.testing.assert_array_equal(shared.output, sent.output)
    query, key, value = arrays(1, 300, 300)
    stored = sharing.put_tensor(key)
    kept = sharing.attend(query, stored, value, model="causal")
    np.testing.assert_array_equal(
        kept.output, client.attend(query, key, value, model="causal").output
    )


def test_arrays_in_shared_memory_are_not_copied(sharing: AttentionClient) -> None:
    arena = sharing._sharing_now().arena
    made = sharing.shared_empty((1, 4, 64, 8))
    made[...] = 1
    offset = arena.offset_of(made)
    assert offset is not None
    call, again = (_sharing._shared(arena, made) for _ in range(2))
    assert call[0] is made
    assert call[1] == again[1] == offset
    # The second half starts at a multiple of 64, too; a row does not.
    assert arena.offset_of(made[:, 2:]) == offset + 2 * 64 * 8 * 4
    assert arena.offset_of(made[0, 0, 1]) is None


def test_results_stay_as_they_are_while_they_are_held(sharing: AttentionClient) -> None:
    results, copies = [], []
    for length in (30, 60, 20, 60, 30):
        query, key, value = arrays(1, length, length)
        output = sharing.attend(query, key, value, model="causal").output
        assert output is not None
        results.append(output)
        copies.append(output.copy())
    for result, copy in zip(results, copies, strict=True):
        np.testing.assert_array_equal(result, copy)


def test_memory_comes_back_and_running_out_is_said(sharing: AttentionClient) -> None:
    query, key, value = arrays(1, 500, 500)
    held = []

    def fill() -> None:
        for _ in range(1000):
            held.append(sharing.attend(query, key, value, model="causal").output)  # noqa: PERF401

    with pytest.raises(MemoryError, match="shared_memory_bytes"):
        fill()
    assert len(held) > 20
    held.clear()
    gc.collect()
    for _ in range(2 * 128):
        sharing.attend(query, key, value, model="causal")


def test_an_answer_that_comes_too_late_overwrites_nothing(
    address: str, server: AttentionServer
) -> None:
    with AttentionClient(address, shared_memory=True, shared_memory_bytes=32 << 20) as sharing:
        query, key, value = map(sharing.shared, arrays(8, 4096, 4096))
        small = arrays(1, 100, 100)
        before = sharing.attend(*small, model="causal").output
        with contextlib.suppress(DeadlineExceededError):
            sharing.attend(query, key, value, model="causal", timeout=0.01)
        gc.collect()
        others = [sharing.shared(np.ones(1 << 20, np.float32)) for _ in range(2)]
        deadline = time.monotonic() + 20
        while server.plane.gauges()["running"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert all((other == 1).all() for other in others)
        # What was made before can still be used.
        assert sharing._sharing_now().arena.offset_of(query) is None
        np.testing.assert_array_equal(sharing.attend(*small, model="causal").output, before)
        sharing.attend(query[:1], key[:1], value[:1], model="causal")


def test_errors_are_the_servers_own(sharing: AttentionClient) -> None:
    query, key, value = arrays(1, 300, 300)
    with pytest.raises(InvalidArgumentError, match=r"value\.shape"):
        sharing.attend(query, key, value[:, :, :200], model="causal")
    with pytest.raises(InvalidArgumentError, match=r"query\.shape.*rank 3"):
        sharing.attend(query[0], key, value, model="causal")


def test_a_server_that_was_started_anew_maps_the_memory_again(repository: Path) -> None:
    def start(port: int) -> AttentionServer:
        server = AttentionServer(
            Settings(repository, port=port, metrics_port=None, provider="cpu", drain_seconds=1)
        )
        server.start()
        return server

    first = start(0)
    with AttentionClient(f"127.0.0.1:{first.port}", shared_memory=True) as client:
        query, key, value = map(client.shared, arrays(1, 200, 200))
        before = client.attend(query, key, value, model="causal").output
        first.drain()
        second = start(first.port)
        deadline = time.monotonic() + 20
        while True:
            try:
                after = client.attend(query, key, value, model="causal").output
                break
            except ConnectionError:
                assert time.monotonic() < deadline
        np.testing.assert_array_equal(before, after)
        assert second.plane.gauges()["shared_bytes"] > 0
    second.drain()


def test_a_client_without_it_says_so(client: AttentionClient) -> None:
    with pytest.raises(RuntimeError, match="shared_memory=True"):
        client.shared_empty((3,))


def region(name: str, offset: int, size: int) -> pb.SharedMemoryRegion:
    return pb.SharedMemoryRegion(name=name, offset=offset, byte_size=size)


CASES = {
    "unknown": (region("nobody's", 0, 384), None, grpc.StatusCode.NOT_FOUND, "nobody's"),
    "unnamed": (region("", 0, 384), None, None, r"key\.shared_memory\.name"),
    "beyond": (region("NAME", 4096, 384), None, None, "4096"),
    "far beyond": (region("NAME", 1 << 63, 384), None, None, "region"),
    "unaligned": (region("NAME", 8, 384), None, None, "multiple of 64"),
    "size": (region("NAME", 0, 380), None, None, r"key\.shared_memory\.byte_size: given 380"),
    "answer too small": (
        region("NAME", 0, 384), region("NAME", 0, 383), None, "output_region.byte_size.*384"
    ),
    "answer beyond": (region("NAME", 0, 384), region("NAME", 3968, 384), None, "4096"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_regions_that_do_not_fit_are_refused(channel: grpc.Channel, case: str) -> None:
    key, output, code, match = CASES[case]
    arena = Arena(4096)
    stub = pb_grpc.AttentionServiceStub(channel)
    name = stub.RegisterSharedMemory(
        pb.RegisterSharedMemoryRequest(key=arena.key, byte_size=4096)
    ).name
    tensor = pb.Tensor(dtype=pb.FP32, shape=[1, 4, 3, 8], data=bytes(384))
    request = pb.AttendRequest(model="causal", query=tensor, value=tensor)
    request.key.CopyFrom(pb.Tensor(dtype=pb.FP32, shape=[1, 4, 3, 8], shared_memory=key))
    request.key.shared_memory.name = key.name.replace("NAME", name)
    if output is not None:
        request.output_region.CopyFrom(output)
        request.output_region.name = name
    with pytest.raises(grpc.RpcError, match=match) as caught:
        stub.Attend(request)
    assert caught.value.code() == (code or grpc.StatusCode.INVALID_ARGUMENT)
    stub.UnregisterSharedMemory(pb.UnregisterSharedMemoryRequest(name=name))
    with pytest.raises(grpc.RpcError, match="region"):
        stub.UnregisterSharedMemory(pb.UnregisterSharedMemoryRequest(name=name))
    arena.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.booleans()), max_size=60))
def test_pieces_of_an_arena_never_overlap(wishes: list[tuple[int, bool]]) -> None:
    arena = Arena(1 << 14)
    held: list[np.ndarray] = []

    def take(size: int, number: int) -> None:
        with contextlib.suppress(MemoryError):
            held.append(arena.empty((size,), np.dtype(np.uint8)))
            held[-1][...] = number % 251

    for number, (size, drop) in enumerate(wishes):
        if drop and held:
            held.pop(number % len(held))
        take(size, number)
    places = sorted((a.ctypes.data, a.ctypes.data + max(1, a.nbytes)) for a in held)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert all(start % ALIGNMENT == 0 for start, _ in places)
    assert all(np.unique(array).size <= 1 for array in held)
    held.clear()
    whole = arena.empty((1 << 14,), np.dtype(np.uint8))
    assert whole.nbytes == 1 << 14
    arena.close()
