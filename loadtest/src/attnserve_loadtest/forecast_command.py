"""The command `attnserve-loadtest forecast`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from attnserve_proto.commands import Loading, values

from attnserve_loadtest import parsing
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.forecast import CONFIDENCE, Forecast, Forecaster
from attnserve_loadtest.report.schema import Report, Series


@dataclass(frozen=True)
class Line:
    """The forecasts of one quantity of one series.

    Attributes:
        series: its label.
        quantity: `end_to_end` or `compute`.
        seq_lens, medians_ms: what was measured.
        farthest: the longest length that the fit bears.
        forecasts: of the lengths asked for that it bears.
        refused: lengths asked for that it does not.
        cost_per_million_tokens: of each forecast, of end to end alone; none without a price.
    """

    series: str
    quantity: str
    seq_lens: tuple[int, ...]
    medians_ms: tuple[float, ...]
    farthest: int
    forecasts: tuple[Forecast, ...]
    refused: tuple[int, ...]
    cost_per_million_tokens: tuple[float, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Foretells what lengths would take that were not measured, each with its interval, from a "
        "report.json of `scaling`; never beyond what its fit has been seen to bear. Writes "
        "forecast.json and .png."
    )
    parser.add_argument("json", type=values.path, metavar="report.json")
    add = parser.add_argument
    add("--seq-lens", type=parsing.seq_lens, required=True, metavar="N,N,...", help="to foretell")
    add(
        "--price-per-hour",
        type=parsing.positive_float,
        metavar="PRICE",
        help="of the server: then what a million tokens of context cost at that length",
    )
    add("--out", type=values.path, default=Path("reports/forecast"), metavar="DIR")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LoadTestError: it cannot go on, or the fit bears none of the lengths.
    """
    with Loading():
        from attnserve_loadtest.report.files import write_files
        from attnserve_loadtest.report.json_file import read_json

    report = read_json(parsed.json)
    if not isinstance(report, Report):
        raise LoadTestError(f"{parsed.json} is not a report of `attnserve-loadtest scaling`")
    lines = forecast_lines(report, parsed.seq_lens, parsed.price_per_hour)
    if not any(line.forecasts for line in lines):
        raise LoadTestError("; ".join(dict.fromkeys(map(_refusal, lines))))
    paths = write_files(
        lines, parsed.out, {"forecast.json": _write_json, "forecast.png": _write_png}
    )
    for line in lines:
        for sentence in sentences(line):
            print(f"- {sentence}")
    for path in paths:
        print(path)
    return 0


def forecast_lines(
    report: Report, seq_lens: Sequence[int], price_per_hour: float | None
) -> list[Line]:
    """The forecasts of all series.

    Args:
        report: of `scaling`.
        seq_lens: lengths asked for.
        price_per_hour: of the server; None: not given.

    Raises:
        LoadTestError: a series has too few lengths.
    """
    return [
        _line(report, series, quantity, seq_lens, price_per_hour)
        for series in report.series
        for quantity in ("end_to_end", "compute")
    ]


def sentences(line: Line) -> list[str]:
    """The forecasts in words."""
    name = f"{line.series}, {line.quantity.replace('_', ' ')}"
    found = []
    for number, each in enumerate(line.forecasts):
        where = (
            "between measured lengths"
            if each.reach <= 1
            else f"{each.reach:.3g} times beyond the longest measured"
        )
        cost = ""
        if line.cost_per_million_tokens:
            cost = f"; a million tokens cost {line.cost_per_million_tokens[number]:.4g}"
        found.append(
            f"{name} at {each.seq_len}: {_ms(each.milliseconds)} ms, {CONFIDENCE:.0%} interval "
            f"{_ms(each.low)} to {_ms(each.high)} ({where}; {each.trials} trials){cost}"
        )
    if line.refused:
        found.append(_refusal(line))
    return found


def _line(
    report: Report,
    series: Series,
    quantity: str,
    seq_lens: Sequence[int],
    price_per_hour: float | None,
) -> Line:
    points = [
        (point.seq_len, values.p50)
        for point in series.points
        if (values := getattr(point, quantity)) is not None and values.p50 > 0
    ]
    try:
        forecaster = Forecaster([n for n, _ in points], [t for _, t in points])
    except ValueError as error:
        raise LoadTestError(f"{series.label}: {error}") from None
    found = {n: forecaster.at(n) for n in seq_lens}
    forecasts = tuple(each for each in found.values() if each is not None)
    settings = report.settings
    costs: tuple[float, ...] = ()
    if price_per_hour is not None and quantity == "end_to_end":
        under_way = settings.users * settings.batch
        costs = tuple(
            price_per_hour / 3600 / (under_way * each.seq_len / each.milliseconds * 1e3) * 1e6
            for each in forecasts
        )
    return Line(
        series.label,
        quantity,
        tuple(n for n, _ in points),
        tuple(t for _, t in points),
        forecaster.farthest,
        forecasts,
        tuple(n for n, each in found.items() if each is None),
        costs,
    )


def _refusal(line: Line) -> str:
    lengths = ", ".join(map(str, line.refused))
    return (
        f"{line.series}, {line.quantity.replace('_', ' ')}: no forecast for {lengths}; the fit has "
        f"been seen to bear {line.seq_lens[0]}..{line.farthest}"
    )


def _ms(milliseconds: float) -> str:
    from attnserve_loadtest.report.terminal import format_ms

    return format_ms(milliseconds)


def _write_json(lines: list[Line], path: Path) -> None:
    content = {
        "schema": "attnserve-loadtest/forecast",
        "schema_version": 1,
        "lines": [asdict(line) for line in lines],
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")


def _write_png(lines: list[Line], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from attnserve_loadtest.report import palette
    from attnserve_loadtest.report.plot import STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6), dpi=150, layout="constrained", facecolor=palette.PAPER)
        axes = figure.subplots()
        for index, line in enumerate(lines):
            colour, marker = palette.series_style(index)
            name = f"{line.series}, {line.quantity.replace('_', ' ')}"
            axes.plot(
                line.seq_lens, line.medians_ms, color=colour, marker=marker, lw=1.8, label=name
            )
            middle = [each.milliseconds for each in line.forecasts]
            axes.errorbar(
                [each.seq_len for each in line.forecasts],
                middle,
                yerr=(
                    [each.milliseconds - each.low for each in line.forecasts],
                    [each.high - each.milliseconds for each in line.forecasts],
                ),
                color=colour,
                marker=marker,
                mfc=palette.PAPER,
                ls="none",
                capsize=5,
                label=f"{name}: forecast and its interval",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("seq_len (log scale)")
        axes.set_ylabel("milliseconds, p50 (log scale)")
        axes.grid(visible=True)
        axes.set_title("Lengths that were not measured", loc="left", weight="bold")
        axes.legend(frameon=False)
        figure.savefig(path)
