"""benchmarks/serving.py from end to end, tiny: every section gives sane figures; none is timed."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import attention, write_core

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the benchmark would export."""
    folder = tmp_path_factory.mktemp("serving")
    write_core(folder, "causal", attention(8, 64, mask="causal", alignment="bottom-right"))
    return folder


@pytest.mark.slow
def test_all_sections(repository: Path, tmp_path: Path) -> None:
    report, tables, plots = tmp_path / "s.json", tmp_path / "s.md", tmp_path / "plots"
    command = [sys.executable, BENCHMARKS / "serving.py", "--quick", "--repository", repository]
    command += ["--venvs", tmp_path, "--json", report, "--markdown", tables, "--plots", plots]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    assert figures["failed"] == {}
    sections = figures["sections"]
    assert list(sections) == ["floor", "shared-memory", "stored", "callers", "peers", "overload"]
    for name, section in sections.items():
        assert section["rows"], name
        for bar in section["bars"]:
            within = (
                bar["value"] >= bar["bound"] if bar["at_least"] else bar["value"] <= bar["bound"]
            )
            assert bar["met"] == within
            assert bar["text"] in tables.read_text()
    _check_latency(sections)
    _check_load(sections)
    assert {p.name for p in plots.iterdir()} == {"latency-32.png", "requests-by-peer.png"}


def _check_latency(sections: dict[str, Any]) -> None:
    for row in sections["floor"]["rows"]:
        assert row["request_bytes"] == 3 * 8 * row["seq_len"] * 64 * 4
        assert min(value for name, value in row.items() if name.endswith("_ms")) > 0
        # Medians over three rounds of noise: `test_ratios_...` has them exactly.
        assert 0.1 < row["unary_ratio"] / (row["unary_ms"] / row["floor_ms"]) < 10
    assert len(sections["floor"]["bars"]) == 4
    for row in sections["shared-memory"]["rows"]:
        assert row["shared_ratio"] > 0
    assert len(sections["shared-memory"]["bars"]) == 4
    (stored,) = sections["stored"]["rows"]
    assert stored["in_process_ms"] > 0
    assert stored["ratio"] > 0


def test_ratios_are_of_calls_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    latency = runpy.run_path(str(BENCHMARKS / "serving_latency.py"))
    times = {
        "unary": np.array([3.0, 40.0, 9.0]),
        "streamed": np.array([6.0, 20.0, 12.0]),
        "in_process": np.array([1.0, 15.0, 2.0]),
        "echo_unary": np.array([1.0, 5.0, 1.0]),
        "echo_stream": np.array([9.0, 2.0, 2.0]),
    }
    row = latency["over_floor"](times)
    # The quicker echo is the unary one: the floors are 2, 20 and 3 s.
    assert row["floor_ms"] == pytest.approx(3000)
    assert row["unary_ratio"] == pytest.approx(2)  # of 1.5, 2 and 3
    assert row["streamed_ratio"] == pytest.approx(3)  # of 3, 1 and 4
    assert row["unary_p99_ms"] == pytest.approx(1e3 * np.quantile(times["unary"], 0.99))


def _check_load(sections: dict[str, Any]) -> None:
    both = {(row["protocol"], row["contender"]) for row in sections["callers"]["rows"]}
    assert both == {(p, c) for p in ("sdk", "message") for c in ("batched", "unbatched")}
    peers = sections["peers"]
    assert {row["contender"] for row in peers["rows"]} == {
        "attnserve",
        "attnserve, same file",
        "attnserve, sdk",
    }
    for name in ("kserve", "mlserver", "pytriton"):
        assert any(note.startswith(f"{name}: not measured") for note in peers["notes"])
    for row in [*sections["callers"]["rows"], *peers["rows"]]:
        assert row["failed"] == 0, row["failure"]
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["p99.9_ms"]
        assert row["requests/s"] > 0
        assert row["server_cores"] > 0
        assert row["client_cores"] > 0
    for row in sections["overload"]["rows"]:
        ended = row["answered"] + row["refused"] + row["failed"]
        assert row["answered"] > 0
        assert row["memory_MiB"] > 10
        if row["load"] != "closed":
            # Poisson arrivals over 1 s: a standard deviation is the root of the expected count.
            assert ended == pytest.approx(row["offered/s"], abs=6 * row["offered/s"] ** 0.5)
