"""The binding: what Python gives the data plane and hears of it. Requests are server/tests'."""

import gc
import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from attnserve_dataplane import (
    DataPlane,
    ModelFacts,
    RequestError,
    VariantFacts,
)

MIB = 1 << 20
NOT_FOUND = 5


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    """All of them: none has a default here."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    (library,) = Path(spec.origin).parent.glob("capi/libonnxruntime.so*")
    return {
        "addresses": ["127.0.0.1:0"],
        "io_threads": 1,
        "concurrency": 1,
        "max_message_bytes": MIB,
        "max_request_bytes": MIB,
        "max_response_bytes": MIB,
        "max_bytes_in_flight": 4 * MIB,
        "max_working_bytes": 4 * MIB,
        "max_seq_len": 1024,
        "max_batch": 8,
        "max_stream_requests": 8,
        "chunk_bytes": 1024,
        "max_queue": 8,
        "max_queue_seconds": 1.0,
        "max_batch_size": 8,
        "max_batch_bytes": MIB,
        "batch_delay": 0.0,
        "max_run_seconds": 60.0,
        "max_stored_bytes": MIB,
        "stored_lease": 60.0,
        "max_stored_lease": 60.0,
        "max_kv_bytes": MIB,
        "kv_page_tokens": 16,
        "kv_lease": 10.0,
        "max_kv_lease": 20.0,
        "max_shared_regions": 2,
        "max_shared_bytes": MIB,
        "max_connections": 8,
        "max_connections_per_address": 0,
        "idle_timeout": 60.0,
        "upload_grace": 10.0,
        "keepalive_interval": 0.0,
        "keepalive_timeout": 20.0,
        "keepalive_min_ping_interval": 0.5,
        "max_connection_age": 0.0,
        "max_connection_age_grace": 1.0,
        "tracing": False,
        "trace_sample": 0.0,
        "max_traces_per_second": 1,
        "identity_required": False,
        "web_tokens": False,
        "certificate_roles": 0,
        "caller_requests_per_second": 0.0,
        "caller_bytes_in_flight": 0,
        "caller_stored_bytes": 0,
        "caller_sessions": 0,
        "caller_session_bytes": 0,
        "caller_calls": 0,
        "tls_certificate_chain": None,
        "tls_private_key": None,
        "tls_client_authorities": None,
        "cuda": False,
        "intra_op_threads": 1,
        "spinning": False,
        "onnxruntime_library": str(library),
        "operators_library": "",
    }


@pytest.fixture
def plane(options: dict[str, Any]) -> Iterator[DataPlane]:
    made = DataPlane(**options)
    yield made
    made.drain(1.0)


def port_of(plane: DataPlane) -> int:
    (address,) = plane.addresses
    return int(address.rpartition(":")[2])


def test_each_option_must_be_given(options: dict[str, Any]) -> None:
    for name in options:
        others = {other: value for other, value in options.items() if other != name}
        with pytest.raises(TypeError, match=f"^missing: {name}$"):
            DataPlane(**others)


def test_an_option_of_another_type_is_named(options: dict[str, Any]) -> None:
    for name in options:
        with pytest.raises(TypeError, match=f"^{name}: of another type$"):
            DataPlane(**{**options, name: object()})
    with pytest.raises(TypeError, match=r"^max_queue: of another type$"):
        DataPlane(**{**options, "max_queue": -1})


def test_an_option_that_nobody_knows_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^unknown: max_heads$"):
        DataPlane(**options, max_heads=8)


def test_onnx_runtime_that_is_not_there_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"/nowhere/libonnxruntime\.so"):
        DataPlane(**{**options, "onnxruntime_library": "/nowhere/libonnxruntime.so"})


def test_a_refusal_has_a_code_a_message_and_when_to_retry(plane: DataPlane) -> None:
    with pytest.raises(RequestError) as caught:
        plane.get_model("nobody", "")
    code, message, retry_after = caught.value.args
    assert code == NOT_FOUND
    assert "nobody" in message
    assert retry_after == 0.0


def test_a_graph_that_is_not_there_is_an_error_of_loading(plane: DataPlane) -> None:
    missing = VariantFacts("plain", "/nowhere/plain.onnx", quadratic=True, native=False)
    with pytest.raises(Exception, match=r"/nowhere/plain\.onnx"):
        plane.load(ModelFacts(), [missing], [])


def test_gauges_of_a_plane_without_work_are_zero(plane: DataPlane) -> None:
    assert plane.gauges() == dict.fromkeys(
        [
            "waiting",
            "running",
            "inside",
            "arriving",
            "bytes_in_flight",
            "stored_bytes",
            "shared_bytes",
            "connections",
            "wedged",
        ],
        0.0,
    )
    assert plane.requests() == []
    assert plane.variants() == []


def test_addresses_are_those_that_were_taken(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "socket"
    plane = DataPlane(**{**options, "addresses": ["127.0.0.1:0", f"unix:{path}"]})
    assert plane.addresses == []
    plane.start()
    tcp, unix = plane.addresses
    assert unix == f"unix:{path}"
    host, _, port = tcp.rpartition(":")
    socket.create_connection((host, int(port))).close()
    assert plane.drain(1.0)


def test_a_port_that_is_taken_is_named(options: dict[str, Any]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        plane = DataPlane(**{**options, "addresses": [address]})
        with pytest.raises(RuntimeError, match=address):
            plane.start()


_READ_ONE_EVENT = """
import json, socket, sys
from attnserve_dataplane import DataPlane, collect_logs, next_log

collect_logs()
plane = DataPlane(**json.loads(sys.argv[1]))
plane.start()
port = int(plane.addresses[0].rpartition(":")[2])
connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
print(json.dumps(next_log(10.0)))
for connection in connections:
    connection.close()
plane.drain(1.0)
"""


def test_events_of_the_plane_are_read_one_by_one(options: dict[str, Any]) -> None:
    # In a process of its own: a server in this one would read them.
    given = json.dumps({**options, "max_connections": 1})
    done = subprocess.run(
        [sys.executable, "-c", _READ_ONE_EVENT, given], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    level, message, fields = json.loads(done.stdout)
    assert level == "warning"
    assert message == "connections refused"
    assert fields
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in fields)


def test_waiting_for_what_does_not_come_ends_in_time(plane: DataPlane) -> None:
    plane.start()
    start = time.monotonic()
    for queue in ("control", "loading", "tokens"):
        assert plane.next_request(queue, 0.05) is None
    assert 0.1 < time.monotonic() - start < 5.0


def test_a_request_keeps_its_plane(options: dict[str, Any]) -> None:
    plane = DataPlane(**options)
    plane.start()
    with grpc.insecure_channel(f"127.0.0.1:{port_of(plane)}") as channel:
        call = channel.unary_unary(
            "/attnserve.v1.AttentionService/ServerInfo",
            request_serializer=None,
            response_deserializer=None,
        )
        answer = call.future(b"")
        request = plane.next_request("control", 10.0)
        assert request is not None
        del plane
        gc.collect()
        request.answer(b"still here")
        assert answer.result(timeout=10) == b"still here"


def test_a_plane_drains_once_and_stays_so(plane: DataPlane) -> None:
    plane.start()
    port = port_of(plane)
    assert not plane.draining
    assert plane.drain(1.0)
    assert plane.drain(1.0)
    assert plane.draining
    assert plane.next_request("control", 10.0) is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_plane_may_be_dropped_at_any_time(options: dict[str, Any]) -> None:
    never_started = DataPlane(**options)
    del never_started
    started = DataPlane(**options)
    started.start()
    port = port_of(started)
    del started
    gc.collect()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
