"""The processes that users start, as they start them."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from attnserve_client import AsyncAttentionClient, AttentionClient, NotFoundError, UnavailableError
from attnserve_export.reference import CAUSAL, attention_reference
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def repository(
    tmp_path_factory: pytest.TempPathFactory, export_all: Callable[[list[list[str]]], None]
) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = ["--num-heads", "8", "--head-dim", "64", "--mask", "causal"]
    export_all([["core", "--out", str(folder), "--name", "causal", *sizes]])
    return folder


def start(repository: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [BIN / "attnserve-server", "--repository", repository, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--metrics-port", "0", *options], stdout=-1, stderr=-1, text=True
    )
    return process, process.stdout.readline().split("listening on ")[1].split()[0]


@pytest.fixture(scope="module")
def address(repository: Path) -> Iterator[str]:
    process, address = start(repository)
    yield address
    process.terminate()
    assert process.wait(timeout=30) == 0


def tensors(seq_len: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((1, 8, seq_len, 64)).astype(np.float32) for _ in range(3)]


def test_small_and_large_requests_agree_with_the_reference(address: str) -> None:
    with AttentionClient(address) as client:
        for seq_len in (1, 64, 700):  # the last one goes over AttendStream, in chunks
            result = client.attend(*tensors(seq_len), model="causal")
            expected, _ = attention_reference(*tensors(seq_len), scheme=CAUSAL)
            np.testing.assert_allclose(result.output, expected, atol=2e-6 * np.sqrt(seq_len))


def test_both_transports_give_the_same_bits(address: str) -> None:
    with (
        AttentionClient(address, stream_threshold_bytes=0) as chunked,
        AttentionClient(address, stream_threshold_bytes=1 << 40) as unary,
    ):
        for seq_len in (1, 77, 513):
            results = [c.attend(*tensors(seq_len), model="causal") for c in (chunked, unary)]
            np.testing.assert_array_equal(results[0].output, results[1].output)
        for client in (chunked, unary):
            with pytest.raises(NotFoundError, match="model: given 'none'"):
                client.attend(*tensors(3), model="none")


def test_many_requests_in_flight_on_one_stream(address: str) -> None:
    work = [tensors(seq_len, seq_len) for seq_len in (5, 300, 1, 120, 64, 900, 33, 2)]
    with AttentionClient(address) as client:
        with client.stream() as stream:
            futures = [stream.submit(*arrays, model="causal") for arrays in work]
            bad = stream.submit(*work[0], model="none")
            results = [future.result(timeout=30) for future in futures]
            assert isinstance(bad.exception(timeout=30), NotFoundError)
        for arrays, result in zip(work, results, strict=True):
            alone = client.attend(*arrays, model="causal")
            np.testing.assert_array_equal(result.output, alone.output)


async def _gather(address: str) -> list[np.ndarray]:
    import asyncio

    async with AsyncAttentionClient(address) as client:
        calls = [client.attend(*tensors(n, n), model="causal") for n in (3, 64, 600)]
        assert (await client.get_model("causal")).num_heads == 8
        return [result.output for result in await asyncio.gather(*calls)]


def test_the_asyncio_client(address: str) -> None:
    import asyncio

    for seq_len, output in zip((3, 64, 600), asyncio.run(_gather(address)), strict=True):
        expected, _ = attention_reference(*tensors(seq_len, seq_len), scheme=CAUSAL)
        np.testing.assert_allclose(output, expected, atol=2e-6 * np.sqrt(seq_len))


def test_torch_tensors_are_taken_as_they_are(address: str) -> None:
    import torch

    with AttentionClient(address) as client:
        arrays = tensors(9)
        by_torch = client.attend(*map(torch.from_numpy, arrays), model="causal")
        np.testing.assert_array_equal(
            by_torch.output, client.attend(*arrays, model="causal").output
        )
        with pytest.raises(TypeError, match="query: cannot read Tensor"):
            client.attend(torch.zeros(1, requires_grad=True), model="causal")


def test_health_and_reflection(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="attnserve.v1.AttentionService")
        answer = health_pb2_grpc.HealthStub(channel).Check(request)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert "attnserve.v1.AttentionService" in services


def test_the_command_line(address: str, tmp_path: Path) -> None:
    def attnserve(*arguments: object) -> str:
        command = [BIN / "attnserve", "--target", address, *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "causal version 1: core, causal, FP32, 8 heads of 64" in attnserve("info")
    assert '"sha256"' in attnserve("info", "--model", "causal")
    q, k, v = tensors(20)
    np.savez(tmp_path / "in.npz", query=q, key=k, value=v)
    files = ("--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz")
    assert "output: [1, 8, 20, 64]" in attnserve("attend", "--model", "causal", "--weights", *files)
    with np.load(tmp_path / "out.npz") as out:
        assert out["weights"].shape == (1, 8, 20, 20)
    failed = subprocess.run(
        [BIN / "attnserve", "--target", address, "attend", "--model", "none"],
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 1
    assert "NOT_FOUND" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_sigterm_answers_what_came_and_exits_with_0(repository: Path) -> None:
    process, address = start(repository, "--log-format", "json")
    with AttentionClient(address) as client:
        client.attend(*tensors(8), model="causal")
        with client.stream() as stream:
            stream.submit(*tensors(8), model="causal").result(timeout=10)
            futures = [stream.submit(*tensors(1500), model="causal") for _ in range(3)]
            time.sleep(0.3)
            os.kill(process.pid, signal.SIGTERM)
            done = [future.exception(timeout=30) for future in futures]
        assert not isinstance(done[0], Exception)
        assert all(error is None or isinstance(error, UnavailableError) for error in done)
    started = time.monotonic()
    assert process.wait(timeout=30) == 0
    assert time.monotonic() - started < 10
    assert '"message": "stopped"' in process.stderr.read()


def test_a_changed_file_is_refused_at_start(repository: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(repository, tmp_path / "models")
    file = tmp_path / "models/causal/1/model.onnx"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    failed = subprocess.run(
        [BIN / "attnserve-server", "--repository", tmp_path / "models", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert failed.returncode == 1
    assert "SHA-256" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_asking_for_cuda_without_it_says_what_is_missing(repository: Path) -> None:
    from attnserve_server.models.providers import missing_for_cuda

    if missing_for_cuda() is None:
        pytest.skip("CUDA works here")
    failed = subprocess.run(
        [BIN / "attnserve-server", "--repository", repository, "--provider", "cuda"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert failed.returncode == 1
    assert "CUDA cannot be used" in failed.stderr
    assert "pip install" in failed.stderr


def test_metrics_are_served(repository: Path) -> None:
    from attnserve_server.app import AttentionServer
    from attnserve_server.settings import Settings

    server = AttentionServer(Settings(repository, port=0, metrics_port=0, provider="cpu"))
    server.start()
    with AttentionClient(f"127.0.0.1:{server.port}") as client:
        client.attend(*tensors(8), model="causal")
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    server.drain()
    assert 'attnserve_requests_total{code="OK",method="Attend"} 1.0' in text
    assert 'part="compute"' in text


def test_the_sdk_needs_grpcio_protobuf_and_numpy_alone(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    bare = [sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"]
    subprocess.run(bare, check=True)
    python = tmp_path / "bare/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "-q", "-c", root / "constraints.txt"]
    for package in ("proto", "client"):
        # Built from a copy, so that nothing is left in the checkout.
        import shutil

        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("*.egg*"))
    subprocess.run([*install, tmp_path / "proto", tmp_path / "client"], check=True)
    listed = subprocess.run(
        [*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True
    ).stdout
    names = {line.split("==")[0].lower().replace("_", "-") for line in listed.split()}
    assert names <= {
        "attnserve-proto", "attnserve-client", "grpcio", "protobuf", "numpy",
        "typing-extensions",
    }  # fmt: skip
    code = "import attnserve_client, sys; assert 'torch' not in sys.modules"
    subprocess.run([python, "-c", code], check=True)
