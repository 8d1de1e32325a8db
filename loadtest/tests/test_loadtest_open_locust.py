"""Open loops under Locust's own command, alone and distributed, against a real server."""

import csv
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from handmade import attention, write_core
from serving import ServerProcess, process

pytestmark = pytest.mark.needs_library

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("models")
    write_core(folder, "llama", attention(4, 8, num_kv_heads=2, mask="causal"))
    with process(folder) as running:
        yield running


def statistics(prefix: Path) -> dict[str, dict[str, str]]:
    with Path(f"{prefix}_stats.csv").open() as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def test_workers_are_so_many_sources(server: ServerProcess, locust: Run, tmp_path: Path) -> None:
    """2 workers, 2 users, each a source of 30 a second: 60 a second in all."""
    prefix = tmp_path / "run"
    done = locust(
        "--host", server.address, "-u", "2", "-r", "2", "-t", "5s", "--processes", "2",
        "--model", "llama", "--seq-lens", "16,32", "--rate", "30", "--csv", str(prefix),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = statistics(prefix)
    total = rows.pop("Aggregated")
    assert {name.rpartition("/")[2] for name in rows} == {"seq_len=16", "seq_len=32"}
    assert total["Failure Count"] == "0"
    # What the sources take to start is not sent.
    assert 60 < int(total["Request Count"]) < 60 * 5 * 1.3
    assert "server's own timings" in done.stderr + done.stdout


@pytest.mark.slow
def test_a_pause_shows_in_the_percentiles(
    server: ServerProcess, locust: Run, tmp_path: Path
) -> None:
    """A user who waits would have lost one request; of a source, all that was due is late."""
    prefix = tmp_path / "run"

    def pause() -> None:
        time.sleep(8)
        os.kill(server.popen.pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(server.popen.pid, signal.SIGCONT)

    stopper = threading.Thread(target=pause)
    stopper.start()
    done = locust(
        "--host", server.address, "-u", "1", "-t", "11s", "--model", "llama", "--seq-lens", "16",
        "--rate", "40", "--arrivals", "constant", "--csv", str(prefix),
    )  # fmt: skip
    stopper.join()
    assert done.returncode == 0, done.stderr
    total = statistics(prefix)["Aggregated"]
    assert int(total["Request Count"]) > 80
    assert 800 < float(total["99%"]) < 1500
    assert float(total["50%"]) < 200


def test_a_model_that_is_not_there_ends_the_run(server: ServerProcess, locust: Run) -> None:
    done = locust("--host", server.address, "-t", "20s", "--model", "nosuch", "--rate", "5")
    assert done.returncode == 1
    assert "given 'nosuch'" in done.stderr
