"""Writes a load report: `load.json`, `.csv`, `.png` and `.html`."""

import csv
from pathlib import Path

from attnserve_loadtest.report.files import write_files
from attnserve_loadtest.report.json_file import write_json
from attnserve_loadtest.report.load_html import write_load_html
from attnserve_loadtest.report.load_plot import write_load_png
from attnserve_loadtest.report.load_schema import LoadReport, Step
from attnserve_loadtest.report.load_text import print_load
from attnserve_loadtest.report.terminal import make_console

_FACTS = (
    "load", "offered", "callers", "seconds", "due", "answered", "refused", "failed", "cancelled",
    "throughput", "goodput", "context_tokens_per_second", "keeps_up", "client_cores",
)  # fmt: skip
_DISTRIBUTIONS = ("latency", "first", "between", "late")
_STATISTICS = ("mean", "minimum", "p5", "p50", "p95", "p99", "maximum")


def write_load_report(report: LoadReport, folder: Path) -> list[Path]:
    """Write all files, JSON first.

    Raises:
        LoadTestError: a file cannot be written.
    """
    writers = {
        "load.json": write_json,
        "load.csv": _write_csv,
        "load.png": write_load_png,
        "load.html": write_load_html,
    }
    return write_files(report, folder, writers)


def finish(report: LoadReport, folder: Path) -> None:
    """Write the files, print the table and where they are."""
    paths = write_load_report(report, folder)
    print_load(report, make_console())
    for path in paths:
        print(path)


def _write_csv(report: LoadReport, path: Path) -> None:
    """One row for each load; an empty field is a figure that was not measured."""
    columns = [*_FACTS, *(f"{name}_{each}_ms" for name in _DISTRIBUTIONS for each in _STATISTICS)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(_row(step) for step in report.steps)


def _row(step: Step) -> list[object]:
    row = [getattr(step, fact) for fact in _FACTS]
    for name in _DISTRIBUTIONS:
        values = getattr(step, name)
        row += [values and getattr(values, each) for each in _STATISTICS]
    return ["" if value is None else value for value in row]
