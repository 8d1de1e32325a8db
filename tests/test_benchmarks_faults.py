"""The benchmarks of faults, each for a moment."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FAULTS = Path(__file__).parents[1] / "benchmarks/faults"


def run(name: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    """The figures of one, which found nothing wrong."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(FAULTS / f"{name}.py"), "--json", str(figures), *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    read: dict[str, Any] = json.loads(figures.read_text())
    return read


@pytest.mark.slow
def test_models_come_and_go_under_load(tmp_path: Path) -> None:
    figures = run("models", tmp_path, "--seconds", "3")
    assert figures["wrong"] == figures["internal"] == 0
    assert len(figures["changed"]) == 9
    kinds = set(figures["calls"]["by_kind"])
    models = ("steady", "replaced", "gone")
    called = {f"{kind} {model}" for kind in ("attend", "stream") for model in models}
    assert kinds == {"session", "stored"} | called


@pytest.mark.slow
def test_a_server_starts_again_under_load(tmp_path: Path) -> None:
    figures = run("restarts", tmp_path, "--terminated", "2", "--killed", "2")
    assert [row["restarts"] for row in figures["restarts"]] == [2, 2]
    for row in figures["restarts"]:
        assert row["lost_or_wrong"] == 0
        assert row["answered"] > 50


@pytest.mark.slow
def test_sessions_outlive_all_of_their_servers(tmp_path: Path) -> None:
    options = ("--sessions", "20", "--callers", "4", "--settle", "0.3")
    figures = run("rolling", tmp_path, *options)
    assert len(figures["restarts"]) == figures["servers"] == 3
    assert figures["lost"] == figures["wrong"] == 0
    assert figures["tokens"] > 100


@pytest.mark.slow
def test_nothing_is_left_after_load(tmp_path: Path) -> None:
    figures = run("soak", tmp_path, "--minutes", "0.1")
    assert figures["answered"] > 50
    assert set(figures["left"].values()) == {0}
    assert len(figures["samples"]) >= 4


def test_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (FAULTS.parent, FAULTS):  # as the scripts have them
        monkeypatch.syspath_prepend(str(folder))
    import mixed

    tally = mixed.Tally()
    case = mixed.make_cases()[-1]
    tally.answer("x", case.causal.astype(np.float32), case.causal)
    tally.refuse("x", "UNAVAILABLE", ("UNAVAILABLE",))
    assert tally.wrong == []
    nearly = case.causal.copy()
    nearly[0, 0, 3, 5] += 1e-3
    for output in (nearly, case.bidirectional, case.causal[:, 1:], None, case.causal * np.nan):
        tally.answer("x", output, case.causal)
    tally.refuse("x", "INTERNAL", ("UNAVAILABLE",))
    tally.refuse("x", "UNAVAILABLE", ())
    assert len(tally.wrong) == 7
