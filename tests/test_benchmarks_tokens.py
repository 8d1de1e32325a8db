"""benchmarks/tokens.py from end to end at a small size: all contenders and figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).parents[1] / "benchmarks/tokens.py"


def test_all_contenders(tmp_path: Path) -> None:
    report = tmp_path / "tokens.json"
    sizes = ["--rounds", "2", "--batch", "2", "--seq-len", "9"]
    done = subprocess.run(
        [sys.executable, BENCHMARK, *sizes, "--json", report], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    contenders = [row["contender"] for row in figures["hidden_states"]]
    assert {"attend_tokens", "plain onnxruntime", "torch eager", "torch sdpa"} <= set(contenders)
    assert all(row["median_ms"] > 0 for row in figures["hidden_states"] + figures["weights"])
    assert set(figures["results"]) == set(figures["bars"])
    assert done.stdout.count("bar: ") == 3
