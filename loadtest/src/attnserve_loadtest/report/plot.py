"""The figures of a report, drawn with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from attnserve_loadtest.report import palette
from attnserve_loadtest.report.schema import Fit, Point, Report, Series

matplotlib.use("Agg")

# Of all figures of reports.
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": palette.MUTED,
    "axes.labelcolor": palette.INK,
    "text.color": palette.INK,
    "xtick.color": palette.MUTED,
    "ytick.color": palette.MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": palette.GRID,
    "grid.linewidth": 0.8,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
}
# From the bottom up, with their opacity.
_PARTS = (
    ("compute", 1.0),
    ("queue", 0.62),
    ("deserialize", 0.42),
    ("serialize", 0.27),
    ("wire", 0.14),
)


def write_png(report: Report, path: Path) -> None:
    """Draw the latencies and the local exponents into one PNG file, light."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 9), dpi=150, layout="constrained", facecolor=palette.PAPER)
        upper, lower = figure.subplots(2, 1, height_ratios=(2.6, 1), sharex=True)
        _draw_latency(upper, report)
        _draw_local_exponents(lower, report)
        upper.tick_params(labelbottom=True)
        figure.savefig(path, metadata={"Title": title(report)})


def latency_figure(report: Report) -> Figure:
    """End to end and compute against seq_len on log-log axes, with the fits."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6), layout="constrained")
        _draw_latency(figure.subplots(), report)
    return figure


def local_exponents_figure(report: Report) -> Figure:
    """The exponent between neighbouring lengths against seq_len."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        _draw_local_exponents(figure.subplots(), report)
    return figure


def split_figure(report: Report) -> Figure:
    """What share of the mean end to end each part has, by length and series."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        _draw_split(figure.subplots(), report)
    return figure


def title(report: Report) -> str:
    """What the report is of, in one line."""
    names = ", ".join(series.label for series in report.series)
    return f"Latency and sequence length: {names}"


def _draw_latency(axes: Axes, report: Report) -> None:
    handles: list[Line2D | Patch] = []
    for index, series in enumerate(report.series):
        colour, marker = palette.series_style(index)
        _draw_series(axes, series, colour, marker)
        handles.append(
            Line2D([], [], color=colour, marker=marker, lw=2, label=_legend_label(series))
        )
    handles += [
        Patch(facecolor=palette.MUTED, alpha=0.2, label="end to end, p5 to p95"),
        Line2D([], [], color=palette.MUTED, ls=(0, (4, 2)), lw=1.6, label="compute alone, p50"),
        Line2D([], [], color=palette.MUTED, ls=":", lw=1.4, label="fitted power law"),
    ]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _label_lengths(axes, report)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("milliseconds (log scale)")
    axes.grid(visible=True, axis="both")
    axes.set_axisbelow(True)
    axes.set_title("Latency and sequence length, p50 end to end", loc="left", weight="bold")
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
        labelspacing=0.9,
        fontsize=9.5,
    )


def _draw_series(axes: Axes, series: Series, colour: str, marker: str) -> None:
    points = [point for point in series.points if point.end_to_end is not None]
    lengths = [point.seq_len for point in points]
    band = [(p.end_to_end.p5, p.end_to_end.p95) for p in points if p.end_to_end is not None]
    axes.fill_between(
        lengths,
        [low for low, _ in band],
        [high for _, high in band],
        color=colour,
        alpha=0.16,
        lw=0,
    )
    medians = [p.end_to_end.p50 for p in points if p.end_to_end is not None]
    axes.plot(lengths, medians, color=colour, marker=marker, ms=6, lw=2)
    compute = [
        (p.seq_len, p.compute.p50) for p in points if p.compute is not None and p.compute.p50 > 0
    ]
    axes.plot(
        [n for n, _ in compute],
        [ms for _, ms in compute],
        color=colour,
        marker=marker,
        ms=4,
        mfc=palette.PAPER,
        lw=1.6,
        ls=(0, (4, 2)),
    )
    fit = series.fit("end_to_end")
    if fit is not None:
        ends = np.array([fit.residuals[0].seq_len, fit.residuals[-1].seq_len], float)
        axes.plot(ends, fit.coefficient_ms * ends**fit.exponent, color=colour, lw=1.4, ls=":")


def _legend_label(series: Series) -> str:
    lines = [series.label]
    for quantity in ("end_to_end", "compute"):
        fit = series.fit(quantity)
        if fit is not None:
            lines.append(
                f"  {quantity.replace('_', ' ')} ~ $n^{{{fit.exponent:.2f}}}${_interval(fit)}"
            )
    return "\n".join(lines)


def _interval(fit: Fit) -> str:
    if fit.low is None or fit.high is None:
        return ""
    return f"  ({fit.confidence:.0%}: {fit.low:.2f} to {fit.high:.2f})"


def _draw_local_exponents(axes: Axes, report: Report) -> None:
    highest = 0.0
    for index, series in enumerate(report.series):
        colour, marker = palette.series_style(index)
        for quantity, style, size in (("end_to_end", "-", 6), ("compute", (0, (4, 2)), 4)):
            fit = series.fit(quantity)
            if fit is None:
                continue
            middles = [(each.from_seq_len * each.to_seq_len) ** 0.5 for each in fit.local_exponents]
            exponents = [each.exponent for each in fit.local_exponents]
            highest = max([highest, *exponents])
            axes.plot(
                middles,
                exponents,
                color=colour,
                marker=marker,
                ms=size,
                ls=style,
                lw=1.8,
                mfc=colour if quantity == "end_to_end" else palette.PAPER,
            )
    for exponent, name in ((1, "linear"), (2, "quadratic")):
        axes.axhline(exponent, color=palette.MUTED, lw=1, ls=":")
        axes.annotate(
            name,
            (1, exponent),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=palette.MUTED,
            fontsize=9,
        )
    axes.set_xscale("log", base=2)
    _label_lengths(axes, report)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), max(2.35, highest * 1.12))
    axes.set_ylabel("exponent")
    axes.grid(visible=True, axis="x")
    axes.set_title(
        "Exponent between neighbouring lengths (solid: end to end, dashed: compute)",
        loc="left",
        weight="bold",
    )


def _draw_split(axes: Axes, report: Report) -> None:
    rows: list[tuple[str, Point, str]] = []
    for index, series in enumerate(report.series):
        colour, _ = palette.series_style(index)
        rows += [(series.label, point, colour) for point in series.points if point.count]
    positions, gap, previous = [], 0.0, None
    for place, (label, _, _) in enumerate(rows):
        gap += 0.7 if previous not in (None, label) else 0.0
        previous = label
        positions.append(place + gap)
    lower = np.zeros(len(rows))
    for name, alpha in _PARTS:
        shares = np.array([_share(point, name) for _, point, _ in rows])
        axes.bar(
            positions,
            shares,
            bottom=lower,
            color=[(colour, alpha) for _, _, colour in rows],
            width=0.82,
        )
        lower += shares
    axes.set_xticks(positions, [str(point.seq_len) for _, point, _ in rows])
    axes.tick_params(axis="x", length=0, labelrotation=90 if len(rows) > 14 else 0)
    axes.set_ylim(0, 100)
    axes.set_ylabel("% of the mean end to end")
    axes.set_xlabel("seq_len")
    axes.set_title("Where the time goes", loc="left", weight="bold")
    handles = [
        Patch(facecolor=palette.MUTED, alpha=alpha, label=name) for name, alpha in reversed(_PARTS)
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _share(point: Point, name: str) -> float:
    means = {
        each: distribution.mean for each, _ in _PARTS if (distribution := getattr(point, each))
    }
    whole = sum(means.values())
    return 100 * means.get(name, 0.0) / whole if whole > 0 else 0.0


def _label_lengths(axes: Axes, report: Report) -> None:
    lengths = report.settings.seq_lens
    axes.xaxis.set_major_locator(FixedLocator(_spread(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("seq_len (log scale)")
    if len(lengths) > 1:
        axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)


def _spread(lengths: Sequence[int]) -> list[int]:
    """The lengths, less those too near to the one before for their label to fit."""
    kept: list[int] = []
    for length in lengths:
        if not kept or np.log2(length / kept[-1]) >= np.log2(lengths[-1] / lengths[0]) / 24:
            kept.append(length)
    return kept
