"""benchmarks/kernels.py from end to end at small lengths: all sections, figures and plots."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs_library
BENCHMARK = Path(__file__).parents[1] / "benchmarks/kernels.py"


def test_all_sections_and_plots(tmp_path: Path) -> None:
    report, plots = tmp_path / "kernels.json", tmp_path / "plots"
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--quick", "--json", report, "--plots", plots],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    assert figures["machine"]["cores"] >= 1
    assert not figures["idle_threads_spin"]
    rows = figures["rows"]
    timed = [row for row in rows if "milliseconds" in row]
    expected = {"torch", "native", "fused", "blocked", "reference"}
    for section in ("causal", "bidirectional", "grouped", "cross", "one query", "one grouped"):
        own = [row for row in timed if row["section"] == section]
        assert {row["contender"] for row in own} == expected, section
        for row in own:
            assert row["baseline"] == "torch"
            assert row["milliseconds"] > 0
            assert row["rounds"] >= 3
            assert (row["ratio"] == 1) == (row["contender"] == "torch")
    windowed = [row for row in timed if row["section"] == "window 256"]
    assert {row["query_len"] for row in windowed} == {128, 256, 512}
    assert {row["contender"] for row in windowed} == (expected - {"torch"}) | {"torch mask"}
    for section in ("memory causal", "memory window"):
        grown = {r["contender"]: r["bytes"] for r in rows if r["section"] == section}
        assert grown["reference"] > grown["blocked"] > grown["native"] >= 0
    assert "causal, native" not in figures["exponents"]  # two lengths say nothing
    assert figures["exponents"]["window 256, native"] > 0
    made = {path.stem for path in plots.glob("*.png")}
    assert {"causal", "bidirectional", "window-256", "memory-causal"} <= made
