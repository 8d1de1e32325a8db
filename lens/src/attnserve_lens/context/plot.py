"""The figures of a context report, drawn with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from attnserve_loadtest.report import palette
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from numpy.typing import NDArray

from attnserve_lens.context.schema import ContextReport, Growth
from attnserve_lens.plot import SCALE

matplotlib.use("Agg")

_STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": palette.MUTED,
    "axes.labelcolor": palette.INK,
    "text.color": palette.INK,
    "xtick.color": palette.MUTED,
    "ytick.color": palette.MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": palette.GRID,
}
# The scale of the pages that show attention, uniform to the eye. Its end that is white, like white
# text, is left out: a report on a dark page would take it for the paper.
_COLOURS = LinearSegmentedColormap.from_list("attnserve", SCALE[1:])
_ON_DARK, _ON_LIGHT = "#fefefe", "#000000"


def write_png(report: ContextReport, path: Path) -> None:
    """All panels in one PNG file."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, 13), dpi=100, layout="constrained", facecolor=palette.PAPER)
        grid = figure.subplots(3, 2)
        for axes, draw in zip(grid.flat, PANELS.values(), strict=True):
            draw(axes, report)
        figure.suptitle(title(report), weight="bold")
        figure.savefig(path)


def panel(name: str, report: ContextReport) -> Figure:
    """One of PANELS as a figure."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        PANELS[name](figure.subplots(), report)
    return figure


def title(report: ContextReport) -> str:
    """What the report is of, in one line."""
    return f"A fact in a growing context: {report.model}"


def mean_of(report: ContextReport, name: str, seq_len: int | None = None) -> NDArray[np.float64]:
    """A quantity of all cells, or of one length's: [cells, L, H]."""
    cells = [cell for cell in report.cells if seq_len in (None, cell.seq_len)]
    return np.array([getattr(cell, name) for cell in cells])


def label(growth: Growth) -> str:
    """A head's name and its exponent."""
    return f"layer {growth.layer} head {growth.head}: {exponent(growth)}"


def exponent(growth: Growth) -> str:
    """The exponent with its interval, as far as there are any."""
    if growth.exponent is None:
        return "no exponent of one length"
    if growth.low is None or growth.high is None:
        return f"{growth.exponent:+.2f}"
    return f"{growth.exponent:+.2f} ({growth.low:+.2f} to {growth.high:+.2f})"


def _draw_fact(axes: Axes, report: ContextReport) -> None:
    lengths = report.settings.seq_lens
    for each in report.heads_fact:
        axes.plot(lengths, each.values, color=palette.GRID, lw=0.9, zorder=1)
    for index, each in enumerate(report.best):
        colour, marker = palette.series_style(index + 1)
        axes.plot(
            lengths, each.values, color=colour, marker=marker, ms=4, lw=1.6, label=label(each)
        )
    mean = report.mean_fact
    name = f"mean of heads: {exponent(mean)}"
    axes.plot(lengths, mean.values, color=palette.INK, marker="o", lw=2.6, label=name)
    name = f"uniform: {exponent(report.uniform)}"
    axes.plot(lengths, report.uniform.values, color=palette.INK, ls=":", lw=2, label=name)
    lowest = min(report.uniform.values)
    axes.set_ylim(bottom=lowest / 8, top=1.3)
    _scales(axes, lengths, "weight on the fact (log)", base=10)
    axes.legend(frameon=False, fontsize=7.5, loc="lower left")
    axes.set_title("Weight on the fact's tokens; grey: every head", loc="left", fontsize=10.5)


def _draw_effective(axes: Axes, report: ContextReport) -> None:
    lengths = report.settings.seq_lens
    for each in report.heads_effective:
        axes.plot(lengths, each.values, color=palette.GRID, lw=0.9)
    mean = report.mean_effective
    name = f"mean of heads: {exponent(mean)}"
    axes.plot(lengths, mean.values, color=palette.INK, marker="o", lw=2.6, label=name)
    visible = [
        float(np.mean([cell.visible for cell in report.cells if cell.seq_len == each]))
        for each in lengths
    ]
    axes.plot(lengths, visible, color=palette.INK, ls=":", lw=2, label="uniform: all visible keys")
    _scales(axes, lengths, "effective keys, exp(entropy) (log)", base=2)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    axes.set_title("How thin the question spreads its weight", loc="left", fontsize=10.5)


def _draw_lift(axes: Axes, report: ContextReport) -> None:
    cells = {(cell.seq_len, cell.depth): cell for cell in report.cells}
    values = _by_cell(report, lambda at: float(np.mean(cells[at].fact)) / cells[at].uniform)
    _heatmap(axes, values, report, "{:.1f}")
    axes.set_title("Mean of heads: weight on the fact, times uniform", loc="left", fontsize=10.5)


def _draw_beside(axes: Axes, report: ContextReport) -> None:
    cells = {(cell.seq_len, cell.depth): cell for cell in report.cells}
    values = _by_cell(
        report, lambda at: float(np.mean(cells[at].fact)) / float(np.mean(cells[at].beside))
    )
    _heatmap(axes, values, report, "{:.1f}")
    name = "Mean of heads: weight on the fact, times that on filler beside it"
    axes.set_title(name, loc="left", fontsize=10.5)


def _draw_exponents(axes: Axes, report: ContextReport) -> None:
    found = [np.nan if each.exponent is None else each.exponent for each in report.heads_fact]
    _head_grid(axes, found, report, "{:.1f}", low=-1.5, high=0.5)
    name = "Exponent of the weight on the fact, by head (0 keeps it, -1 thins as uniform)"
    axes.set_title(name, loc="left", fontsize=10.5)


def _draw_longest(axes: Axes, report: ContextReport) -> None:
    longest = report.settings.seq_lens[-1]
    values = 100 * mean_of(report, "fact", longest).mean(axis=0)
    _head_grid(axes, values.ravel().tolist(), report, "{:.0f}", low=0, high=None)
    axes.set_title(f"Weight on the fact at {longest} tokens, by head, %", loc="left", fontsize=10.5)


PANELS = {
    "fact": _draw_fact,
    "effective": _draw_effective,
    "lift": _draw_lift,
    "beside": _draw_beside,
    "exponents": _draw_exponents,
    "longest": _draw_longest,
}


def _by_cell(report: ContextReport, value: Any) -> NDArray[np.float64]:
    settings = report.settings
    return np.array([[value((n, d)) for n in settings.seq_lens] for d in settings.depths])


def _heatmap(axes: Axes, values: Any, report: ContextReport, form: str) -> None:
    settings = report.settings
    _cells(axes, np.asarray(values), form, 0, None)
    axes.set_xticks(range(len(settings.seq_lens)), [str(each) for each in settings.seq_lens])
    axes.set_yticks(range(len(settings.depths)), [f"{each:g}" for each in settings.depths])
    axes.set_xlabel("seq_len")
    axes.set_ylabel("depth of the fact")


def _head_grid(
    axes: Axes,
    values: Sequence[float],
    report: ContextReport,
    form: str,
    low: float,
    high: float | None,
) -> None:
    grid = np.array(values, float).reshape(len(report.layers), len(report.heads))
    _cells(axes, grid, form, low, high)
    axes.set_xticks(range(len(report.heads)), [str(each) for each in report.heads])
    axes.set_yticks(range(len(report.layers)), [str(each) for each in report.layers])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")


def _cells(
    axes: Axes, values: NDArray[np.float64], form: str, low: float, high: float | None
) -> None:
    """Coloured cells with their numbers: the colour is never alone."""
    most = high if high is not None else max(float(np.nanmax(values)), low + 1e-9)
    columns, rows = np.arange(values.shape[1] + 1) - 0.5, np.arange(values.shape[0] + 1) - 0.5
    # Vector cells, not an image: the page then needs nothing beside its SVG.
    axes.pcolormesh(columns, rows, values, cmap=_COLOURS, vmin=low, vmax=most)
    axes.invert_yaxis()
    size = 8 if values.size <= 160 else 5.5
    for (row, column), value in np.ndenumerate(values):
        colour = _ON_DARK if (value - low) / (most - low) > 0.56 else _ON_LIGHT
        text = "-" if np.isnan(value) else form.format(value)
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _scales(axes: Axes, lengths: Sequence[int], name: str, base: int) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=base)
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seq_len (log)")
    axes.set_ylabel(name)
    axes.grid(visible=True, alpha=0.6)
