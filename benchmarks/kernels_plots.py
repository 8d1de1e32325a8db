"""Plots of what benchmarks/kernels.py measured."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Okabe and Ito's colours, which all kinds of colour vision tell apart; a marker each besides.
STYLES = {
    "torch": ("#000000", "o"),
    "torch mask": ("#000000", "o"),
    "flex": ("#999999", "P"),
    "native": ("#009E73", "s"),
    "blocked": ("#0072B2", "^"),
    "fused": ("#D55E00", "v"),
    "reference": ("#CC79A7", "D"),
}


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """One plot per kind of row that there is."""
    for section in dict.fromkeys(row["section"] for row in rows):
        own = [row for row in rows if row["section"] == section]
        if section.startswith("memory"):
            _lines(own, "bytes", 2**20, "peak above inputs and output, MiB", section, folder)
        elif section in ("causal", "bidirectional") or section.startswith("window"):
            _lines(own, "milliseconds", 1, "time, ms", section, folder)


def _lines(
    rows: list[dict[str, Any]], field: str, unit: float, label: str, section: str, folder: Path
) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted((r["query_len"], r[field] / unit) for r in rows if r["contender"] == name)
        colour, marker = STYLES.get(name, ("#56B4E9", "x"))
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    if min(row[field] for row in rows) > 0:
        axes.set_yscale("log")
    lengths = sorted({row["query_len"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("sequence length")
    axes.set_ylabel(label)
    first = rows[0]
    axes.set_title(f"{section}: {first['num_heads']} heads of {first['head_dim']}, FP32, CPU")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(folder / f"{section.replace(' ', '-')}.png", dpi=110)
    pyplot.close(figure)
