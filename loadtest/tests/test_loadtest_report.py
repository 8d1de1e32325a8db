import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from attnserve_client import Timings
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.fitting import fit_power_law
from attnserve_loadtest.report.files import write_report
from attnserve_loadtest.report.json_file import read_json
from attnserve_loadtest.report.schema import (
    PARTS,
    SCHEMA,
    SCHEMA_VERSION,
    Client,
    FailureCount,
    Report,
    Series,
    Server,
    Settings,
)
from attnserve_loadtest.report.terminal import format_ms, make_console, print_report
from attnserve_loadtest.samples import Failure, Sample
from attnserve_loadtest.summary import LengthResult, Slice, summarise_length

LENGTHS = (64, 128, 256, 512)


def series(label: str, exponent: float) -> Series:
    def samples(seq_len: int) -> tuple[Sample, ...]:
        compute_us = 500 * (seq_len / 64) ** exponent
        answered = [
            Sample(
                "Attend",
                "m",
                "fused",
                seq_len,
                compute_us + 321.5 + extra,
                4096,
                Timings(20, 30, round(compute_us), 10, 1),
            )
            for extra in (0, 10, 20, 30, 400)
        ]
        failed = Sample("Attend", "m", "fused", seq_len, 1.0, failure=Failure("INTERNAL", "<no> &"))
        return (*answered, failed)

    points = tuple(
        summarise_length(LengthResult(n, 8192, (Slice(0, 0.25, samples(n)),)), batch=1)
        for n in LENGTHS
    )
    fits = tuple(
        fit_power_law(name, LENGTHS, [getattr(point, name).p50 for point in points])
        for name in ("end_to_end", "compute")
    )
    return Series(
        label=label,
        model="m<&>",
        version="1",
        kind="core",
        variant="fused",
        variants_run=("fused",),
        dtype="FP32",
        mask="causal",
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        embed_dim=0,
        points=points,
        fits=tuple(fit for fit in fits if fit is not None),
        failures=(FailureCount("INTERNAL", 4, "<no> &"),),
    )


@pytest.fixture
def report() -> Report:
    return Report(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        date="2030-01-02T03:04:05+00:00",
        complete=True,
        drift=1.02,
        server=Server("127.0.0.1:8001", "0.1.0", "1.31.1", ("CPUExecutionProvider",)),
        client=Client("0.1.0", "0.1.0", "1.85.3", "2.47.0", "2.4.6", "3.11.7", "Linux x86_64", 2),
        settings=Settings(seq_lens=LENGTHS),
        series=(series("m/fused <&>", 2.0), series("m/other", 1.0)),
    )


@pytest.fixture
def folder(report: Report, tmp_path: Path) -> Path:
    write_report(report, tmp_path)
    return tmp_path


def test_json_reads_back_as_the_same_report(report: Report, folder: Path) -> None:
    assert read_json(folder / "report.json") == report


def test_csv_has_the_figures_of_the_json(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "report.csv").open()))
    content = json.loads((folder / "report.json").read_text())
    points = [(each["label"], point) for each in content["series"] for point in each["points"]]
    assert len(rows) == len(points) == 8
    for row, (label, point) in zip(rows, points, strict=True):
        assert row["series"] == label
        assert int(row["seq_len"]) == point["seq_len"]
        assert int(row["failures"]) == point["failures"] == 1
        for name in ("end_to_end", *PARTS):
            for statistic, value in point[name].items():
                assert float(row[f"{name}_{statistic}_ms"]) == value


def test_html_has_the_figures_of_the_report(report: Report, folder: Path) -> None:
    page = page_tree(folder)
    cells = {"".join(cell.itertext()) for tag in ("td", "th") for cell in page.iter(tag)}
    for each in report.series:
        for point in each.points:
            assert point.end_to_end is not None
            assert point.wire is not None
            figures = [point.end_to_end.p50, point.end_to_end.p99, point.wire.mean]
            assert {format_ms(figure) for figure in figures} <= cells
        assert {f"{fit.exponent:.2f}" for fit in each.fits} <= cells


def test_html_is_well_formed_and_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = page_tree(folder)
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert "://" not in text
    assert not re.search(r"<(script|link|img|iframe)\b|@import", text)
    targets = re.findall(r'href="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert {target.lstrip("#") for target in targets} <= set(ids)


def test_html_figures_have_text_alternatives_and_colours_of_the_page(folder: Path) -> None:
    page = page_tree(folder)
    figures = list(page.iter("svg"))
    assert len(figures) == 3
    texts = {each.get("id"): each.text for each in page.iter() if each.tag in ("title", "desc")}
    for figure in figures:
        assert figure.get("role") == "img"
        named = (figure.get("aria-labelledby") or "").split()
        assert len(named) == 2
        assert all(texts[name] for name in named)
        assert "var(--series-1)" in ElementTree.tostring(figure, "unicode")
    assert page.get("lang") == "en"
    assert all(table.find("caption") is not None for table in page.iter("table"))


def test_colours_have_contrast_in_light_and_dark() -> None:
    from attnserve_loadtest.report import palette

    for paper, texts, lines in (
        (palette.PAPER, (palette.INK, palette.MUTED), palette.LIGHT),
        (palette.DARK_PAPER, (palette.DARK_INK, palette.DARK_MUTED), palette.DARK),
    ):
        assert all(contrast(colour, paper) >= 4.5 for colour in texts)
        assert all(contrast(colour, paper) >= 3 for colour in lines)


def test_png_is_a_picture(folder: Path) -> None:
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_run_says_so(report: Report, tmp_path: Path) -> None:
    write_report(replace(report, complete=False), tmp_path)
    assert "interrupted" in (tmp_path / "report.html").read_text()


def test_lengths_without_answers_do_not_break_the_report(report: Report, tmp_path: Path) -> None:
    empty = summarise_length(LengthResult(64, 8192, ()), batch=1)
    one = replace(report.series[0], points=(empty, report.series[0].points[1]), fits=())
    write_report(replace(report, series=(one,), drift=None), tmp_path)
    assert "there is no exponent" in (tmp_path / "report.html").read_text()
    print_report(read_json(tmp_path / "report.json"), make_console())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a report"),
        ('{"schema": "else"}', "is not a report"),
        (f'{{"schema": "{SCHEMA}", "schema_version": 99}}', "schema version 99"),
        (f'{{"schema": "{SCHEMA}", "schema_version": 1}}', "schema version 1; this program"),
        (f'{{"schema": "{SCHEMA}", "schema_version": {SCHEMA_VERSION}}}', "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(LoadTestError, match=message):
        read_json(path)


def page_tree(folder: Path) -> ElementTree.Element:
    text = (folder / "report.html").read_text()
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
