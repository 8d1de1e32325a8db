"""The GPU acceptance, as far as a machine without a GPU can show it."""

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from handmade import attention, write_core

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_acceptance.py"
SECTIONS = ("models", "availability", "correctness", "speed", "exponents", "memory", "kernels")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("gpu_acceptance", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        # Data classes look their module up by name.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("acceptance")
    path = folder / "figures.json"
    # All models but one, which the script exports.
    windowed = attention(2, 16, mask="causal", window=32)
    write_core(folder, "causal_window_fp32", windowed)
    grouped = attention(2, 16, num_kv_heads=1)
    write_core(folder, "gqa_bidirectional_fp16", grouped, dtype="FP16")
    options = ("--transformer-seconds", "0")  # they have a test of their own
    done = run("--dry-run", "--json", path, "--models", folder, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not a GPU figure" in done.stdout
    return json.loads(path.read_text())


def test_a_dry_run_fills_every_section(figures: dict[str, Any]) -> None:
    assert figures["dry_run"] is True
    assert figures["device"] == "CPU (dry run: not a GPU figure)"
    assert figures["finished"] is True
    assert figures["passed"] is True
    for section in SECTIONS:
        assert figures[section], section
    for name in ("torch", "onnxruntime"):
        assert figures[name]


def test_a_dry_run_is_correct(figures: dict[str, Any]) -> None:
    for row in figures["correctness"]:
        assert row["ok"], row
        assert row["max_abs_error"] <= row["tolerance"]
    cases = {row["case"] for row in figures["correctness"]}
    assert cases >= {"one", "odd", "ragged", "no key", "fewer queries", "more queries", "large"}


def test_a_dry_run_times_each_model_with_pytorch_and_fits_exponents(
    figures: dict[str, Any],
) -> None:
    exported = {row["model"] for row in figures["models"] if row["reason"] is None}
    for model in exported:
        contenders = {row["contender"] for row in figures["speed"] if row["model"] == model}
        assert contenders > {"torch_default"}
        fitted = {row["contender"] for row in figures["exponents"] if row["model"] == model}
        assert fitted == contenders
    for row in figures["speed"]:
        assert row["median_ms"] > 0
        assert row["tflops"] > 0
        assert "over_torch_default" in row or row["contender"] == "torch_default"
    for row in figures["exponents"]:
        # At these lengths, on a busy machine, it may be any number.
        assert math.isfinite(row["exponent"])


def test_nodes_of_every_timed_variant_are_named(figures: dict[str, Any]) -> None:
    for row in figures["kernels"]:
        assert all(node.endswith("(CPU)") for node in row["nodes"])
        assert row["nodes"]


def test_a_spent_budget_is_said_and_is_no_success(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    budgets = ("--budget-seconds", "0", "--transformer-seconds", "0")
    done = run("--dry-run", *budgets, "--json", path)
    assert done.returncode == 1
    assert any("budget spent" in note for note in json.loads(path.read_text())["notes"])


@pytest.mark.slow
def test_transformers_are_right_and_timed_beside_pytorch(
    script: ModuleType, tmp_path: Path
) -> None:
    report = script.Report(None, time.monotonic() + 600)
    report.figures = {"passed": True, "notes": [], "transformers": []}
    with torch.inference_mode():
        script.examine_transformers(script.DRY_PLAN, script._target(True), tmp_path, report)
    rows = report.figures["transformers"]
    assert report.figures["passed"], (rows, report.figures["notes"])
    right = {row["variant"]: row for row in rows if row["what"] == "hidden states"}
    # The CPU runs the very graph for CUDA, in FP16.
    assert set(right) == {"fused", "native", "half"}
    assert all(row["max_abs_error"] <= row["tolerance"] for row in right.values())
    timed = [row["variant"] for row in rows if "median_ms" in row]
    assert sorted(set(timed)) == ["fused", "half", "native", "torch_sdpa"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no usable GPU" in done.stderr
    assert done.stdout == ""


def test_the_comparison_can_fail(script: ModuleType) -> None:
    expected = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    assert script.compare(expected.float(), expected, 1e-6).ok
    output = expected.float()
    output[0, 1, 3, 7] += 1e-3
    result = script.compare(output, expected, 1e-4)
    assert not result.ok
    assert result.max_abs_error == pytest.approx(1e-3, rel=1e-3)
    output[0, 1, 3, 7] = torch.nan
    assert not script.compare(output, expected, 1e9).ok
    output[0, 1, 3, 7] = torch.inf
    assert not script.compare(output, expected, 1e9).ok


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
@pytest.mark.parametrize("window", [None, 3])
def test_its_reference_is_pytorchs_attention_with_the_mask(
    script: ModuleType, mask: str, window: int | None
) -> None:
    right = None if window is None or mask == "causal" else window - 1
    attention = {"mask": mask, "window": window, "window_right": right, "scale": 0.3}
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 11, 8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([11, 0])
    rows = torch.tensor([0, 4, 8])
    output, _ = script.reference(attention, query, key, value, lengths, rows)
    i, j = torch.arange(9)[:, None], torch.arange(11)[None, :]
    seen = torch.ones(9, 11, dtype=torch.bool)
    if mask == "causal":
        seen &= j <= i
    if window is not None:
        seen &= (i - j).abs() < window
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:1], key[:1], value[:1], attn_mask=seen, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(output[:1], expected[:, :, rows])
    assert (output[1] == 0).all()


def test_operations_are_those_of_the_pairs_that_count(script: ModuleType) -> None:
    attention = {"mask": "causal", "num_heads": 2, "head_dim": 4, "value_head_dim": 4}
    assert script.operations(attention, 8, 1) == 4 * 2 * 8 * 8 * 4 / 2
    assert script.operations({**attention, "mask": "bidirectional"}, 8, 1) == 4 * 2 * 8 * 8 * 4
    # Of 8 queries the first sees one key, the others two.
    assert script.operations({**attention, "window": 2}, 8, 1) == 4 * 2 * 15 * 4


def test_the_recorded_figures_can_be_drawn(tmp_path: Path) -> None:
    script = SCRIPT.with_name("gpu_plots.py")
    recorded = SCRIPT.parents[1] / "docs/kernels/gpu-h100.json"
    assert json.loads(recorded.read_text())["passed"]
    subprocess.run([sys.executable, script, recorded, tmp_path], check=True)
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
