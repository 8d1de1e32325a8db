"""Which servers the SDK, its command and the health check reach through the environment's proxy."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from attnserve_client import AsyncAttentionClient, AttentionClient, UnavailableError
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_proto import targets
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[2]
VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")


class Service(pb_grpc.AttentionServiceServicer):
    def ServerInfo(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return pb.ServerInfoResponse(name="attnserve", state="serving")

    def ListModels(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        return pb.ListModelsResponse()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """The port of a server on loopback, and its Unix socket as a target."""
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_AttentionServiceServicer_to_server(Service(), server)
    checks = health.HealthServicer()
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.add_insecure_port(f"[::1]:{port}")
    server.add_insecure_port(f"unix:{tmp_path}/socket")
    server.start()
    yield port, f"unix:{tmp_path}/socket"
    server.stop(0).wait()


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The environment names a proxy that refuses all; the first lines of what it is asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def refuse() -> None:
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:  # closed
                    return
                with connection:
                    asked.append(connection.recv(4096).partition(b"\r\n")[0])
                    connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        for name in ("no_grpc_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name in VARIABLES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        yield asked
        proxy.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:{port}",
        "localhost:{port}",
        "LocalHost:{port}",
        "[::1]:{port}",
        "dns:///localhost:{port}",
        "dns:127.0.0.1:{port}",
        "ipv4:127.0.0.1:{port}",
        "ipv6:[::1]:{port}",
        "ipv6:%5B::1%5D:{port}",
        "{unix}",
    ],
)
def test_this_host_is_reached_without_the_proxy(
    served: tuple[int, str], proxied: list[bytes], target: str
) -> None:
    port, unix = served
    if "::1" in target and not has_ipv6_loopback():
        pytest.skip("no ::1 here")
    address = target.format(port=port, unix=unix)
    with AttentionClient(address) as client:
        assert client.server_info(timeout=5).name == "attnserve"

    async def ask() -> str:
        async with AsyncAttentionClient(address) as client:
            return (await client.server_info(timeout=5)).name

    assert asyncio.run(ask()) == "attnserve"
    assert not proxied


def test_other_hosts_are_reached_through_the_proxy(proxied: list[bytes]) -> None:
    with (
        AttentionClient("attnserve.example:8001") as client,
        pytest.raises(UnavailableError),
    ):
        client.server_info(timeout=0.3)

    async def ask() -> None:
        async with AsyncAttentionClient("192.0.2.1:8001") as client:
            await client.server_info(timeout=0.3)

    with pytest.raises(UnavailableError):
        asyncio.run(ask())
    # Others in this process may be on their way out, too.
    reached = {line.split()[1] for line in proxied}
    assert reached >= {b"attnserve.example:8001", b"192.0.2.1:8001"}


@pytest.mark.parametrize(
    "target",
    ["10.0.0.1:80", "127.0.0.1.example:80", "localhost.example:80", "xlocalhost:80",
     "dns:///attnserve.example:80", "ipv4:127.0.0.1:80,10.0.0.1:80", "[2001:db8::1]:80",
     "2001:db8::1", "attnserve", ""],
)  # fmt: skip
def test_what_is_not_this_hosts_own_address(target: str) -> None:
    assert not targets.is_local(target)


@pytest.mark.parametrize(
    "target",
    ["127.0.0.1", "127.255.0.3:80", "localhost.:80", "::1", "[::1]", "[::ffff:127.0.0.1]:80",
     "0.0.0.0:80", "[::]:80", "unix-abstract:name", "unix:///run/attnserve",
     "dns://8.8.8.8/localhost:80"],
)  # fmt: skip
def test_what_is_this_hosts_own_address(target: str) -> None:
    assert targets.is_local(target)


def test_the_command_and_the_health_check_reach_this_host_without_the_proxy(
    served: tuple[int, str], proxied: list[bytes]
) -> None:
    address = f"127.0.0.1:{served[0]}"
    for command in (
        ["-m", "attnserve_client._cli", "--target", address, "info"],
        [str(ROOT / "deploy/healthcheck.py"), address],
    ):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=60, env=os.environ
        )
        assert done.returncode == 0, done.stderr
    assert not proxied


def has_ipv6_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
