"""`report.csv`: one row for each series and length, milliseconds."""

import csv
from pathlib import Path

from attnserve_loadtest.report.schema import PARTS, Distribution, Point, Report, Series

_DISTRIBUTIONS = ("end_to_end", *PARTS)
_STATISTICS = ("mean", "minimum", "p5", "p50", "p95", "p99", "maximum")
_FACTS = (
    "seq_len",
    "count",
    "failures",
    "measured_seconds",
    "requests_per_second",
    "tokens_per_second",
    "overlapping",
    "batch_size",
    "request_bytes",
    "response_bytes",
)


def write_csv(report: Report, path: Path) -> None:
    """Write the points of all series; an empty field is a figure that was not measured."""
    columns = ["series", "model", "version", "variant", *_FACTS]
    columns += [f"{name}_{each}_ms" for name in _DISTRIBUTIONS for each in _STATISTICS]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(_row(series, point) for series in report.series for point in series.points)


def _row(series: Series, point: Point) -> list[object]:
    row: list[object] = [series.label, series.model, series.version, "+".join(series.variants_run)]
    row += [getattr(point, fact) for fact in _FACTS]
    for name in _DISTRIBUTIONS:
        distribution: Distribution | None = getattr(point, name)
        row += [distribution and getattr(distribution, each) for each in _STATISTICS]
    return ["" if value is None else value for value in row]
