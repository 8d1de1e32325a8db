"""Where a server listens, and its metrics beside it."""

import socket
import urllib.request
from pathlib import Path

import grpc
import pytest
from attnserve_server.app import AttentionServer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import serving


def check_serves(server: AttentionServer) -> None:
    with grpc.insecure_channel(server.address, [("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest()
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def metrics(host: str, port: int | None) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{host}:{port}/metrics", timeout=10) as page:
        return str(page.read(), "utf-8")


def test_a_socket_file_has_its_metrics_on_loopback(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(tmp_path, host=f"unix:{path}", metrics_port=0) as server:
        assert server.address == f"unix:{path}"
        check_serves(server)
        assert "attnserve_connections" in metrics("127.0.0.1", server.metrics_port)
    assert not path.exists()


@pytest.mark.skipif(not socket.has_ipv6, reason="this host has no IPv6")
def test_ipv6_is_listened_to_and_written_in_brackets(tmp_path: Path) -> None:
    with serving(tmp_path, host="::1", metrics_port=0) as server:
        assert server.address == f"[::1]:{server.port}"
        check_serves(server)
        assert "attnserve_connections" in metrics("[::1]", server.metrics_port)
