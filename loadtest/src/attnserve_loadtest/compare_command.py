"""The command `attnserve-loadtest compare`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from attnserve_proto.commands import Loading, values

from attnserve_loadtest.comparison import CONFIDENCE, Compared, compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Says what is faster and what slower, beyond noise, in the second of two reports: two "
        "report.json of `scaling`, or two load.json. Writes comparison.json and .png."
    )
    parser.add_argument("first", type=values.path, metavar="A")
    parser.add_argument("second", type=values.path, metavar="B")
    parser.add_argument(
        "--out", type=values.path, default=Path("reports/comparison"), metavar="DIR"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LoadTestError: the reports cannot be read or compared.
    """
    with Loading():
        from rich.table import Table

        from attnserve_loadtest.report.files import write_files
        from attnserve_loadtest.report.json_file import read_json
        from attnserve_loadtest.report.terminal import make_console

    found = compare(read_json(parsed.first), read_json(parsed.second))
    paths = write_files(
        found, parsed.out, {"comparison.json": _write_json, "comparison.png": _write_png}
    )
    table = Table(box=None, title=f"B = {parsed.second} against A = {parsed.first}")
    table.title_justify = "left"
    table.add_column("")
    for heading in ("A", "B", "B / A", "interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("B is")
    for each in found:
        table.add_row(
            each.what,
            f"{each.first:.4g} {each.unit}",
            f"{each.second:.4g} {each.unit}",
            f"{each.ratio:.3f}",
            f"{each.low:.3f} to {each.high:.3f}",
            each.verdict,
        )
    console = make_console()
    console.print(table)
    for sentence in findings(found):
        console.print(f"- {sentence}", markup=False, soft_wrap=True)
    for path in paths:
        print(path)
    return 0


def findings(found: Sequence[Compared]) -> list[str]:
    """In short."""
    said = []
    for verdict in ("faster", "slower"):
        those = [each for each in found if each.verdict == verdict]
        if those:
            low, high = min(e.ratio for e in those), max(e.ratio for e in those)
            said.append(
                f"B is {verdict} in {len(those)} of {len(found)} figures, B / A {low:.3f} to "
                f"{high:.3f}"
            )
    if not said:
        said.append("no figure differs beyond noise")
    said.append(
        f"intervals hold for all {len(found)} together at {CONFIDENCE:.0%}, by what the figures do "
        "within each run; what two runs differ in as wholes they do not know"
    )
    return said


def _write_json(found: list[Compared], path: Path) -> None:
    content = {
        "schema": "attnserve-loadtest/comparison",
        "schema_version": 1,
        "confidence": CONFIDENCE,
        "compared": [asdict(each) for each in found],
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")


def _write_png(found: list[Compared], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from attnserve_loadtest.report import palette
    from attnserve_loadtest.report.plot import STYLE

    colours = {"faster": palette.LIGHT[2], "slower": palette.LIGHT[1]}
    with matplotlib.rc_context(STYLE):
        height = 1.6 + 0.34 * len(found)
        figure = Figure(
            figsize=(10, height), dpi=150, layout="constrained", facecolor=palette.PAPER
        )
        axes = figure.subplots()
        for place, each in enumerate(found):
            axes.errorbar(
                each.ratio,
                -place,
                xerr=([each.ratio - each.low], [each.high - each.ratio]),
                color=colours.get(each.verdict, palette.MUTED),
                marker="o",
                capsize=4,
            )
        axes.axvline(1, color=palette.INK, lw=1, ls=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks([-place for place in range(len(found))], [each.what for each in found])
        axes.set_xlabel("B / A, with its interval (log scale)")
        axes.grid(visible=True, axis="x")
        axes.set_title("What differs beyond noise", loc="left", weight="bold")
        figure.savefig(path)
