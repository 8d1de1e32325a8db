"""What becomes of servers on a Ray cluster whose processes and nodes come and go."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from attnserve_client import AttentionClient
from ray_nodes import Nodes, nodes
from serving import DIM, HEADS, eventually, write_causal

pytestmark = [pytest.mark.slow, pytest.mark.needs_library]
Q = np.ones((1, HEADS, 8, DIM), np.float32)
SECONDS = 90.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal(tmp_path_factory.mktemp("models"))


@contextmanager
def following(
    ray_nodes: Nodes, path: Path, end: signal.Signals = signal.SIGINT
) -> Iterator[AttentionClient]:
    """A client of the servers that `follow` writes down, all the time, until it is ended."""
    process = subprocess.Popen(ray_nodes.words("follow", str(path)), stderr=subprocess.PIPE)
    try:
        assert eventually(path.exists, SECONDS)
        with AttentionClient(f"file://{path}") as client:
            yield client
    finally:
        process.send_signal(end)
        _, said = process.communicate(timeout=20)
        wanted = (130, 1) if end == signal.SIGINT else (0, 0)
        assert (process.returncode, said.count(b"interrupted")) == wanted, said
        assert b"***" not in said


def serving(ray_nodes: Nodes) -> list[dict[str, Any]]:
    return [each for each in ray_nodes.status()["servers"] if each["state"] == "serving"]


def call(client: AttentionClient) -> bool:
    return client.attend(Q, Q, Q, model="causal", timeout=60).output.shape == Q.shape


def test_a_server_that_is_killed_is_started_again_and_so_is_the_controller(
    models: Path, tmp_path: Path
) -> None:
    with nodes(head_cpus=2) as ray_nodes:
        ray_nodes.run("up", "--repository", str(models), "--min", "2")
        before = serving(ray_nodes)
        with following(ray_nodes, tmp_path / "servers") as client:
            assert call(client)
            os.kill(before[0]["pid"], signal.SIGKILL)
            for _ in range(100):
                assert call(client)
            assert eventually(
                lambda: [each["restarts"] for each in serving(ray_nodes)] == [1, 0], SECONDS
            )
            after = serving(ray_nodes)
            assert [each["address"] for each in after] == [each["address"] for each in before]
            assert after[0]["pid"] != before[0]["pid"]
            # The controller: another process of it knows what it was told before, and the servers.
            ray_nodes.run("scale", "1-2")
            ray.init(ray_nodes.address, namespace="attnserve", log_to_driver=False)
            ray.kill(ray.get_actor("attnserve"), no_restart=False)
            ray.shutdown()
            assert call(client)

            def is_back() -> bool:
                ran = subprocess.run(ray_nodes.words("status"), capture_output=True, text=True)
                return "2 serve, 2 wanted, of 1-2 by load" in ran.stdout

            assert eventually(is_back, SECONDS)
            assert [each["pid"] for each in serving(ray_nodes)] == [each["pid"] for each in after]
            assert len(client.servers) == 2
            # An owner: its server ends with it, and Ray has another in its place.
            ray.init(ray_nodes.address, namespace="attnserve", log_to_driver=False)
            ray.kill(ray.get_actor("attnserve-server-1"), no_restart=False)
            ray.shutdown()
            gone = Path(f"/proc/{after[0]['pid']}")
            assert eventually(lambda: not gone.exists(), SECONDS)
            for _ in range(20):
                assert call(client)
            assert eventually(lambda: len(serving(ray_nodes)) == 2, SECONDS)


def test_servers_of_a_node_that_is_killed_come_up_on_another(models: Path, tmp_path: Path) -> None:
    with nodes(head_cpus=0) as ray_nodes:
        first = ray_nodes.add(cpus=1)
        ray_nodes.run("up", "--repository", str(models))
        [server] = serving(ray_nodes)
        assert server["node"] == first.node_ip_address
        with following(ray_nodes, tmp_path / "servers", signal.SIGTERM) as client:
            assert call(client)
            second = ray_nodes.add(cpus=1)
            ray_nodes.kill(first)

            def has_moved() -> bool:
                assert call(client)  # which waits for the other
                return client.servers[0].startswith(second.node_ip_address)

            assert eventually(has_moved, SECONDS)
        [now] = serving(ray_nodes)
        assert now["node"] == second.node_ip_address
        assert not Path(f"/proc/{server['pid']}").exists()


def test_a_server_waits_for_a_node_with_room(models: Path) -> None:
    with nodes(head_cpus=1) as ray_nodes:
        said = ray_nodes.run("up", "--repository", str(models), "--min", "2", "--wait", "10",
                             code=1)  # fmt: skip
        assert "1 of 2 servers serve after 10 s; the others begin as nodes with 1 CPUs" in said
        assert sorted(each["state"] for each in ray_nodes.status()["servers"]) == [
            "pending",
            "serving",
        ]
        node = ray_nodes.add(cpus=1)
        assert eventually(lambda: len(serving(ray_nodes)) == 2, SECONDS)
        assert node.node_ip_address in {each["node"] for each in serving(ray_nodes)}
        # One that waits is let go at once.
        assert ray_nodes.run("scale", "3") == "attnserve: 3 wanted, of 3\n"
        assert eventually(lambda: len(ray_nodes.status()["servers"]) == 3, SECONDS)
        ray_nodes.run("scale", "2")
        assert eventually(lambda: len(ray_nodes.status()["servers"]) == 2, SECONDS)
        assert len(serving(ray_nodes)) == 2
        ray_nodes.run("down")
        # So does one that takes what no node has.
        models_up = ("up", "--repository", str(models), "--gpus", "1")
        assert ray_nodes.run(*models_up, "--wait", "0") == ""
        assert [each["state"] for each in ray_nodes.status()["servers"]] == ["pending"]
        node = ray_nodes.add(cpus=1, gpus=1)
        assert eventually(lambda: len(serving(ray_nodes)) == 1, SECONDS)
        assert serving(ray_nodes)[0]["node"] == node.node_ip_address


def test_what_cannot_be_is_said(models: Path, tmp_path: Path) -> None:
    with nodes(head_cpus=2) as ray_nodes:
        for command in (["status"], ["scale", "2"], ["down"], ["follow", str(tmp_path / "x")]):
            [line] = ray_nodes.run(*command, code=1).splitlines()
            assert "--name: given attnserve, which is not up; see" in line
        absent = str(tmp_path / "absent")
        [line] = ray_nodes.run("up", "--repository", absent, code=1).splitlines()
        assert "server 1 on 127.0.0.2: ended with 1: attnserve-server: " in line
        assert absent in line
        [line] = ray_nodes.run("up", "--repository", str(models), code=1).splitlines()
        assert "--name: given attnserve, which is up already" in line
        ray_nodes.run("down")
        assert not (tmp_path / "x").exists()
        # Another beside it, and one after it.
        for name in ("attnserve", "other"):
            ray_nodes.run("up", "--repository", str(models), "--name", name)
        assert ray_nodes.status()["servers"][0]["number"] == 1
        ray_nodes.run("down")
        assert "other: 1 serve" in ray_nodes.run("status", "--name", "other")
