"""benchmarks/cluster.py from end to end, quick: figures are sane; what must not happen does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from handmade import attention, write_core

BENCHMARK = Path(__file__).parents[1] / "benchmarks/cluster.py"


@pytest.mark.slow
def test_all_sections(tmp_path: Path) -> None:
    report = tmp_path / "cluster.json"
    repository = tmp_path / "models"
    for name, num_heads in (("whole", 8), ("half", 4)):
        write_core(repository, name, attention(num_heads, 64, mask="causal"))
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(report)]
    command += ["--repository", str(repository)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["failed"] == {}
    sections = found["sections"]
    assert list(sections) == ["goodput", "shards", "kills"]
    one, three = sections["goodput"]["rows"]
    assert (one["servers"], three["servers"]) == (1, 3)
    assert 0 < one["goodput/s"] < three["goodput/s"]
    assert all(row["step, ms"] > 0 for row in sections["shards"]["rows"])
    bars = {bar["text"]: bar["value"] for bar in sections["kills"]["bars"]}
    assert bars["calls lost"] == bars["calls wrong"] == 0
    assert bars["sessions wrong without an error"] == 0
    assert all(row["serves again"] for row in sections["kills"]["rows"])
