"""benchmarks/dataplane.py: its client and its echo agree; its shortest section gives figures."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from handmade import attention, write_core

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _missing() -> bool:
    if not shutil.which("pkg-config") or not shutil.which("g++"):
        return True
    found = subprocess.run(["pkg-config", "--exists", "grpc++", "libnghttp2"])
    return found.returncode != 0


pytestmark = pytest.mark.skipif(_missing(), reason="needs g++, libgrpc++-dev and libnghttp2-dev")


def test_the_client_counts_what_the_echo_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    native = runpy.run_path(str(BENCHMARKS / "dataplane_native.py"))
    with native["echo"](2) as echo, native["loads"]() as loads:
        closed = loads.closed(echo, 16, 2, 0.5)
        opened = loads.open(echo, 16, 50.0, 1.0, 5.0)
    assert closed["statuses"].keys() == {"0"}
    assert closed["goodput"] == pytest.approx(closed["offered"])
    assert 0 < closed["answers"]["p50_ms"] <= closed["answers"]["p99_ms"]
    assert closed["refusals"]["p50_ms"] != closed["refusals"]["p50_ms"]  # NaN: there are none
    # Poisson: a standard deviation is the root of the expected count.
    assert opened["statuses"]["0"] == pytest.approx(50, abs=6 * 50**0.5)
    assert opened["first_ms"] > 0


def test_idle_connections(tmp_path: Path) -> None:
    write_core(tmp_path, "causal", attention(8, 64, mask="causal"))
    report = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / "dataplane.py", "--quick", "--repository", tmp_path]
    command += ["--sections", "connections", "--json", report]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(report.read_text())["sections"]["connections"]["rows"]
    assert row["connections"] == 1000
    assert row["grown_MB"] < 100
