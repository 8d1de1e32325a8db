"""The benchmarks of faults, each for a moment."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import attention, write_core

FAULTS = Path(__file__).parents[1] / "benchmarks/faults"


def run(name: str, tmp_path: Path, *options: str, codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """The figures of one, which found nothing wrong."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(FAULTS / f"{name}.py"), "--json", str(figures), *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode in codes, ran.stdout + ran.stderr
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


@pytest.mark.slow
def test_what_it_costs_to_be_watched(tmp_path: Path) -> None:
    options = ("--rounds", "2", "--calls", "3000")
    figures = run("overhead", tmp_path, *options, codes=(0, 1))["overhead"]  # the bar is not here
    assert figures["parts"] == "identity+metrics+traces"
    assert figures["plain_per_second"] > 0
    assert figures["watched_per_second"] > 0
    # 9,000 calls, of which 1 % have nine spans each, or a little fewer.
    assert 9000 * 0.01 * 0.4 < figures["spans"] / 8 < 9000 * 0.01 * 2
    assert figures["scrapes"] >= 1


def test_messages_that_are_nearly_right_are_answered_or_refused(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    write_core(repository, "causal", attention(4, 8, mask="causal"))
    options = ("--messages", "3000", "--seed", "7", "--repository", str(repository))
    figures = run("messages", tmp_path, *options, "--faults", str(tmp_path / "faults"))
    kinds = ("crash", "hang", "internal", "wrong status")
    assert [figures[kind] for kind in kinds] == [0, 0, 0, 0]
    assert figures["messages"] >= 3000
    rows = {row["method"]: row for row in figures["methods"]}
    for method in ("Attend", "AttendStream", "Decode", "ModelInfer", "ModelStreamInfer"):
        assert rows[method]["OK"] > 0
        assert rows[method]["unreadable"] > 0


def test_what_is_wrong_with_a_message_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (FAULTS.parent, FAULTS):
        monkeypatch.syspath_prepend(str(folder))
    import messages_calls as calls
    import messages_seeds as seeds
    from messages_connection import Answer

    kept = seeds.Kept((), (), "a", "b")
    methods = {method.name: method for method in seeds.methods(kept)}
    unreadable = "message: given bytes that are not the request of Attend (...)"

    def kind(code: int, text: str = "", *, sort: str = "changed", at: tuple[int, ...] = (),
             method: str = "Attend") -> str | None:  # fmt: skip
        sent = calls.Sent(methods[method], sort, b"", 1, at, 0.0)
        found = calls.judged(sent, Answer(code, text, b""))
        return None if found is None else found[0]

    assert kind(calls.OK) is None
    assert kind(calls.INVALID_ARGUMENT, "query: ...") is None
    assert kind(calls.INVALID_ARGUMENT, unreadable, at=(0,)) is None
    assert kind(calls.INTERNAL, sort="framed") is None
    assert kind(calls.INVALID_ARGUMENT, unreadable) == "wrong status"
    assert kind(calls.OK, at=(0,)) == "wrong status"
    assert kind(calls.OK, at=(3,), method="Decode") == "wrong status"
    assert kind(calls.INVALID_ARGUMENT, "query: ...", at=(0,)) == "wrong status"
    assert kind(calls.INVALID_ARGUMENT, "query: ...", sort="valid") == "wrong status"
    assert kind(calls.INTERNAL) == "internal"
    assert kind(-1, "RST_STREAM 2", sort="framed") == "wrong status"
    assert kind(calls.OK, at=(1,), method="ModelStreamInfer") == "wrong status"


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
