"""The report of `attnserve-loadtest decode`: JSON, CSV and a figure."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from attnserve_loadtest.decode_load import DecodeReport
from attnserve_loadtest.report import palette
from attnserve_loadtest.report.files import write_files
from attnserve_loadtest.report.terminal import counted

matplotlib.use("Agg")


def findings(report: DecodeReport) -> list[str]:
    """What a reader wants to know first."""
    figures, bound = report.figures(), report.settings.bound_ms
    return [
        f"{counted(figures['sessions'], 'session')}, {figures['failed']:.0f} failed; "
        f"{figures['tokens_per_second']:.1f} tokens/s, "
        f"{figures['goodput_per_second']:.1f} of them within {bound:g} ms",
        f"between tokens: p50 {figures['between_p50_ms']:.2f}, "
        f"p90 {figures['between_p90_ms']:.2f}, p99 {figures['between_p99_ms']:.2f} ms",
        f"first output: p50 {figures['first_p50_ms']:.2f}, p99 {figures['first_p99_ms']:.2f} ms",
    ]


def write_decode_report(report: DecodeReport, folder: Path) -> list[Path]:
    """Write decode.json, decode.csv (a row for each token) and decode.png.

    Raises:
        LoadTestError: a file cannot be written.
    """
    writers = {"decode.json": _write_json, "decode.csv": _write_csv, "decode.png": _write_png}
    return write_files(report, folder, writers)


def _write_json(report: DecodeReport, path: Path) -> None:
    content = {
        "version": 1,
        "model": report.model,
        "settings": asdict(report.settings),
        "complete": report.complete,
        # JSON has no NaN.
        "figures": {k: None if v != v else v for k, v in report.figures().items()},
        "sessions": [asdict(run) for run in report.sessions],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _write_csv(report: DecodeReport, path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["session", "at_seconds", "between_ms"])
        for number, run in enumerate(report.sessions):
            for at, took in zip(run.token_at, run.token_ms, strict=True):
                rows.writerow([number, f"{at:.6f}", f"{took:.4f}"])


def _write_png(report: DecodeReport, path: Path) -> None:
    _figure(report).savefig(path, dpi=100)


def _figure(report: DecodeReport) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained", facecolor=palette.PAPER)
    left, right = figure.subplots(1, 2)
    bound = report.settings.bound_ms
    for index, (name, values) in enumerate(
        (("between tokens", report.token_ms), ("first output", report.first_ms))
    ):
        if values:
            colour, _ = palette.series_style(index + 1)
            shares = 100 * np.arange(1, len(values) + 1) / len(values)
            left.step(np.sort(values), shares, where="post", color=colour, label=name)
    left.axvline(bound, color=palette.INK, ls=":", label=f"bound, {bound:g} ms")
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("ms (log)")
    left.set_ylabel("% that took no longer")
    left.legend(frameon=False)
    left.set_title("What callers wait for", loc="left", fontsize=10.5)
    at = np.array([each for run in report.sessions for each in run.token_at])
    good = at[np.array(report.token_ms) <= bound]
    edges = np.arange(0, np.ceil(report.seconds) + 1)
    for index, (name, times) in enumerate((("all", at), (f"within {bound:g} ms", good))):
        colour, _ = palette.series_style(index + 1)
        # Dashes, so that equal ones are both seen.
        line = "--" if index else "-"
        right.stairs(
            np.histogram(times, edges)[0], edges, color=colour, lw=1.8, ls=line, label=name
        )
    right.set_xlabel("seconds")
    right.set_ylabel("tokens/s")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    right.set_title("Tokens", loc="left", fontsize=10.5)
    figure.suptitle(f"Decoding in KV sessions: {report.model}", weight="bold")
    return figure
