"""/metrics: one path, few connections at once, each for a few seconds, and who is told."""

import contextlib
import http.client
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import serving
import tritonclient.grpc as triton
from attnserve_server import callers, metrics_http
from attnserve_server.app import AttentionServer
from attnserve_server.metrics_http import MetricsServer
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_causal(tmp_path_factory.mktemp("metrics"))


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[AttentionServer]:
    with serving.serving(repository, metrics_port=0) as running:
        yield running


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def samples(port: int) -> dict[tuple[str, ...], float]:
    """What is counted now, by name and values of labels."""
    families = text_string_to_metric_families(ask(port, "/metrics")[1].decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def raw(port: int, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        received = b""
        while more := connection.recv(1 << 16):
            received += more
        return received


def test_there_is_one_path(server: AttentionServer) -> None:
    port = server.metrics_port
    assert port is not None
    status, body = ask(port, "/metrics")
    assert status == 200
    assert b"attnserve_connections" in body
    assert ask(port, "/metrics?name=x")[0] == 200
    assert ask(port, "/metrics", "HEAD") == (200, b"")
    for path in ("/", "/metrics/", "/metrics/../etc/passwd", "//metrics", "/healthz"):
        assert ask(port, path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "CONNECT", "OPTIONS"):
        assert ask(port, "/metrics", method)[0] == 405


def test_openmetrics_is_given_to_those_who_ask_for_it(server: AttentionServer) -> None:
    with urllib.request.urlopen(
        urllib.request.Request(
            f"http://127.0.0.1:{server.metrics_port}/metrics",
            headers={"Accept": "application/openmetrics-text;version=1.0.0"},
        )
    ) as page:
        assert page.headers["Content-Type"].startswith("application/openmetrics-text")
        assert page.read().endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "sent",
    [
        b"rubbish\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics SPDY/9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b" \r\n\r\n",
    ],
)
def test_what_is_no_request(server: AttentionServer, sent: bytes) -> None:
    assert server.metrics_port is not None
    assert raw(server.metrics_port, sent).startswith(b"HTTP/1.1 400 ")


def test_a_head_without_end_is_cut_off(server: AttentionServer) -> None:
    assert server.metrics_port is not None
    port = server.metrics_port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 10_000:
                connection.sendall(b"X: " + b"a" * 1000 + b"\r\n")
                sent += 1
                time.sleep(0.001)
        assert sent < 10_000
    assert ask(port, "/metrics")[0] == 200


def test_idle_connections_keep_nobody_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "_SECONDS", 1.0)
    registry = CollectorRegistry()
    Counter("asked", "x", registry=registry)
    server = MetricsServer(registry, "127.0.0.1", 0, lambda address, authorization: True)
    address = ("127.0.0.1", server.port)
    idle = [socket.create_connection(address, timeout=10) for _ in range(60)]
    # Who drips is no better off than who is silent.
    began = time.monotonic()
    closed = 0
    while closed < len(idle) and time.monotonic() - began < 10:
        for connection in idle[:4]:
            with contextlib.suppress(OSError):
                connection.sendall(b"G")
        closed = sum(_is_closed(connection) for connection in idle)
        time.sleep(0.2)
    assert closed == len(idle)
    assert ask(server.port, "/metrics")[0] == 200
    for connection in idle:
        connection.close()
    server.stop()
    with pytest.raises(ConnectionError):
        socket.create_connection(address, timeout=2)


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_where_callers_are_identified_metrics_are_for_this_machine_and_for_admins(
    repository: Path, tmp_path: Path
) -> None:
    path = tmp_path / "callers"
    tokens = {}
    for name, roles in (("ops", "admin"), ("trainer", "infer,sessions")):
        tokens[name], credential = callers.make_token()
        with path.open("a") as file:
            file.write(f"{name} {roles} {credential}\n")
    with serving.serving(repository, callers=path, metrics_port=0) as server:
        assert server.metrics_port is not None
        assert ask(server.metrics_port, "/metrics")[0] == 200
        # The same rule over a real socket, for callers that it is told are elsewhere.
        elsewhere = server.metrics.serve(
            "127.0.0.1",
            0,
            lambda _, authorization: server._may_see_metrics("10.0.0.1", authorization),
            None,
        )
        assert ask(elsewhere.port, "/metrics")[0] == 401
        for token, status in (("ops", 200), ("trainer", 401)):
            said = f"Bearer {tokens[token]}"
            assert ask(elsewhere.port, "/metrics", Authorization=said)[0] == status
        assert ask(elsewhere.port, "/metrics", Authorization="Bearer x")[0] == 401
        elsewhere.stop()


def test_what_tritons_users_look_for_is_what_its_statistics_say(server: AttentionServer) -> None:
    port = server.metrics_port
    assert port is not None
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        _, num_heads, _, head_dim = client.get_model_metadata("causal").inputs[0].shape
        inputs = [
            triton.InferInput(name, [2, num_heads, 5, head_dim], "FP32")
            for name in ("query", "key", "value")
        ]
        for each in inputs:
            each.set_data_from_numpy(np.ones(each.shape(), np.float32))
        for _ in range(3):
            client.infer("causal", inputs)
        with pytest.raises(InferenceServerException):
            client.infer("causal", inputs[:2])
        (counted,) = client.get_inference_statistics("causal").model_stats
    found = samples(port)
    told = counted.inference_stats
    for name, expected in {
        "nv_inference_request_success": 3,
        "nv_inference_request_failure": 1,
        "nv_inference_count": 6,
        "nv_inference_exec_count": counted.execution_count,
        "nv_inference_request_duration_us": told.success.ns / 1000,
        "nv_inference_queue_duration_us": told.queue.ns / 1000,
        "nv_inference_compute_input_duration_us": told.compute_input.ns / 1000,
        "nv_inference_compute_infer_duration_us": told.compute_infer.ns / 1000,
        "nv_inference_compute_output_duration_us": told.compute_output.ns / 1000,
    }.items():
        assert found[name, "causal", "1"] == pytest.approx(expected, rel=1e-9), name
    assert found["process_resident_memory_bytes",] > 1e6
    assert found["process_open_fds",] > 3
