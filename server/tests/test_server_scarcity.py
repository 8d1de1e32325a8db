"""A machine that has no more to give costs the request that needed it, and no other."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import serving
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.settings import MIB
from grpc_health.v1 import health_pb2, health_pb2_grpc
from handmade import attention, write_core
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING

# Sanitizers have threads and addresses of their own.
plain = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer needs more than there is"
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = serving.write_causal(tmp_path_factory.mktemp("scarcity"))
    write_core(folder, "other", attention(serving.HEADS, serving.DIM, mask="causal"))
    return folder


def answers(channel: grpc.Channel) -> None:
    """Health, a method of the data plane and one of the control plane."""
    check = health_pb2_grpc.HealthStub(channel).Check
    assert check(health_pb2.HealthCheckRequest(), timeout=10).status == SERVING
    stub = pb_grpc.AttentionServiceStub(channel)
    assert stub.Attend(serving.attend_request(), timeout=10).model == "causal"
    assert stub.GetModel(pb.GetModelRequest(name="causal"), timeout=10).model.name == "causal"


# ---- A full /dev/shm: Docker's default has 64 MiB, this one 8.

_MOUNTED = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"'
WITHIN_SMALL_SHM = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNTED, "sh")

# Prints what became of calls: "served", or the name of the SDK's error.
_CALLS = """
import json, sys
import numpy as np
from attnserve_client import AttentionClient, AttnserveError

def attend(length, **options):
    tensor = np.ones((1, 4, length, 8), np.float32)
    try:
        with AttentionClient(sys.argv[1], shared_memory=True, **options) as client:
            result = client.attend(tensor, tensor, tensor, model="causal", return_weights=True)
            assert result.weights.shape == (1, 4, length, length)
            np.testing.assert_allclose(result.weights[0, 0, 1, :3], [0.5, 0.5, 0])
            return "served"
    except AttnserveError as error:
        return type(error).__name__

print(json.dumps([
    attend(8), attend(1024), attend(8, shared_memory_bytes=4 << 20),
    attend(512, shared_memory_bytes=7 << 20), attend(1024, shared_memory_bytes=64 << 20),
]))
"""


@pytest.fixture
def small_shm(repository: Path) -> Iterator[serving.ServerProcess]:
    tried = subprocess.run([*WITHIN_SMALL_SHM, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"no tmpfs of its own can be mounted here: {tried.stderr.strip()}")
    with serving.process(repository, within=WITHIN_SMALL_SHM) as process:
        yield process


def test_a_full_shm_costs_the_server_nothing(small_shm: serving.ServerProcess) -> None:
    enter = ["nsenter", f"--mount=/proc/{small_shm.popen.pid}/ns/mnt"]
    command = [*enter, sys.executable, "-c", _CALLS, small_shm.address]
    calls = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert calls.returncode == 0, calls.stderr
    outcomes = json.loads(calls.stdout)
    assert set(outcomes) <= {"served", "ResourceExhaustedError"}
    assert outcomes[2] == "served"  # it fits
    with grpc.insecure_channel(small_shm.address) as channel:
        answers(channel)
        # An object with holes, larger than there is room for: its pages are claimed first.
        make = ["truncate", "--size=64M", "/dev/shm/attnserve-test"]
        subprocess.run([*enter, *make], check=True)
        stub = pb_grpc.AttentionServiceStub(channel)
        request = pb.RegisterSharedMemoryRequest(key="/attnserve-test", byte_size=64 * MIB)
        with pytest.raises(grpc.RpcError) as refused:
            stub.RegisterSharedMemory(request, timeout=30)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        answers(channel)
    assert small_shm.popen.poll() is None


# ---- No more threads


# A user of its own, since threads are counted by user; it may read what root may.
AS_ANOTHER_USER = (
    *("setpriv", "--reuid=54321", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


@contextmanager
def no_new_threads(process: serving.ServerProcess) -> Iterator[None]:
    """The system starts none for it, as under a limit of a container's processes."""
    limit = [*AS_ANOTHER_USER, "prlimit", f"--pid={process.popen.pid}"]
    before = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    subprocess.run([*limit, "--nproc=1:"], check=True)
    try:
        yield
    finally:
        subprocess.run([*limit, f"--nproc={before}:"], check=True)


@plain
def test_threads_that_cannot_be_started_fail_what_needs_them(repository: Path) -> None:
    if os.getuid() != 0 or not shutil.which("setpriv") or not shutil.which("prlimit"):
        pytest.skip("only root can start a server as a user that the limit holds for, by setpriv")
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    page = f"http://127.0.0.1:{metrics_port}/metrics"
    options = ("--metrics-port", str(metrics_port), "--intra-op-threads", "2")
    with (
        serving.process(repository, *options, within=AS_ANOTHER_USER) as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        load = oip_grpc.GRPCInferenceServiceStub(channel).RepositoryModelLoad
        loading = oip.RepositoryModelLoadRequest(model_name="other")
        answers(channel)
        for _ in range(2):
            with no_new_threads(process):
                # Each page has a thread, and each model a pool of them.
                with pytest.raises(ConnectionError):
                    urllib.request.urlopen(page, timeout=10).close()
                with pytest.raises(grpc.RpcError) as refused:
                    load(loading, timeout=30)
                assert refused.value.code() != grpc.StatusCode.DEADLINE_EXCEEDED
                answers(channel)
                # Nor does a caller that comes only now notice.
                with grpc.insecure_channel(process.address) as fresh:
                    answers(fresh)
            with urllib.request.urlopen(page, timeout=10) as shown:
                assert b"attnserve_requests" in shown.read()
            load(loading, timeout=30)
        assert process.popen.poll() is None


# ---- No more memory for Python


@plain
def test_a_message_that_python_has_no_memory_for_fails_alone(repository: Path) -> None:
    """Its bytes fit, and what they are parsed into, eight times as much, does not."""
    ids = b"\x0a" + _varint(12 * MIB) + b"\1" * (12 * MIB)
    tokens = b"\x0a" + _varint(len(ids)) + ids
    message = b"\x0a\x06causal\x2a" + _varint(len(tokens)) + tokens
    with (
        serving.process(repository) as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        attend_tokens = serving.raw_call(channel, serving.ATTEND_TOKENS)
        answers(channel)
        most = process.virtual_bytes + 64 * MIB
        before = resource.prlimit(process.popen.pid, resource.RLIMIT_AS)
        for limit, expected in (
            (most, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (before[0], grpc.StatusCode.FAILED_PRECONDITION),  # it is no model of tokens
        ):
            resource.prlimit(process.popen.pid, resource.RLIMIT_AS, (limit, before[1]))
            for _ in range(3):
                with pytest.raises(grpc.RpcError) as refused:
                    attend_tokens(message, timeout=60)
                assert refused.value.code() == expected, refused.value.details()
                answers(channel)
        assert process.popen.poll() is None


def _varint(number: int) -> bytes:
    groups = [number >> shift & 127 for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])
