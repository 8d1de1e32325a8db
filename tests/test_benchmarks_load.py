"""benchmarks/load.py from end to end, quick: its figures are sane; none is held to its bar."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks/load.py"


@pytest.mark.slow
def test_all_sections(tmp_path: Path) -> None:
    report = tmp_path / "load.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["failed"] == {}
    sections = found["sections"]
    assert list(sections) == ["arrivals", "pause", "simulation"]
    for row in sections["arrivals"]["rows"]:
        assert row["answered"] == row["due"] == pytest.approx(4000, abs=6 * 4000**0.5)
        assert 0 < row["late_p50_ms"] <= row["late_p99_ms"]
        assert row["client_cores"] > 0
    opened, closed = sections["pause"]["rows"]
    assert opened["p99_ms"] > 900
    assert closed["p99_ms"] < opened["p99_ms"]
    sizes = sections["simulation"]["rows"]
    assert [row["servers"] for row in sizes] == [2, 3, 5, 10, 20, 30, 50, 100]
    # More servers are less busy, and answer more in time.
    assert [row["busy"] for row in sizes] == sorted((row["busy"] for row in sizes), reverse=True)
    assert sizes[-1]["good"] > sizes[0]["good"]
