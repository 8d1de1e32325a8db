"""Servers to test over one small core model: in this process, or as one of their own."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Settings
from handmade import attention, write_core

HEADS, DIM = 4, 8

ATTEND = "/attnserve.v1.AttentionService/Attend"
ATTEND_STREAM = "/attnserve.v1.AttentionService/AttendStream"
ATTEND_TOKENS = "/attnserve.v1.AttentionService/AttendTokens"
PUT_TENSOR = "/attnserve.v1.AttentionService/PutTensor"
LIST_MODELS = "/attnserve.v1.AttentionService/ListModels"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
MODEL_STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def write_causal(folder: Path) -> Path:
    """A repository with the model `causal`."""
    write_core(folder, "causal", attention(HEADS, DIM, mask="causal"))
    return folder


@contextlib.contextmanager
def serving(repository: Path, **options: Any) -> Iterator[AttentionServer]:
    """A server in this process; options are those of Settings."""
    defaults: dict[str, Any] = {"port": 0, "metrics_port": None, "provider": "cpu"}
    running = AttentionServer(Settings(repository, **(defaults | {"drain_seconds": 2} | options)))
    running.start()
    try:
        yield running
    finally:
        running.drain()


@contextlib.contextmanager
def draining(server: AttentionServer) -> Iterator[None]:
    """A server has begun to drain; it has ended afterwards."""
    thread = threading.Thread(target=server.drain)
    thread.start()
    try:
        while not server.plane.draining:
            time.sleep(0.001)
        yield
    finally:
        thread.join()


@dataclass(frozen=True)
class ServerProcess:
    """A server of its own."""

    popen: subprocess.Popen[str]
    address: str

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.rpartition(":")[2])

    def forget_peak(self) -> None:
        """Let `peak_bytes` start anew."""
        Path(f"/proc/{self.popen.pid}/clear_refs").write_text("5")

    @property
    def peak_bytes(self) -> int:
        """The most memory that it had."""
        return self._status("VmHWM")

    @property
    def resident_bytes(self) -> int:
        """The memory that it has."""
        return self._status("VmRSS")

    @property
    def virtual_bytes(self) -> int:
        """The addresses that it has, of memory or not."""
        return self._status("VmSize")

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.popen.pid}/status").read_text().splitlines()
        found = next(line for line in lines if line.startswith(f"{name}:"))
        return int(found.split()[1]) << 10


@contextlib.contextmanager
def process(
    repository: Path, *options: str, port: int = 0, within: Sequence[str] = ()
) -> Iterator[ServerProcess]:
    """A server as the command line starts it; it has ended afterwards.

    Args:
        repository: the folder of models.
        options: of the command line.
        port: where it listens; 0 takes a free one.
        within: a command that becomes the server (`nice`, `setpriv`), with its arguments.
    """
    command = [
        *within,
        sys.executable,
        "-m",
        "attnserve_server.cli",
        "--repository",
        str(repository),
    ]
    command += ["--provider", "cpu", "--port", str(port), "--drain-seconds", "5"]
    if "--metrics-port" not in options:
        command += ["--metrics-port", "-1"]
    popen = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert popen.stdout is not None
        told = popen.stdout.readline()
        yield ServerProcess(popen, told.split("listening on ")[1].split()[0])
    finally:
        popen.terminate()
        try:
            popen.wait(timeout=20)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def attend_request(length: int = 8, batch: int = 1, **others: Any) -> pb.AttendRequest:
    """A request to `causal`; every element is 1."""
    shape = [batch, HEADS, length, DIM]
    tensor = pb.Tensor(dtype=pb.FP32, shape=shape, data=np.ones(shape, np.float32).tobytes())
    return pb.AttendRequest(model="causal", query=tensor, key=tensor, value=tensor, **others)


def announced(length: int, batch: int = 1) -> pb.AttendRequest:
    """A request whose tensors are to come in chunks."""
    shape = [batch, HEADS, length, DIM]
    tensor = pb.Tensor(dtype=pb.FP32, shape=shape)
    tensor.chunked.byte_size = int(np.prod(shape)) * 4
    return pb.AttendRequest(model="causal", query=tensor, key=tensor, value=tensor)


def raw_call(channel: grpc.Channel, path: str) -> grpc.UnaryUnaryMultiCallable:
    """A unary method over bytes."""
    return channel.unary_unary(path, request_serializer=None, response_deserializer=None)


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
