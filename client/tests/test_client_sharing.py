"""Memory shared with a server that forgets it, and on a host that has no room for it.

Run as a script, it is what `test_memory_that_the_system_does_not_have_is_an_error` runs where
/dev/shm is small.
"""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory

import grpc
import numpy as np
import pytest
from attnserve_client import AttentionClient, NotFoundError, _arena
from attnserve_client._arena import Arena
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc

SMALL_MIB = 16


class Service(pb_grpc.AttentionServiceServicer):
    """Answers `value` of shared tensors as the output, and writes ones where the answer goes."""

    def __init__(self) -> None:
        self.regions: dict[str, SharedMemory] = {}
        self.registered = self.calls = 0
        self.forgets_all = False
        self._lock = threading.Lock()

    def RegisterSharedMemory(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        with self._lock:
            self.registered += 1
            name = f"region-{self.registered}"
            if not self.forgets_all:
                self.regions[name] = SharedMemory(request.key)
        return pb.RegisterSharedMemoryResponse(name=name)

    def UnregisterSharedMemory(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        self.regions.pop(request.name, None)
        return pb.UnregisterSharedMemoryResponse()

    def Attend(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        self.calls += 1
        place = request.output_region
        region = self.regions.get(place.name)
        if region is None:
            context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"shared_memory region: given {place.name!r}; allowed: a registered one",
            )
        assert region is not None
        answered = np.frombuffer(region.buf, np.uint8, place.byte_size, place.offset)
        answered[...] = 1
        value = request.value.shared_memory
        size = value.byte_size
        answered[:size] = np.frombuffer(region.buf, np.uint8, size, value.offset)
        answer = pb.AttendResponse(model=request.model)
        answer.output.CopyFrom(request.value)
        answer.output.shared_memory.offset = place.offset
        return answer


@contextmanager
def served() -> Iterator[tuple[str, Service]]:
    service = Service()
    server = grpc.server(ThreadPoolExecutor(16))
    pb_grpc.add_AttentionServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", service
    server.stop(0).wait()


def tensors(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(length)
    query, key, value = generator.standard_normal((3, 1, 2, length, 32)).astype(np.float32)
    return query, key, value


def test_a_region_that_the_server_forgot_is_registered_again_once() -> None:
    query, key, value = tensors(64)
    with served() as (address, service), AttentionClient(address, shared_memory=True) as client:
        kept = client.shared(value)
        for forgotten in range(3):
            result = client.attend(query, key, kept, model="m")
            np.testing.assert_array_equal(result.output, value)
            assert service.registered == 1 + forgotten
            service.regions.clear()
        assert service.calls == 3 + 2


def test_many_callers_register_a_forgotten_region_once() -> None:
    with (
        served() as (address, service),
        AttentionClient(address, shared_memory=True) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        for forgotten in range(5):

            def call(length: int) -> None:
                query, key, value = tensors(length)
                result = client.attend(query, key, value, model="m")
                np.testing.assert_array_equal(result.output, value)

            list(pool.map(call, range(40, 80)))
            assert service.registered == 1 + forgotten
            service.regions.clear()


def test_a_server_that_forgets_every_time_is_an_error() -> None:
    with served() as (address, service), AttentionClient(address, shared_memory=True) as client:
        service.forgets_all = True
        with pytest.raises(NotFoundError, match="shared_memory region"):
            client.attend(*tensors(64), model="m")
        assert service.registered == 2


def test_pages_are_claimed_before_arrays_are_made_and_no_more_than_a_step_ahead() -> None:
    arena = Arena(64 << 20)
    name = _arena._FOLDER / arena.key

    def claimed() -> int:
        return name.stat().st_blocks * 512

    assert (name.stat().st_size, claimed()) == (64 << 20, 0)
    held = []
    for total in (1 << 20, 2 << 20, 40 << 20):
        held.append(arena.empty((total // 2,), np.dtype(np.uint8)))
        needed = sum(array.nbytes for array in held)
        assert needed <= claimed() <= needed + _arena._STEP_BYTES
    before = claimed()
    held.clear()
    arena.empty((20 << 20,), np.dtype(np.uint8))
    assert claimed() == before  # what was claimed is used again
    arena.close()


def test_memory_that_the_system_does_not_have_is_an_error() -> None:
    """In a mount namespace of its own, whose /dev/shm is as small as Docker's is by default."""
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size={SMALL_MIB}m tmpfs /dev/shm"
    command = [unshare or "unshare", "--mount", "--map-root-user", "sh", "-c"]
    if unshare is None or subprocess.run([*command, mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        [*command, f'{mount} && exec "$0" "$1"', sys.executable, __file__],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


def main() -> None:
    """More than there is, then what there is, with one server and one client."""
    with served() as (address, _), AttentionClient(address, shared_memory=True) as client:
        query, key, value = tensors(1500)  # 2 heads x 1500 x 1500 weights: 18 MB
        for _ in range(3):
            with pytest.raises(MemoryError) as caught:
                client.attend(query, key, value, model="m", return_weights=True)
            said = str(caught.value)
            for wanted in ("18384000 bytes asked", f"of {SMALL_MIB << 20} in /dev/shm", "shm-size"):
                assert wanted in said, said
        for _ in range(3):
            result = client.attend(query, key, value, model="m")
            np.testing.assert_array_equal(result.output, value)
        # A little less than a step is left: it is used, too.
        held = []

        def fill() -> None:
            while True:
                held.append(client.shared(np.ones(64 << 10, np.float32)))

        with pytest.raises(MemoryError, match=r"\d+ free of"):
            fill()
        assert sum(array.nbytes for array in held) > (SMALL_MIB - 3) << 20
        assert all((array == 1).all() for array in held)


if __name__ == "__main__":
    main()
