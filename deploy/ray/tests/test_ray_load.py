"""Servers on a Ray cluster by load: more under it, fewer without it, sessions kept."""

import threading
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionClient
from ray_nodes import nodes
from serving import DIM, HEADS, eventually, free_port, write_causal

pytestmark = [pytest.mark.slow, pytest.mark.needs_library]
Q = np.ones((1, HEADS, 2048, DIM), np.float32)
TOKENS = np.ones((1, HEADS, DIM), np.float32)
SECONDS = 120.0


def test_more_servers_under_load_and_fewer_without(tmp_path: Path) -> None:
    models, found = write_causal(tmp_path / "models"), tmp_path / "servers"
    stop = threading.Event()
    answered = [0] * 6

    def load(client: AttentionClient, number: int) -> None:
        while not stop.is_set():
            client.attend(Q, Q, Q, model="causal", timeout=60)
            answered[number] += 1

    with nodes(head_cpus=0) as ray_nodes:
        for _ in range(2):
            ray_nodes.add(cpus=1)
        ray_nodes.run(
            *("up", "--repository", str(models), "--max", "2", "--queue-ms", "2"),
            *("--busy-seconds", "3", "--idle-seconds", "4"),
        )

        def servers() -> int:
            ray_nodes.run("follow", "--once", str(found))
            return len([line for line in found.read_text().splitlines() if line[0] != "#"])

        assert servers() == 1
        with AttentionClient(f"file://{found}") as client:
            callers = [threading.Thread(target=load, args=(client, number)) for number in range(6)]
            for each in callers:
                each.start()
            try:
                assert eventually(lambda: servers() == 2, SECONDS)
                assert eventually(lambda: len(client.servers) == 2)
                before = sum(answered)
                assert eventually(lambda: sum(answered) > before + 100, SECONDS)
            finally:
                stop.set()
                for each in callers:
                    each.join()
            assert eventually(lambda: servers() == 1, SECONDS)
            # The last one is drained once nothing is there any more; it is the least that there is.
            assert eventually(lambda: len(ray_nodes.status()["servers"]) == 1, SECONDS)
            assert ray_nodes.status()["servers_wanted"] == 1
        ray_nodes.run("down")


def test_a_server_that_is_to_go_waits_for_its_sessions(tmp_path: Path) -> None:
    models, found = write_causal(tmp_path / "models"), tmp_path / "servers"
    with nodes(head_cpus=2) as ray_nodes:
        ray_nodes.run("up", "--repository", str(models), "--min", "2")
        ray_nodes.run("follow", "--once", str(found))
        with AttentionClient(f"file://{found}") as client:
            assert eventually(lambda: set(client.server_states.values()) == {"serving"})
            sessions = [client.session("causal", num_layers=1, max_tokens=64) for _ in range(2)]
            for each in sessions:
                each.attend(0, TOKENS, TOKENS, TOKENS)

            def states() -> list[str]:
                return sorted(each["state"] for each in ray_nodes.status()["servers"])

            def holding() -> list[int]:
                return [each["sessions"] for each in ray_nodes.status()["servers"]]

            # Each is opened where fewer are.
            assert eventually(lambda: holding() == [1, 1], SECONDS)
            ray_nodes.run("scale", "1")
            assert eventually(lambda: states() == ["retiring", "serving"], SECONDS)
            # Clients are told, and have what they had.
            ray_nodes.run("follow", "--once", str(found))
            assert eventually(lambda: len(client.servers) == 1)
            for each in sessions:
                each.attend(0, TOKENS, TOKENS, TOKENS)
            assert states() == ["retiring", "serving"]
            for each in sessions:
                each.close()
            assert eventually(lambda: states() == ["serving"], SECONDS)
        ray_nodes.run("down")


def test_a_server_that_is_to_go_hands_its_sessions_over_if_it_can(tmp_path: Path) -> None:
    models, found = write_causal(tmp_path / "models"), tmp_path / "servers"
    low = free_port()
    with nodes(head_cpus=1) as ray_nodes:
        node = ray_nodes.add(cpus=1)
        others = f"127.0.0.2:{low},{node.node_ip_address}:{low}"
        ray_nodes.run(
            *("up", "--repository", str(models), "--min", "2", "--ports", f"{low}-{low + 9}"),
            *("--retire-seconds", "0", "--", "--move-sessions-to", others),
        )
        ray_nodes.run("follow", "--once", str(found))
        with AttentionClient(f"file://{found}") as client:
            assert ",".join(sorted(client.servers or others.split(","))) == others
            assert eventually(lambda: set(client.server_states.values()) == {"serving"})
            sessions = [client.session("causal", num_layers=1, max_tokens=64) for _ in range(2)]
            for each in sessions:
                each.attend(0, TOKENS, TOKENS, TOKENS)
            ray_nodes.run("scale", "1")

            def states() -> list[tuple[str, int]]:
                return [(each["state"], each["sessions"]) for each in ray_nodes.status()["servers"]]

            assert eventually(lambda: states() == [("serving", 2)], SECONDS)
            for each in sessions:
                each.attend(0, TOKENS, TOKENS, TOKENS)
                assert each.length == 2
        ray_nodes.run("down")
