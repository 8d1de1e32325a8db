"""Real Locust, real gRPC, against a server whose compute grows as a known power of seq_len."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attnserve_loadtest.report.schema import PARTS

Run = Callable[..., subprocess.CompletedProcess[str]]


def read(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def parts(point: Any) -> list[float]:
    return [point[name]["mean"] for name in PARTS]


def fits(series: Any) -> dict[str, Any]:
    return {fit["quantity"]: fit for fit in series["fits"]}


def test_known_exponents_are_found_for_models_and_variants(
    target: str, loadtest: Run, tmp_path: Path
) -> None:
    done = loadtest(
        "scaling", "--target", target, "--model", "quadratic,linear", "--variant",
        "fused,reference", "--seq-lens", "128,256,512", "--requests", "10", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read(tmp_path)
    assert report["complete"]
    labels = [series["label"] for series in report["series"]]
    assert labels == ["quadratic/fused", "quadratic/reference", "linear/fused", "linear/reference"]
    for series in report["series"]:
        truth = 2 if series["model"] == "quadratic" else 1
        found = fits(series)
        assert found["compute"]["exponent"] == pytest.approx(truth, abs=0.01)
        # The way there and back adds some milliseconds, more on a busy machine.
        assert truth - 0.45 <= found["end_to_end"]["exponent"] <= truth + 0.15
        for point in series["points"]:
            assert (point["count"], point["failures"]) == (10, 0)
            assert len(point["round_p50_ms"]) == 5
            assert sum(parts(point)) == pytest.approx(point["end_to_end"]["mean"])
            assert point["overlapping"] == 0
            assert point["queue"]["p50"] == pytest.approx(0.03)
            assert point["compute"]["p50"] < point["end_to_end"]["p50"]
    assert report["server"]["version"] == "0.0.fake"
    assert "compute ~ seq_len^2.00" in done.stdout
    assert str(tmp_path / "report.html") in done.stdout
    assert "round 5/5" in done.stderr
    for name in ("report.csv", "report.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 1000


def test_transformer_with_users_batch_and_duration(
    target: str, loadtest: Run, tmp_path: Path
) -> None:
    done = loadtest(
        "scaling", "--target", target, "--model", "tokens", "--seq-lens", "64,128,256",
        "--duration", "0.6", "--rounds", "2", "--users", "3", "--batch", "2", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (series,) = read(tmp_path)["series"]
    assert series["kind"] == "transformer"
    assert series["label"] == "tokens/fused"
    assert fits(series)["compute"]["exponent"] == pytest.approx(2, abs=0.01)
    for point in series["points"]:
        assert point["measured_seconds"] == pytest.approx(0.6, abs=0.25)
        assert point["batch_size"] == 2
        assert point["response_bytes"] == 2 * point["seq_len"] * 8 * 4
        per_second = point["requests_per_second"]
        assert point["tokens_per_second"] == pytest.approx(per_second * 2 * point["seq_len"])
        # Three users at once: more than one could do.
        assert per_second > 1.5e3 / point["end_to_end"]["mean"]


def test_requests_too_large_for_one_message_go_over_a_stream(
    target: str, loadtest: Run, tmp_path: Path
) -> None:
    done = loadtest(
        "scaling", "--target", target, "--model", "linear", "--seq-lens", "4096,16384",
        "--requests", "2", "--rounds", "1", "--warmup", "0", "--settle", "0", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (series,) = read(tmp_path)["series"]
    assert [point["response_bytes"] for point in series["points"]] == [131072, 524288]


def test_timings_that_overlap_are_in_no_part_of_the_report(
    target: str, loadtest: Run, tmp_path: Path
) -> None:
    """As of a server that sums the waits of a request's heads, each in its own queue."""
    done = loadtest(
        "scaling", "--target", target, "--model", "overlapping", "--seq-lens", "128,256,512",
        "--requests", "12", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (series,) = read(tmp_path)["series"]
    for point in series["points"]:
        assert point["count"] == 12
        assert 2 <= point["overlapping"] <= 10  # every second, those to warm up included
        assert point["end_to_end"]["mean"] > 1
        for name in PARTS:
            assert point[name]["minimum"] >= 0
            assert point[name]["maximum"] <= point["end_to_end"]["maximum"]
        assert point["compute"]["p50"] == pytest.approx(1.5 * point["seq_len"] / 64)
    count = sum(point["overlapping"] for point in series["points"])
    expected = f"{count} answers are not in deserialize, queue, compute, serialize, wire"
    assert expected in " ".join(done.stdout.split())
    assert expected in (tmp_path / "report.html").read_text()


def test_failures_are_counted_by_status_and_kept_out_of_the_latencies(
    target: str, loadtest: Run, tmp_path: Path
) -> None:
    done = loadtest(
        "scaling", "--target", target, "--model", "flaky", "--seq-lens", "64,128",
        "--requests", "30", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (series,) = read(tmp_path)["series"]
    (failure,) = series["failures"]
    assert (failure["code"], failure["message"]) == ("INTERNAL", "fault on purpose")
    assert failure["count"] == sum(point["failures"] for point in series["points"]) > 10
    assert all(point["count"] + point["failures"] == 30 for point in series["points"])
    assert all(point["end_to_end"]["minimum"] > 1 for point in series["points"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nosuch"], "model: 'nosuch' is not served"),
        (["--model", "linear", "--variant", "nope"], "it has: fused, reference"),
        (["--model", "tokens", "--seq-lens", "512,1024"], "seq_len 1024 is over the max_seq_len"),
        (
            ["--model", "broken", "--seq-lens", "8"],
            "requests failed; the first: RESOURCE_EXHAUSTED",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_a_status(
    target: str, loadtest: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = loadtest("scaling", "--target", target, "--out", tmp_path, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("attnserve-loadtest: ")]
    assert len(errors) == 1
    assert not (tmp_path / "report.json").exists()


def test_unreachable_server_is_one_line_and_a_status(loadtest: Run, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        done = loadtest(
            "scaling", "--target", f"127.0.0.1:{port}", "--model", "m", "--timeout", "1",
            "--out", tmp_path,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"no server answers at 127.0.0.1:{port}" in done.stderr


def test_this_host_is_measured_without_the_environments_proxy(
    target: str, loadtest: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    done = loadtest(
        "scaling", "--target", target, "--model", "linear", "--seq-lens", "8,16",
        "--requests", "2", "--rounds", "1", "--timeout", "5", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (series,) = read(tmp_path)["series"]
    assert [point["failures"] for point in series["points"]] == [0, 0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["scaling"],
        ["scaling", "--model", "m", "--seq-lens", "0"],
        ["scaling", "--model", "m", "--requests", "5", "--duration", "5"],
        ["scaling", "--model", "m", "--target", "nowhere"],
        [],
    ],
)
def test_bad_arguments_are_refused(loadtest: Run, arguments: list[str]) -> None:
    done = loadtest(*arguments)
    assert done.returncode == 2
    [said] = done.stderr.splitlines()
    assert said.startswith("attnserve-loadtest")
    assert said.endswith("--help`")


def test_folder_that_cannot_be_made_is_refused_before_measuring(
    target: str, loadtest: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = loadtest(
        "scaling", "--target", target, "--model", "linear", "--out", tmp_path / "file" / "x"
    )
    assert done.returncode == 2
    assert f"--out: given {tmp_path / 'file' / 'x'}: Not a directory" in done.stderr


def test_report_is_drawn_again_from_json(target: str, loadtest: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    loadtest(
        "scaling", "--target", target, "--model", "linear", "--seq-lens", "8,16",
        "--requests", "2", "--out", first,
    )  # fmt: skip
    done = loadtest("report", first / "report.json", "--out", second)
    assert done.returncode == 0, done.stderr
    for name in ("report.json", "report.csv", "report.html"):
        assert (first / name).read_text() == (second / name).read_text()
    missing = loadtest("report", tmp_path / "none.json")
    assert missing.returncode == 1
    assert missing.stderr.startswith("attnserve-loadtest: cannot read")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interruption_writes_what_was_measured(
    target: str, tmp_path: Path, stop: signal.Signals
) -> None:
    process = subprocess.Popen(
        [
            sys.executable, "-m", "attnserve_loadtest", "scaling", "--target", target, "--model",
            "quadratic", "--seq-lens", "32,64", "--requests", "100000", "--rounds", "1000",
            "--out", str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "round 1/" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(stop)
    started = time.monotonic()
    out, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in out
    report = read(tmp_path)
    assert report["complete"] is False
    assert all(point["count"] > 0 for point in report["series"][0]["points"])


def test_terminal_shows_live_progress_and_the_table(target: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "attnserve_loadtest", "scaling", "--target", target, "--model",
            "linear", "--seq-lens", "64,128", "--requests", "100", "--out", str(tmp_path),
        ],
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "150"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(timeout=10) == 0
    text = shown.decode()
    assert "round 1/5" in text or "round 2/5" in text
    assert "p50 ms" in text
    assert "compute ~ seq_len^1.00" in text
