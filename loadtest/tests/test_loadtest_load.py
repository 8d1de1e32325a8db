"""`attnserve-loadtest load` against real servers, as it is run."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from attnserve_loadtest.cli import main
from attnserve_loadtest.report.json_file import read_json
from attnserve_loadtest.report.load_schema import LoadReport
from handmade import attention, write_core
from serving import ServerProcess, process

pytestmark = pytest.mark.needs_library

Run = Callable[..., "Done"]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def loadtest(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process; its clients are processes of their own."""

    def run(*arguments: str | Path) -> Done:
        code = main([str(each) for each in arguments])
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_core(folder, "llama", attention(4, 8, num_kv_heads=2, mask="causal"))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with process(folder) as running:
        yield running


def load(path: Path) -> LoadReport:
    report = read_json(path / "load.json")
    assert isinstance(report, LoadReport)
    return report


def test_rates_with_sessions_and_callers_who_give_up(
    server: ServerProcess, folder: Path, loadtest: Run, tmp_path: Path
) -> None:
    """Two servers, lengths of two weights, sessions that think, and a price."""
    with process(folder) as other:
        done = loadtest(
            "load", "--target", f"{server.address},{other.address}", "--model", "llama",
            "--seq-lens", "16:3,64", "--rates", "20,60", "--duration", "1.5", "--warmup", "0.3",
            "--sessions", "0.5", "--prompt", "20-40", "--tokens", "3-5", "--think", "0.05",
            "--layers", "2", "--cancel", "0.2", "--cancel-after", "0.0001",
            "--slo", "first:p50=10s,between:p50=10s", "--price-per-hour", "2",
            "--out", tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = load(tmp_path)
    assert report.complete
    assert [server.target for server in report.servers] == [server.address, other.address]
    assert len(report.steps) == 2
    for step, rate in zip(report.steps, (20, 60), strict=True):
        # Poisson: a standard deviation is the root of the expected count.
        assert step.due == pytest.approx(rate * 1.5, abs=6 * (rate * 1.5) ** 0.5)
        assert step.due == step.answered + step.refused + step.failed + step.cancelled
        assert step.failed == 0, report.failure
        assert step.meets
        assert sum(target.answered for target in step.targets) == step.answered
        assert all(target.answered for target in step.targets)
        assert step.context_tokens_per_second > 0
        assert {each.seq_len for each in step.lengths} <= {16, 64}
        assert len(step.slices_first_p50_ms) == len(step.slices_throughput) == 5
    last = report.steps[-1]
    assert last.cancelled > 0
    assert last.first is not None
    assert last.between is not None
    assert last.late is not None
    assert report.capacity.cost_per_million_tokens is not None
    assert report.capacity.largest_context == 64
    assert report.service.prompt is not None
    assert report.service.step is not None
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "load.html").read_text()
    for text in ("Servers", other.address, "knee", "between tokens", "given up"):
        assert text in page
    with (tmp_path / "load.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["due"]) for row in rows] == [step.due for step in report.steps]
    assert "a million tokens of context cost" in done.stdout
    assert len([line for line in done.stderr.splitlines() if "answers/s" in line]) == 2
    # The same again from the file.
    for name in ("load.png", "load.csv", "load.html"):
        (tmp_path / name).unlink()
    again = loadtest("report", tmp_path / "load.json")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "load.html").read_text() == page
    assert again.stdout == done.stdout


def test_a_ramp_stops_once_a_bound_is_missed(
    server: ServerProcess, loadtest: Run, tmp_path: Path
) -> None:
    """Nothing is answered within a microsecond: one load, and it is too much."""
    done = loadtest(
        "load", "--target", server.address, "--model", "llama", "--seq-lens", "16",
        "--ramp", "20-1000", "--duration", "0.5", "--warmup", "0.1", "--arrivals", "constant",
        "--slo", "p99=1us", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = load(tmp_path)
    (step,) = report.steps
    assert step.offered == 20
    assert step.goodput == 0 < step.throughput
    assert report.capacity.best is report.capacity.largest_context is None
    assert "no load that was tried could be kept up with" in done.stdout
    assert "too much" in done.stderr


def test_callers_who_wait_for_their_answer(
    server: ServerProcess, loadtest: Run, tmp_path: Path
) -> None:
    done = loadtest(
        "load", "--target", server.address, "--model", "llama", "--seq-lens", "16",
        "--callers", "1-4", "--duration", "0.4", "--warmup", "0.1", "--slo", "p50=10s",
        "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = load(tmp_path)
    assert [step.callers for step in report.steps] == [1, 2, 3, 4]
    assert all(step.offered is None for step in report.steps)
    assert report.capacity.most_callers == 4
    assert "the most callers within the bounds: 4" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slo", "between:p99=5ms"], "there are no sessions"),
        (["--slo", "p99=5ms", "--sessions", "1"], "there are only sessions"),
        (["--model", "nosuch"], "given 'nosuch'"),
        (["--variant", "nosuch"], "no variant 'nosuch'"),
        (["--target", "127.0.0.1:1", "--timeout", "0.3"], "no server answers at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_offered_is_said_before(
    server: ServerProcess, loadtest: Run, tmp_path: Path, options: list[str], said: str
) -> None:
    base = ["load", "--target", server.address, "--model", "llama", "--out", tmp_path]
    done = loadtest(*base, *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert said in line
    assert line.endswith("see `attnserve-loadtest load --help`")


def test_servers_of_different_models_are_refused(
    server: ServerProcess, loadtest: Run, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    write_core(models, "llama", attention(8, 8, num_kv_heads=2, mask="causal"))
    with process(models) as other:
        targets = f"{server.address},{other.address}"
        done = loadtest("load", "--target", targets, "--model", "llama", "--out", tmp_path)
    assert done.returncode == 1
    assert f"{other.address} has another model 'llama' than {server.address}" in done.stderr


def test_an_interruption_keeps_the_loads_that_were_whole(
    server: ServerProcess, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "attnserve_loadtest", "load", "--target", server.address,
        "--model", "llama", "--seq-lens", "16", "--rates", "20,30,40", "--duration", "0.7",
        "--warmup", "0", "--out", str(tmp_path),
    ]  # fmt: skip
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert running.stderr is not None
    assert "answers/s" in running.stderr.readline()
    time.sleep(0.3)
    # As a terminal does: to all processes of the group.
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "interrupted: this is what was measured" in out
    report: dict[str, Any] = json.loads((tmp_path / "load.json").read_text())
    assert not report["complete"]
    assert 1 <= len(report["steps"]) < 3
    assert "Traceback" not in err
