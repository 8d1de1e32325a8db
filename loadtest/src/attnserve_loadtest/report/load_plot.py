"""The figures of a load report."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from attnserve_loadtest.report import palette
from attnserve_loadtest.report.load_schema import LoadReport, Step
from attnserve_loadtest.report.load_text import shown_knee, title
from attnserve_loadtest.report.plot import STYLE
from attnserve_loadtest.report.schema import Distribution


def write_load_png(report: LoadReport, path: Path) -> None:
    """Both figures in one PNG file, light."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 9), dpi=150, layout="constrained", facecolor=palette.PAPER)
        upper, lower = figure.subplots(2, 1, height_ratios=(1.7, 1), sharex=True)
        _draw_latency(upper, report)
        _draw_throughput(lower, report)
        upper.tick_params(labelbottom=True)
        figure.savefig(path, metadata={"Title": title(report)})


def latency_figure(report: LoadReport) -> Figure:
    """Latency over the load, with the knee and the bounds."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.4), layout="constrained")
        _draw_latency(figure.subplots(), report)
    return figure


def throughput_figure(report: LoadReport) -> Figure:
    """Answers and good answers over the load."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        _draw_throughput(figure.subplots(), report)
    return figure


def _draw_latency(axes: Axes, report: LoadReport) -> None:
    lines = (("first", "time to first output"), ("between", "between tokens"))
    for index, (quantity, name) in enumerate(lines):
        colour, marker = palette.series_style(index)
        steps = [step for step in report.steps if getattr(step, quantity) is not None]
        if not steps:
            continue
        loads = [step.load for step in steps]
        for statistic, style, width in (("p50", "-", 2.0), ("p99", (0, (4, 2)), 1.6)):
            axes.plot(
                loads,
                [_figure_of(step, quantity, statistic) for step in steps],
                color=colour,
                marker=marker,
                ms=5,
                lw=width,
                ls=style,
                mfc=colour if statistic == "p50" else palette.PAPER,
                label=f"{name}, {statistic}",
            )
    for index, bound in enumerate(report.settings.slo):
        milliseconds = float(bound.rpartition("=")[2].removesuffix("ms"))
        colour, _ = palette.series_style(index + 3)
        axes.axhline(milliseconds, color=colour, lw=1.2, ls=":", label=f"bound {bound}")
    found = report.capacity
    if (knee := shown_knee(report)) is not None:
        axes.axvline(report.steps[knee].load, color=palette.MUTED, lw=1.4, label="knee")
    if found.best is not None and found.best != knee:
        best = report.steps[found.best].load
        axes.axvline(best, color=palette.MUTED, lw=1.4, ls="--", label="most that was kept up with")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("milliseconds (log scale)")
    _label_loads(axes, report)
    axes.set_title(title(report), loc="left", weight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def _draw_throughput(axes: Axes, report: LoadReport) -> None:
    loads = [step.load for step in report.steps]
    if report.settings.arrivals != "closed":
        axes.plot(loads, loads, color=palette.MUTED, lw=1, ls=":", label="all that is offered")
    for index, (quantity, name) in enumerate((("throughput", "answers"), ("goodput", "good"))):
        colour, marker = palette.series_style(index)
        values = [getattr(step, quantity) for step in report.steps]
        style = "--" if index else "-"
        axes.plot(loads, values, color=colour, marker=marker, ms=5, lw=1.8, ls=style, label=name)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("answers/s")
    _label_loads(axes, report)
    axes.set_title("Throughput and goodput", loc="left", weight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)


def _figure_of(step: Step, quantity: str, statistic: str) -> float:
    values: Distribution = getattr(step, quantity)
    return float(getattr(values, statistic))


def _label_loads(axes: Axes, report: LoadReport) -> None:
    loads = np.array([step.load for step in report.steps])
    if len(loads) > 1 and loads.min() > 0 and loads.max() / loads.min() > 8:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    closed = report.settings.arrivals == "closed"
    axes.set_xlabel("callers" if closed else "requests offered a second")
    axes.grid(visible=True, axis="both")
    axes.set_axisbelow(True)
