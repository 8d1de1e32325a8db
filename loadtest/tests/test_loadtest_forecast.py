"""Forecasts of what was not measured, and how far they go."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from attnserve_loadtest.cli import main
from attnserve_loadtest.forecast import Forecaster
from attnserve_loadtest.report.files import write_report
from attnserve_loadtest.report.schema import Report
from attnserve_loadtest.summary import LengthResult, Slice, summarise_series
from hypothesis import given
from hypothesis import strategies as st
from loadtest_reports import MODEL, report_of, samples_of

LENGTHS = [64 << n for n in range(7)]  # up to 4096


def curve(n: float, constant: float = 0.2, linear: float = 1e-3, quadratic: float = 2e-6) -> float:
    return constant + linear * n + quadratic * n**2


@given(
    constant=st.floats(0, 10), linear=st.floats(0, 0.01), quadratic=st.floats(1e-7, 1e-4),
)  # fmt: skip
def test_a_curve_without_noise_is_foretold(
    constant: float, linear: float, quadratic: float
) -> None:
    medians = [curve(n, constant, linear, quadratic) for n in LENGTHS]
    forecaster = Forecaster(LENGTHS, medians)
    # Four lengths are the least that is fitted; two trials, up to twice as far: 4 times.
    assert forecaster.farthest == 4 * 4096
    for n in (100, 4096, 8192, 16384):
        found = forecaster.at(n)
        assert found is not None
        assert found.milliseconds == pytest.approx(curve(n, constant, linear, quadratic), rel=1e-3)
        assert found.low <= found.milliseconds <= found.high
    assert forecaster.at(20_000) is forecaster.at(63) is None


@pytest.mark.parametrize(("seq_len", "noise"), [(6000, 0.03), (8192, 0.03), (700, 0.05)])
def test_intervals_cover_what_is_true(seq_len: int, noise: float) -> None:
    """Of 300 noisy runs about 95% must; a standard deviation of that is 1.3%."""
    random = np.random.default_rng(3)
    covered = given_at_all = 0
    for _ in range(300):
        medians = [curve(n) * math.exp(noise * random.standard_normal()) for n in LENGTHS]
        found = Forecaster(LENGTHS, medians).at(seq_len)
        if found is not None:
            given_at_all += 1
            covered += found.low <= curve(seq_len) <= found.high
    assert given_at_all > 150
    assert covered / given_at_all > 0.91


def test_a_curve_that_turned_is_not_trusted_far() -> None:
    """Flat up to 1024, steep from there: the shorter lengths foretold the longer ones badly."""
    medians = [1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 30.0]
    forecaster = Forecaster(LENGTHS, medians)
    assert forecaster.at(8192) is None
    assert forecaster.farthest == 4096


def test_four_lengths_are_too_few() -> None:
    with pytest.raises(ValueError, match="needs 5 or more"):
        Forecaster(LENGTHS[:4], [1.0, 2.0, 3.0, 4.0])


def scaling(lengths: list[int]) -> Report:
    results = [LengthResult(n, 8 * n, (Slice(0, 1.0, samples_of(n, curve(n))),)) for n in lengths]
    return report_of(lengths, [summarise_series(MODEL, "fused", results, 1)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(scaling(LENGTHS), tmp_path)
    report = str(tmp_path / "report.json")
    options = ["forecast", report, "--out", str(tmp_path / "forecast")]
    assert main([*options, "--seq-lens", "3000,8192,100000", "--price-per-hour", "3.6"]) == 0
    said = capsys.readouterr().out
    assert "end to end at 8192" in said
    assert "2 times beyond the longest measured" in said
    assert "between measured lengths" in said
    assert "no forecast for 100000" in said
    found = json.loads((tmp_path / "forecast/forecast.json").read_text())
    line = found["lines"][0]
    assert line["quantity"] == "end_to_end"
    assert [each["seq_len"] for each in line["forecasts"]] == [3000, 8192]
    assert line["refused"] == [100000]
    whole = curve(8192)
    assert line["forecasts"][1]["milliseconds"] == pytest.approx(whole, rel=0.01)
    # 3.6 an hour are 0.001 a second; 8192 tokens take `whole` milliseconds.
    assert line["cost_per_million_tokens"][1] == pytest.approx(whole * 1e-6 / 8192 * 1e6, rel=0.01)
    assert (tmp_path / "forecast/forecast.png").read_bytes().startswith(b"\x89PNG")
    assert main([*options, "--seq-lens", "100000"]) == 1
    assert "has been seen to bear 64..16384" in capsys.readouterr().err
    write_report(scaling(LENGTHS[:3]), tmp_path)
    assert main([*options, "--seq-lens", "300"]) == 1
    assert "needs 5 or more" in capsys.readouterr().err
