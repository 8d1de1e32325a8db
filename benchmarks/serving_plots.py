"""Plots of what benchmarks/serving.py measured."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from serving_report import Row

matplotlib.use("Agg")
from matplotlib import pyplot

# Okabe and Ito's colours, which all kinds of colour vision tell apart.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
PERCENTILES = {"p50_ms": "o", "p90_ms": "s", "p99_ms": "^", "p99.9_ms": "D"}


def latency_against_rate(rows: Sequence[Row], folder: Path) -> None:
    """Percentiles of latency at each offered rate; one plot per length, through the SDK."""
    rows = [row for row in rows if row["protocol"] == "sdk"]
    for seq_len in dict.fromkeys(row["seq_len"] for row in rows):
        points = [r for r in rows if r["seq_len"] == seq_len and r["load"] != "closed"]
        points = [row for row in points if row["answered"]]
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for (name, marker), colour in zip(PERCENTILES.items(), COLOURS, strict=False):
            rates = [row["offered/s"] for row in points]
            label = name.removesuffix("_ms")
            axes.plot(rates, [r[name] for r in points], color=colour, marker=marker, label=label)
        capacity = next(r["goodput/s"] for r in rows if r["seq_len"] == seq_len)
        axes.axvline(capacity, color="#999999", linestyle="--", label="peak of a closed loop")
        axes.set_yscale("log")
        axes.set_xlabel("offered requests per second")
        axes.set_ylabel("latency from the time due, ms")
        axes.set_title(f"open loop, S={seq_len}: answered requests")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"latency-{seq_len}.png", dpi=110)
        pyplot.close(figure)


def requests_by_peer(rows: Sequence[Row], folder: Path) -> None:
    """Requests per second of each contender, grouped by length, with the most callers."""
    most = max(row["callers"] for row in rows)
    own = [row for row in rows if row["callers"] == most]
    lengths = list(dict.fromkeys(row["seq_len"] for row in own))
    names = list(dict.fromkeys(row["contender"] for row in own))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for index, name in enumerate(names):
        values = [row["requests/s"] for row in own if row["contender"] == name]
        places = [i + (index - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(values))]
        bars = axes.bar(places, values, 0.75 / len(names), color=COLOURS[index], label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(lengths)), [f"S={length}" for length in lengths])
    axes.set_yscale("log")
    axes.set_ylabel("requests per second")
    axes.set_title(f"{most} callers through tritonclient (sdk: the typed API)")
    axes.legend(fontsize=8)
    figure.savefig(folder / "requests-by-peer.png", dpi=110)
    pyplot.close(figure)
