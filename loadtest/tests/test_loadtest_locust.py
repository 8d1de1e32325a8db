"""The locustfile under Locust's own command: without the web UI, distributed, and with it."""

import csv
import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attnserve_loadtest.report.schema import PARTS
from serving import free_port

LOCUSTFILE = Path(__file__).parent.parent / "locustfile.py"

Run = Callable[..., subprocess.CompletedProcess[str]]


def statistics(prefix: Path, kind: str) -> dict[str, dict[str, str]]:
    with Path(f"{prefix}_{kind}.csv").open() as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def test_one_row_for_each_model_variant_and_length(
    target: str, locust: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server is on this host: the environment's proxy is none of its business.
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    prefix = tmp_path / "run"
    done = locust(
        "--host", target, "-u", "2", "-r", "2", "-t", "3s", "--model", "quadratic",
        "--seq-lens", "32,64", "--tokens-model", "tokens", "--tokens-variant", "reference",
        "--tokens-seq-lens", "16", "--csv", str(prefix),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = statistics(prefix, "stats")
    assert set(rows) == {
        "quadratic/fused/seq_len=32",
        "quadratic/fused/seq_len=64",
        "tokens/reference/seq_len=16",
        "Aggregated",
    }
    row = rows["quadratic/fused/seq_len=64"]
    assert row["Type"] == "Attend"
    assert int(row["Request Count"]) > 20
    assert int(row["Failure Count"]) == 0
    assert float(row["Average Content Size"]) == 64 * 8 * 4
    assert rows["tokens/reference/seq_len=16"]["Type"] == "AttendTokens"
    assert "server's own timings" in done.stderr + done.stdout


def test_a_row_whose_timings_all_overlap_has_no_parts(target: str, locust: Run) -> None:
    done = locust(
        "--host", target, "-u", "1", "-t", "5s", "--model", "always-overlapping",
        "--seq-lens", "64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in (done.stderr + done.stdout).splitlines()]
    (row,) = [r[1:] for r in rows if r[:1] == ["always-overlapping/fused/seq_len=64"] and "-" in r]
    assert row[1:6] == ["-"] * 5
    assert float(row[0]) > 1.5


def test_failures_are_named_by_grpc_status(target: str, locust: Run, tmp_path: Path) -> None:
    prefix = tmp_path / "run"
    done = locust(
        "--host", target, "-u", "1", "-t", "5s", "--model", "broken", "--variant", "fused",
        "--seq-lens", "32", "--csv", str(prefix),
    )  # fmt: skip
    assert done.returncode == 1
    row = statistics(prefix, "stats")["broken/fused/seq_len=32"]
    assert row["Failure Count"] == row["Request Count"] != "0"
    (failure,) = statistics(prefix, "failures").values()
    assert failure["Error"] == "RESOURCE_EXHAUSTED"
    assert done.stderr.count("RESOURCE_EXHAUSTED: queue: full") == 1


def test_distributed_run_sums_up_timings_of_its_workers(target: str, locust: Run) -> None:
    done = locust(
        "--host", target, "-u", "2", "-r", "2", "-t", "3s", "--model", "linear",
        "--seq-lens", "64,128", "--processes", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stderr + done.stdout
    table = text[text.index("server's own timings") :]
    means = {
        line.split()[0]: line.split()[1:]
        for line in table.splitlines()
        if line.startswith("linear/fused/seq_len=")
    }
    for end_to_end, *parts, batch_size in means.values():
        assert sum(map(float, parts)) == pytest.approx(float(end_to_end), abs=0.005)
        assert batch_size == "1.000"
    assert float(means["linear/fused/seq_len=64"][3]) == pytest.approx(1.5, abs=0.01)
    assert float(means["linear/fused/seq_len=128"][3]) == pytest.approx(3, abs=0.01)


def test_unknown_model_ends_the_run_with_its_reason(target: str, locust: Run) -> None:
    done = locust("--host", target, "-u", "1", "-t", "20s", "--model", "nosuch")
    assert done.returncode == 1
    assert "NOT_FOUND from GetModel: model: 'nosuch' is not served" in done.stderr


def test_missing_host_and_bad_lengths_are_refused(locust: Run) -> None:
    no_host = locust("-u", "1", "-t", "20s", "--model", "linear")
    assert no_host.returncode == 1
    assert "--host HOST:PORT" in no_host.stderr
    assert locust("--seq-lens", "64,x").returncode == 2


@pytest.fixture
def web_ui(target: str, tmp_path: Path) -> Iterator[str]:
    """Locust's web UI on a free port."""
    port = free_port()
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", target,
            "--web-host", "127.0.0.1", "--web-port", str(port), "--model", "linear",
            "--seq-lens", "32,64",
        ],
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: get(f"{address}/"), process)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=15)
        log.close()


def test_web_ui_shows_options_rows_and_server_timings(web_ui: str) -> None:
    page = get(f"{web_ui}/")
    for option in ("seq_lens", "tokens_model", "variant", "32,64", "Server timings"):
        assert option in page
    form = {
        "user_count": 2,
        "spawn_rate": 2,
        "model": "quadratic",
        "seq_lens": "16,128",
        "tokens_model": "tokens",
        "tokens_seq_lens": "8",
    }
    answer = json.loads(get(f"{web_ui}/swarm", form))
    assert answer["success"], answer
    wanted = {"quadratic/fused/seq_len=16", "quadratic/fused/seq_len=128", "tokens/fused/seq_len=8"}

    def rows() -> Any:
        found = json.loads(get(f"{web_ui}/stats/requests"))
        names = {row["name"] for row in found["stats"]}
        return found if wanted <= names else None

    found = until(rows)
    (extended,) = found["extended_stats"]
    timings = {row["name"]: row for row in extended["data"]}
    assert timings["quadratic/fused/seq_len=128"]["compute_ms"] == pytest.approx(6, abs=0.01)
    for row in timings.values():
        parts = [row[f"{name}_ms"] for name in PARTS]
        assert sum(parts) == pytest.approx(row["end_to_end_ms"], abs=0.005)
        assert min(parts) > 0
    assert json.loads(get(f"{web_ui}/stop", {}))["success"]
    table = list(csv.DictReader(get(f"{web_ui}/attnserve/timings.csv").splitlines()))
    assert wanted <= {row["name"] for row in table}
    assert len(json.loads(get(f"{web_ui}/attnserve/timings.json"))) == len(table)


def get(address: str, form: dict[str, Any] | None = None) -> str:
    data = None if form is None else urllib.parse.urlencode(form).encode()
    with urllib.request.urlopen(address, data, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def until(check: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    deadline = time.monotonic() + 20
    while True:
        try:
            found = check()
        except OSError:
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, "nothing in time"
        assert process is None or process.poll() is None, "ended early"
        time.sleep(0.1)


def test_a_class_that_is_but_imported_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from attnserve_loadtest.users import AttendTokensUser, AttendUser\n\n\n"
        "class Mine(AttendUser):\n    weight = 3\n"
    )
    command = [sys.executable, "-m", "locust", "-f", str(tmp_path / "mine.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "Mine"
    assert "AttendUser" not in done.stdout
