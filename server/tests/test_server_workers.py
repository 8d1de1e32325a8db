"""`--workers`: real supervisors and workers, told apart by the files that they count in."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from attnserve_client import AttentionClient
from attnserve_export.reference import CAUSAL, attention_reference
from attnserve_server.metrics import MergedMetrics
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

DEADLINE_SECONDS = 20


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]
    address: str
    metrics_url: str
    folder: Path  # where the supervisor keeps its temporary files

    def workers(self) -> set[int]:
        pid = self.process.pid
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the samples of that name with these labels, as the supervisor serves it."""
        text = urllib.request.urlopen(self.metrics_url, timeout=10).read().decode()
        samples = [s for m in text_string_to_metric_families(text) for s in m.samples]
        return sum(
            s.value for s in samples if s.name == name and labels.items() <= s.labels.items()
        )

    def answered(self) -> float:
        return self.metric("attnserve_requests_total", code="OK", method="Attend")

    def requests_by_worker(self) -> list[float]:
        """The answered requests that each worker, dead ones included, has counted."""
        files = sorted(self.folder.glob("attnserve-metrics-*/counter_*.db"))
        merged = [MultiProcessCollector.merge([str(file)]) for file in files]
        return [
            sum(s.value for m in metrics if m.name == "attnserve_requests" for s in m.samples)
            for metrics in merged
        ]


def command(repository: Path, port: int, *options: str, workers: int = 2) -> list[str]:
    start = [sys.executable, "-m", "attnserve_server.cli", "--repository", str(repository)]
    return [*start, "--port", str(port), "--provider", "cpu", "--workers", str(workers), *options]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def running(repository: Path, *options: str) -> Iterator[Running]:
    metrics_port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command(repository, 0, "--metrics-port", str(metrics_port), *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TMPDIR": folder},
        )
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split("listening on ")[1].split()[0]
            url = f"http://127.0.0.1:{metrics_port}/metrics"
            yield Running(process, address, url, Path(folder))
        finally:
            process.terminate()
            assert process.wait(DEADLINE_SECONDS) in (0, 1, -signal.SIGKILL)
            assert process.stdout.read() == ""  # the one line was all


@pytest.fixture(scope="module")
def two(repository: Path) -> Iterator[Running]:
    with running(repository) as server:
        yield server


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def gone(pids: set[int]) -> bool:
    """Whether none of them runs; one that has ended may still wait to be reaped."""
    files = [Path(f"/proc/{pid}/cmdline") for pid in pids]
    return not any(file.exists() and file.read_bytes() for file in files)


def tensors(seq_len: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seq_len)
    return [generator.standard_normal((1, 4, seq_len, 8)).astype(np.float32) for _ in range(3)]


def attend(address: str, seq_len: int = 9) -> None:
    """Over a connection of its own, which is over when it returns."""
    with AttentionClient(address) as client:
        result = client.attend(*tensors(seq_len), model="causal", timeout=DEADLINE_SECONDS)
    expected, _ = attention_reference(*tensors(seq_len), scheme=CAUSAL)
    np.testing.assert_allclose(result.output, expected, atol=2e-5)


def test_connections_reach_all_workers_whose_metrics_are_summed(two: Running) -> None:
    for _ in range(24):
        attend(two.address)
    counts = two.requests_by_worker()
    assert len(counts) == 2
    assert all(counts), "24 connections went to one worker: a chance of 1 in 8 million"
    assert sum(counts) == 24
    assert two.answered() == 24
    assert two.metric("attnserve_request_seconds_count", model="causal", part="compute") == 24
    assert two.metric("attnserve_queue_length") == 0
    assert two.metric("attnserve_workers") == 2


def test_a_killed_worker_is_replaced_while_the_other_serves(two: Running) -> None:
    before = two.workers()
    counted = two.answered()
    os.kill(min(before), signal.SIGKILL)
    until(lambda: two.metric("attnserve_worker_restarts_total") == 1)
    attend(two.address)
    until(lambda: two.metric("attnserve_workers") == 2)
    assert len(two.workers()) == 2
    assert len(two.workers() & before) == 1
    for _ in range(24):
        attend(two.address)
    assert two.answered() == counted + 25
    assert len([count for count in two.requests_by_worker() if count]) == 2 + (counted > 0)
    with grpc.insecure_channel(two.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_sigterm_drains_and_leaves_no_process(repository: Path) -> None:
    q, k, v = tensors(8000)
    with running(repository) as server, AttentionClient(server.address) as client:
        workers = server.workers()
        with ThreadPoolExecutor(2) as pool:
            # One client is one connection, so one worker: one request runs, the other waits.
            both = [
                pool.submit(client.attend, q, k, v, model="causal", variant="blocked")
                for _ in range(2)
            ]
            until(lambda: server.metric("attnserve_queue_length") == 1)
            server.process.terminate()
            assert server.process.wait(DEADLINE_SECONDS) == 0
        assert gone(workers)
        assert not list(server.folder.glob("attnserve-*"))
    first, second = (future.result().output for future in both)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[:, :, 0], v[:, :, 0])  # it sees no other position


def test_no_worker_outlives_a_killed_supervisor(repository: Path) -> None:
    with running(repository) as server:
        workers = server.workers()
        assert len(workers) == 2
        server.process.kill()
        until(lambda: gone(workers))


def fails(arguments: list[str]) -> str:
    """The one line of a server that cannot start; grpc may log lines of its own before it."""
    done = subprocess.run(
        [*arguments, "--log-level", "error"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    *logs, line = done.stderr.splitlines()
    assert all("add_port" in log for log in logs), done.stderr
    assert line.startswith("attnserve-server: ")
    return line


def test_a_broken_repository_ends_it_with_one_line(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "causal", tmp_path / "causal")
    with (tmp_path / "causal/1/model.onnx").open("ab") as file:
        file.write(b"\0")
    assert "model.json says" in fails(command(tmp_path, 0, "--metrics-port", "-1"))


def test_a_port_in_use_ends_it_with_one_line(two: Running, tmp_path: Path) -> None:
    taken = int(two.address.split(":")[1])
    metrics = int(two.metrics_url.split(":")[2].split("/")[0])
    off = ("--metrics-port", "-1")
    for line in (
        fails(command(tmp_path, taken, *off)),  # another supervisor's
        fails(command(tmp_path, taken, *off, workers=1)),
        fails(command(tmp_path, 0, "--metrics-port", str(metrics))),
    ):
        assert "is it in use?" in line
    assert "none.invalid" in fails(command(tmp_path, 0, "--host", "none.invalid"))


COUNTING = """
import sys
from attnserve_server.metrics import Metrics
metrics = Metrics(merged=True)
metrics.watch(metrics.waiting, lambda: 3)
metrics.sequences.labels("m", "v").inc(5)
metrics.seconds.labels("m", "v", "compute").observe(0.002)
print("counted", flush=True)
sys.stdin.read()
"""


def test_a_dead_workers_gauges_go_and_its_counters_stay(tmp_path: Path) -> None:
    merged = MergedMetrics(str(tmp_path))

    def values() -> list[float | None]:
        labels = {"model": "m", "variant": "v"}
        value = merged.registry.get_sample_value
        return [
            value("attnserve_queue_length"),
            value("attnserve_sequences_total", labels),
            value("attnserve_request_seconds_count", {**labels, "part": "compute"}),
        ]

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COUNTING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    until(lambda: values() == [6, 10, 2])
    processes[0].kill()
    processes[0].wait()
    merged.forget(processes[0].pid)
    assert values() == [3, 10, 2]
    processes[1].kill()
    processes[1].wait()


@pytest.mark.slow
def test_it_gives_up_on_workers_that_keep_dying(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "causal", tmp_path / "models" / "causal")
    with running(tmp_path / "models") as server:
        (tmp_path / "models/causal/1/model.onnx").write_bytes(b"")
        workers = server.workers()
        os.kill(min(workers), signal.SIGKILL)
        with suppress(OSError):
            until(lambda: server.metric("attnserve_worker_restarts_total") >= 2)
        attend(server.address)  # the other one still serves
        assert server.process.wait(40) == 1
        assert gone(workers)
