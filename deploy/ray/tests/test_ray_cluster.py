"""Servers on two nodes of a real Ray cluster: up, found, called, down."""

from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionClient
from ray_nodes import nodes
from serving import DIM, HEADS, write_causal


@pytest.mark.needs_library
def test_up_found_called_and_down(tmp_path: Path) -> None:
    models, found = write_causal(tmp_path / "models"), tmp_path / "servers"
    query = np.ones((1, HEADS, 8, DIM), np.float32)
    with nodes(head_cpus=1) as ray_nodes:
        ray_nodes.add(cpus=1)
        said = ray_nodes.run("up", "--repository", str(models), "--min", "2")
        assert "attnserve: 2 serve, 2 wanted; 1 CPUs each" in said
        ray_nodes.run("follow", "--once", str(found))
        with AttentionClient(f"file://{found}") as client:
            for _ in range(20):
                assert client.attend(query, query, query, model="causal").output.shape == (
                    query.shape
                )
            servers = {address.rpartition(":")[0] for address in client.servers}
        assert servers == {"127.0.0.2", "127.0.0.3"}
        pids = [each["pid"] for each in ray_nodes.status()["servers"]]
        ray_nodes.run("down")
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
