"""The report of a simulation: `simulation.json`, `.csv`, `.png` and `.html`, and its table."""

import csv
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from attnserve_loadtest.report import page, palette
from attnserve_loadtest.report.files import write_files
from attnserve_loadtest.report.json_file import write_json
from attnserve_loadtest.report.plot import STYLE
from attnserve_loadtest.report.schema import Distribution
from attnserve_loadtest.report.simulation_schema import SimulationReport, Size
from attnserve_loadtest.report.svg import inline_svg
from attnserve_loadtest.report.terminal import counted, format_ms, make_console

_COLUMNS = (
    "servers", "goodput/s", "good", "first p50 ms", "p99 ms", "between p50 ms", "p99 ms", "busy",
    "prefixes found", "bounds",
)  # fmt: skip
_FACTS = (
    "servers", "throughput", "goodput", "good", "context_tokens_per_second", "meets", "busy",
    "found", "seconds", "cost_per_million_tokens",
)  # fmt: skip
_STATISTICS = ("mean", "minimum", "p5", "p50", "p95", "p99", "maximum")


def finish(report: SimulationReport, folder: Path) -> None:
    """Write the files, print the table and where they are.

    Raises:
        LoadTestError: a file cannot be written.
    """
    writers = {
        "simulation.json": write_json,
        "simulation.csv": _write_csv,
        "simulation.png": _write_png,
        "simulation.html": _write_html,
    }
    paths = write_files(report, folder, writers)
    _print(report, make_console())
    for path in paths:
        print(path)


def findings(report: SimulationReport) -> list[str]:
    """What a reader wants to know first."""
    found = [
        f"simulated, not measured: {counted(report.requests, 'request')} in "
        f"{report.seconds:.0f} s, by service times of {report.source} ({report.model})"
    ]
    if report.slo and report.fewest is None:
        found.append(f"none of these sizes meets {', '.join(report.slo)}")
    elif report.fewest is not None:
        size = next(each for each in report.sizes if each.servers == report.fewest)
        found.append(
            f"the fewest servers tried that meet {', '.join(report.slo)}: {report.fewest}, goodput "
            f"{size.goodput:,.1f} answers/s"
        )
        if size.cost_per_million_tokens is not None:
            found.append(
                f"a million tokens of context cost {size.cost_per_million_tokens:.4g} there, at "
                f"{report.price_per_hour:g} an hour for each server"
            )
    if report.beyond:
        found.append(
            f"{report.beyond:.1%} of the requests are longer than what the service times were "
            "fitted to"
        )
    return found


def _print(report: SimulationReport, console: Console) -> None:
    table = Table(box=None, title=_title(report), title_justify="left")
    for heading in _COLUMNS:
        table.add_column(heading, justify="right")
    for size in report.sizes:
        table.add_row(*_cells(size))
    console.print()
    console.print(table)
    console.print()
    for sentence in findings(report):
        console.print(f"- {sentence}", markup=False, soft_wrap=True)


def _title(report: SimulationReport) -> str:
    return f"Simulated cluster: {report.trace}"


def _cells(size: Size) -> list[str]:
    return [
        str(size.servers),
        f"{size.goodput:,.2f}",
        f"{size.good:.1%}",
        *_ms(size.first),
        *_ms(size.between),
        f"{size.busy:.1%}",
        f"{size.found:.1%}",
        {True: "met", False: "missed", None: "-"}[size.meets],
    ]


def _ms(values: Distribution | None) -> Sequence[str]:
    return ("-", "-") if values is None else (format_ms(values.p50), format_ms(values.p99))


def _write_csv(report: SimulationReport, path: Path) -> None:
    names = ("first", "between")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*_FACTS, *(f"{name}_{each}_ms" for name in names for each in _STATISTICS)])
        for size in report.sizes:
            row = [getattr(size, fact) for fact in _FACTS]
            for name in names:
                values = getattr(size, name)
                row += [values and getattr(values, each) for each in _STATISTICS]
            writer.writerow(["" if value is None else value for value in row])


def _write_png(report: SimulationReport, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 8), dpi=150, layout="constrained", facecolor=palette.PAPER)
        upper, lower = figure.subplots(2, 1, sharex=True)
        _draw_goodput(upper, report)
        _draw_latency(lower, report)
        figure.savefig(path, metadata={"Title": _title(report)})


def _figure(report: SimulationReport) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        _draw_goodput(upper, report)
        _draw_latency(lower, report)
    return figure


def _draw_goodput(axes: Axes, report: SimulationReport) -> None:
    servers = [size.servers for size in report.sizes]
    offered = report.requests / (report.seconds or 1.0)
    colour, marker = palette.series_style(0)
    axes.axhline(offered, color=palette.MUTED, lw=1, ls=":", label="all that comes")
    goodput = [size.goodput for size in report.sizes]
    axes.plot(servers, goodput, color=colour, marker=marker, lw=2, label="goodput")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("good answers/s")
    axes.set_title(f"{_title(report)} (simulated, not measured)", loc="left", weight="bold")
    _finish_axes(axes, servers)


def _draw_latency(axes: Axes, report: SimulationReport) -> None:
    servers = [size.servers for size in report.sizes]
    for index, (quantity, name) in enumerate(
        (("first", "time to first output"), ("between", "between tokens"))
    ):
        colour, marker = palette.series_style(index)
        values = [getattr(size, quantity) for size in report.sizes]
        if any(value is None for value in values):
            continue
        for statistic, style in (("p50", "-"), ("p99", (0, (4, 2)))):
            axes.plot(
                servers,
                [getattr(value, statistic) for value in values],
                color=colour,
                marker=marker,
                ms=5,
                lw=1.8,
                ls=style,
                mfc=colour if statistic == "p50" else palette.PAPER,
                label=f"{name}, {statistic}",
            )
    for index, bound in enumerate(report.slo):
        colour, _ = palette.series_style(index + 3)
        milliseconds = float(bound.rpartition("=")[2].removesuffix("ms"))
        axes.axhline(milliseconds, color=colour, lw=1.2, ls=":", label=f"bound {bound}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("milliseconds (log scale)")
    axes.set_xlabel("servers")
    _finish_axes(axes, servers)


def _finish_axes(axes: Axes, servers: Sequence[int]) -> None:
    if len(servers) > 1 and np.max(servers) / np.min(servers) > 8:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, axis="both")
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def _write_html(report: SimulationReport, path: Path) -> None:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(report))
    figure = inline_svg(
        _figure(report),
        name="simulation",
        title=_title(report),
        description=" ".join(findings(report)) + " The table below holds all figures.",
    )
    rows = [page.row(_cells(size)) for size in report.sizes]
    facts = {
        "Trace": f"{report.trace}, {counted(report.requests, 'request')}, {report.speed:g} times "
        f"as fast, lengths times {report.length_scale:g}",
        "Service times": f"{report.source}, model {report.model}",
        "Prefixes": f"{report.prefix_tokens} tokens kept by each server",
        "Date": report.date,
        "Seed": str(report.seed),
    }
    method = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    sections = [
        f"<ul>{items}</ul>",
        f'<figure tabindex="0">{figure}</figure>',
        page.table(page.head(_COLUMNS), rows, "By number of servers; simulated"),
        f"<section><h2>How it was simulated</h2>\n<dl>{method}</dl>\n<p>Each server computes one "
        "run at a time: a chunk of 512 tokens of a prompt, or the next token of all sessions that "
        "wait for theirs. A run takes what the service times say, and between two runs of a "
        "session lies what was measured beside computing. Each request goes to the less busy of "
        "two servers drawn at random. Memory and refusals are left out.</p></section>",
    ]
    path.write_text(page.page(_title(report), sections), "utf-8")
