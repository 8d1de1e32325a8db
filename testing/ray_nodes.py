"""A Ray cluster of several nodes on this machine: `ray.cluster_utils.Cluster`, each with an address
of its own (127.0.0.2 and on), and the command `attnserve-cluster` over it."""

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

COMMAND = Path(sys.executable).with_name("attnserve-cluster")
# Ray's own names, so that a node that is killed is missed soon.
_HEALTH = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
_STORE_BYTES = 80 << 20


class Nodes:
    """Its nodes, and a cluster of servers on them.

    Args:
        folder: of Ray's files.
    """

    def __init__(self, folder: Path, head_cpus: float) -> None:
        self._count = 1
        self._folder = folder
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args=self._options(head_cpus)
            | {"_system_config": _HEALTH, "temp_dir": str(folder)},
        )

    @property
    def address(self) -> str:
        """For `--address`."""
        return str(self._cluster.address)

    def add(self, cpus: float, gpus: float = 0) -> Any:
        """One node more; what it has is what Ray is told."""
        return self._cluster.add_node(wait=False, num_gpus=gpus, **self._options(cpus))

    def kill(self, node: Any) -> None:
        """End a node's processes at once."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()

    def run(self, command: str, *words: str, code: int = 0) -> str:
        """What a command says on standard output; on standard error, if it is to fail."""
        ran = subprocess.run(self.words(command, *words), capture_output=True, text=True)
        assert ran.returncode == code, (ran.returncode, ran.stdout, ran.stderr)
        return ran.stderr if code else ran.stdout

    def words(self, command: str, *words: str) -> list[str]:
        """A command over this cluster."""
        return [str(COMMAND), command, "--address", self.address, *words]

    def status(self) -> Any:
        """What `status --json` says."""
        return json.loads(self.run("status", "--json"))

    def _options(self, cpus: float) -> dict[str, Any]:
        self._count += 1
        return {
            "num_cpus": cpus,
            "node_ip_address": f"127.0.0.{self._count}",
            "object_store_memory": _STORE_BYTES,
            "include_dashboard": False,
        }


@contextlib.contextmanager
def nodes(head_cpus: float) -> Iterator[Nodes]:
    """A Ray cluster of a head; it and all on it have ended afterwards."""
    # The paths of its sockets may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    # Once more at the end: what dies last makes its folder anew.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        # Ray writes the address of a head here too, of a folder which it takes for there.
        patch.setenv("RAY_TMPDIR", str(folder))
        made = Nodes(folder / "ray", head_cpus)
        try:
            yield made
        finally:
            made.close()
            shutil.rmtree(folder, ignore_errors=True)
