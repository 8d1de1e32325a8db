"""Two reports against each other: what is a difference, and what is noise."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from attnserve_loadtest.cli import main
from attnserve_loadtest.comparison import Pair, compare, compare_pair
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.report.files import write_report
from attnserve_loadtest.report.json_file import read_json
from attnserve_loadtest.report.schema import Report
from attnserve_loadtest.summary import LengthResult, Slice, summarise_series
from handmade import attention, write_core
from hypothesis import given
from hypothesis import strategies as st
from loadtest_reports import MODEL, report_of, samples_of
from serving import process

LENGTHS = [64, 128, 256, 512]


def noisy(
    seed: int, factor: float = 1.0, noise: float = 0.03, rounds: int = 6, variant: str = "fused"
) -> Report:
    random = np.random.default_rng(seed)
    results = [
        LengthResult(
            n,
            8 * n,
            tuple(
                Slice(r, 1.0, samples_of(n, n / 64 * factor * math.exp(noise * z)))
                for r, z in enumerate(random.standard_normal(rounds))
            ),
        )
        for n in LENGTHS
    ]
    return report_of(LENGTHS, [summarise_series(MODEL, variant, results, 1)])


def test_noise_is_called_noise() -> None:
    """Of 100 pairs of equal reports, 5% may differ somewhere; a standard deviation is 2.2%."""
    wrong = sum(
        any(each.verdict != "no difference beyond noise" for each in compare(*pair))
        for pair in ((noisy(2 * n), noisy(2 * n + 1)) for n in range(100))
    )
    assert wrong / 100 < 0.13


@pytest.mark.parametrize(("factor", "verdict"), [(0.8, "faster"), (1.25, "slower")])
def test_a_difference_is_found_with_its_size(factor: float, verdict: str) -> None:
    found = compare(noisy(1), noisy(2, factor))
    assert [each.verdict for each in found] == [verdict] * 4
    for each in found:
        assert each.low < factor < each.high or each.ratio == pytest.approx(factor, rel=0.05)
        assert each.low < each.ratio < each.high
        assert each.second / each.first == pytest.approx(each.ratio)


@given(
    first=st.lists(st.floats(0.1, 100), min_size=3, max_size=9),
    second=st.lists(st.floats(0.1, 100), min_size=3, max_size=9),
)
def test_the_other_way_round_says_the_opposite(first: list[float], second: list[float]) -> None:
    forth = compare_pair(Pair("", tuple(first), tuple(second)), 0.95)
    back = compare_pair(Pair("", tuple(second), tuple(first)), 0.95)
    assert forth.ratio == pytest.approx(1 / back.ratio)
    assert forth.low == pytest.approx(1 / back.high)
    opposite = {"faster": "slower", "slower": "faster"}
    assert back.verdict == opposite.get(forth.verdict, forth.verdict)
    # More answers a second are faster, more milliseconds are slower.
    rates = compare_pair(Pair("", tuple(first), tuple(second), "answers/s"), 0.95)
    assert rates.verdict == opposite.get(forth.verdict, forth.verdict)


def test_what_has_nothing_in_common_is_refused() -> None:
    with pytest.raises(LoadTestError, match="no figure in common"):
        compare(noisy(1), noisy(2, variant="reference"))
    with pytest.raises(LoadTestError, match="three rounds"):
        compare(noisy(1, rounds=2), noisy(2, rounds=2))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, factor in (("a", 1.0), ("b", 0.7)):
        write_report(noisy(len(name), factor), tmp_path / name)
    paths = [str(tmp_path / name / "report.json") for name in "ab"]
    out = tmp_path / "comparison"
    assert main(["compare", *paths, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "B is faster in 4 of 4 figures" in said
    found = json.loads((out / "comparison.json").read_text())
    assert [each["verdict"] for each in found["compared"]] == ["faster"] * 4
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", paths[0], paths[0], "--out", str(out)]) == 0
    assert "no figure differs beyond noise" in capsys.readouterr().out
    assert main(["compare", paths[0], str(tmp_path / "nosuch"), "--out", str(out)]) == 1
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.needs_library
def test_loads_of_a_real_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer requests take longer, and that is seen; scaling and load do not mix."""
    write_core(tmp_path / "models", "llama", attention(4, 16, mask="causal"))
    with process(tmp_path / "models") as server:
        for name, seq_len in (("short", "16"), ("long", "2048")):
            options = ["load", "--target", server.address, "--model", "llama", "--seq-lens"]
            options += [seq_len, "--rates", "30", "--duration", "1.5", "--warmup", "0.3"]
            assert main([*options, "--out", str(tmp_path / name)]) == 0
    short, long = (read_json(tmp_path / name / "load.json") for name in ("short", "long"))
    p50 = compare(short, long)[0]
    assert p50.what.endswith("first output p50")
    assert p50.ratio > 1.5
    assert p50.verdict == "slower"
    with pytest.raises(LoadTestError, match="one is a report of `scaling`"):
        compare(short, noisy(1))
