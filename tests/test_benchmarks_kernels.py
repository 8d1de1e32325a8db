"""benchmarks/kernels.py from end to end at small lengths: all sections, figures and plots."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from handmade import attention, write_core

pytestmark = pytest.mark.needs_library
BENCHMARK = Path(__file__).parents[1] / "benchmarks/kernels.py"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """All models but one, which the benchmark exports."""
    for mask in ("causal", "bidirectional", "cross"):
        write_core(tmp_path, f"m-mask-{mask}-8-8-64", attention(8, 64, mask=mask))
    windowed = attention(8, 64, mask="causal", window=256)
    write_core(tmp_path, "m-mask-causal-window-256-8-8-64", windowed)
    grouped = attention(32, 128, num_kv_heads=8, mask="causal")
    write_core(tmp_path, "m-mask-causal-32-8-128", grouped)
    return tmp_path


@pytest.mark.slow
def test_all_sections_and_plots(models: Path, tmp_path: Path) -> None:
    report, plots = tmp_path / "kernels.json", tmp_path / "plots"
    command = [sys.executable, BENCHMARK, "--quick", "--models", models]
    done = subprocess.run(
        [*command, "--json", report, "--plots", plots], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exporting ") == 1
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
    ways = {row["contender"] for row in timed if row["section"] == "packed causal"}
    assert ways == {"packed", "one by one", "padded", "torch, padded"}
    assert done.stdout.count("by the scores that it computes") == 2 * len(ways)
    for row in timed:
        if row["section"].startswith("packed"):
            assert (row["scores_ratio"] > 1) == ("padded" in row["contender"])
    assert {"no mask", "mask [1, 1, n, n]"} <= {
        r["contender"] for r in timed if r["section"] == "masks"
    }
    for section in ("sinks causal", "sinks bidirectional"):
        ways = {row["contender"] for row in timed if row["section"] == section}
        assert ways == {"plain", "sinks", "log-sum-exp", "sinks and log-sum-exp"}
    chunked = {r["contender"] for r in timed if r["section"] == "prefix, chunks"}
    assert {"causal", "prefix of 16", "chunks of 256"} <= chunked
    assert "causal, native" not in figures["exponents"]  # two lengths say nothing
    assert figures["exponents"]["window 256, native"] > 0
    made = {path.stem for path in plots.glob("*.png")}
    assert {"causal", "bidirectional", "window-256", "memory-causal"} <= made


@pytest.mark.parametrize("causal", [False, True])
def test_scores_are_counted_pair_by_pair(causal: bool) -> None:
    lengths = np.random.default_rng().integers(1, 40, 9)
    longest = int(lengths.max())
    queries, keys = np.arange(longest)[:, None], np.arange(longest)
    seen = (keys <= queries) if causal else np.ones((longest, longest), bool)
    scores_computed = runpy.run_path(str(BENCHMARK.with_name("kernels_masks.py")))[
        "scores_computed"
    ]
    found = scores_computed(lengths, causal=causal)
    assert found["padded"] == sum((seen & (keys < n)).sum() for n in lengths)
    own = sum((seen & (keys < n) & (queries < n)).sum() for n in lengths)
    assert found["packed"] == found["one by one"] == own
    assert found["torch, padded"] == 9 * longest**2
