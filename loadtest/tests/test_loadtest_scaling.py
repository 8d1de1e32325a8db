"""Real Locust over real gRPC, against a server whose truth is known."""

import csv
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from attnserve_loadtest.fitting import fit_power_law

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    command = [sys.executable, str(HERE / "fake_attention_server.py")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        assert server.stdin is not None
        server.stdin.close()


def scaling(target: str, out: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [str(BIN / "attnserve-loadtest"), "scaling", "--target", target, "--out", str(out)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def report(target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    lengths = ("--seq-lens", "64,128,256,512", "--requests", "10")
    done = scaling(target, out, "--model", "quadratic,linear", "--variant", "fused", *lengths)
    assert done.returncode == 0, done.stderr
    return out


def test_the_exponents_of_the_server_are_found(report: Path) -> None:
    series = {s["model"]: s for s in json.loads((report / "report.json").read_text())["series"]}
    for model, truth in (("quadratic", 2.0), ("linear", 1.0)):
        fits = {fit["quantity"]: fit for fit in series[model]["fits"]}
        compute = fits["compute"]
        assert compute["exponent"] == pytest.approx(truth, abs=0.15)
        assert compute["low"] <= compute["exponent"] <= compute["high"]


def test_one_row_per_length_in_every_file(report: Path) -> None:
    rows = list(csv.DictReader((report / "report.csv").open()))
    assert {(row["model"], row["seq_len"]) for row in rows} == {
        (model, length)
        for model in ("quadratic", "linear")
        for length in ("64", "128", "256", "512")
    }
    assert all(int(row["count"]) == 10 for row in rows)
    assert (report / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_needs_nothing_from_outside(report: Path) -> None:
    text = (report / "report.html").read_text()
    HTMLParser().feed(text)
    loads = re.findall(r"""(?:src|href)=["']([^"'#]+)""", text)
    assert all(url.startswith("data:") for url in loads), loads
    assert not re.search(r"@import|url\(\s*['\"]?http", text)


def test_a_report_can_be_drawn_again(report: Path, tmp_path: Path) -> None:
    command = [str(BIN / "attnserve-loadtest"), "report", str(report / "report.json")]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "report.csv").read_text() == (report / "report.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "none", "--seq-lens", "64"), "none"),
        (("--model", "tokens", "--seq-lens", "64,1024"), "512"),
        (("--model", "quadratic", "--seq-lens", "0"), "--seq-lens"),
        (("--model", "broken", "--seq-lens", "64", "--requests", "3"), "RESOURCE_EXHAUSTED"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    target: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = scaling(target, tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_no_server_is_said_in_a_line(tmp_path: Path) -> None:
    done = scaling("127.0.0.1:1", tmp_path, "--model", "causal", "--seq-lens", "64")
    assert done.returncode == 1
    assert "no server answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_locusts_web_ui_shows_a_row_per_length(target: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(BIN / "locust"), "-f", str(HERE.parent / "locustfile.py"), "--host", target]
    command += ["--web-host", "127.0.0.1", "--web-port", str(port), "--autostart", "-u", "2"]
    command += ["--model", "quadratic", "--seq-lens", "64,128", "-t", "20s", "--autoquit", "1"]
    page = f"http://127.0.0.1:{port}"
    locust = subprocess.Popen(command, stdout=-3, stderr=-3)
    try:
        names: set[str] = set()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and len(names) < 3:
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"{page}/stats/requests", timeout=5) as answer:
                    names = {row["name"] for row in json.load(answer)["stats"]}
            except OSError:
                continue
        assert {"quadratic/fused/seq_len=64", "quadratic/fused/seq_len=128"} <= names
        with urllib.request.urlopen(page, timeout=5) as answer:
            assert b"Locust" in answer.read()
    finally:
        locust.terminate()
        locust.wait(timeout=20)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    lengths = [64, 128, 256, 512, 1024]
    covered = 0
    for _ in range(300):
        noise = np.exp(0.1 * generator.standard_normal(len(lengths)))
        fit = fit_power_law("compute", lengths, list(0.01 * np.array(lengths) ** 1.7 * noise))
        assert fit is not None
        covered += fit.low <= 1.7 <= fit.high
    assert 0.90 <= covered / 300 <= 0.985
