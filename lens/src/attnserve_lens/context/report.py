"""Writes a context report: context.json, .csv, .png and .html, and what it found in sentences."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np
from attnserve_loadtest.report.files import write_files
from attnserve_loadtest.report.page import page_style
from attnserve_loadtest.report.svg import inline_svg

from attnserve_lens.context import plot as context_plot
from attnserve_lens.context.schema import ContextReport, Growth

_CSV = ("fact", "beside", "sinks", "effective")
# A head holds the fact if its weight falls at most half as fast as uniform weight.
_HOLDS = -0.5


def write_context_report(report: ContextReport, folder: Path) -> list[Path]:
    """Write all files into a folder, JSON first.

    Raises:
        LoadTestError: a file cannot be written.
    """
    return write_files(report, folder, _WRITERS)


def findings(report: ContextReport) -> list[str]:
    """What was found, a sentence each."""
    first, last = report.settings.seq_lens[0], report.settings.seq_lens[-1]
    mean, uniform, spread = report.mean_fact, report.uniform, report.mean_effective
    found = [
        f"In the mean of {len(report.heads_fact)} heads the question gives {mean.values[0]:.1%} of "
        f"its weight to the fact at {first} tokens and {mean.values[-1]:.1%} at {last}; uniform "
        f"attention would give {uniform.values[0]:.1%} and {uniform.values[-1]:.1%}. "
        f"Exponent {context_plot.exponent(mean)}, of uniform {context_plot.exponent(uniform)}.",
        f"A token of the question spreads its weight as over {spread.values[0]:.0f} keys at "
        f"{first} tokens and {spread.values[-1]:.0f} at {last}, in the mean of heads. Exponent "
        f"{context_plot.exponent(spread)}; 1 would be spread as thin as uniform attention.",
    ]
    exponents = [each.exponent for each in report.heads_fact if each.exponent is not None]
    if exponents:
        holding = sum(each > _HOLDS for each in exponents)
        found.append(
            f"{holding} of {len(exponents)} heads hold the fact: their weight on it falls slower "
            f"than seq_len to the power of {_HOLDS}. The exponents go from {min(exponents):+.2f} "
            f"to {max(exponents):+.2f}."
        )
    best = report.best[0]
    found.append(
        f"Best, chosen by the even trials and measured on the odd ones: layer {best.layer} head "
        f"{best.head} gives {best.values[0]:.1%} at {first} tokens and {best.values[-1]:.1%} at "
        f"{last}. Exponent {context_plot.exponent(best)}."
    )
    cells = [cell for cell in report.cells if cell.seq_len == last]
    lift = np.mean([np.mean(cell.fact) / np.mean(cell.beside) for cell in cells])
    sinks = np.mean([np.mean(cell.sinks) for cell in cells])
    found.append(
        f"At {last} tokens the fact gets {lift:.1f} times the weight of as much filler beside it, "
        f"and the first token with those that the model adds {sinks:.0%} of all weight."
    )
    if report.settings.filler == "random ids":
        found.append(
            "The contexts are random ids, as the model has no tokenizer that tells words apart: "
            "this shows how the command works, and little of what the model does with text."
        )
    return found


def write_json(report: ContextReport, path: Path) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(asdict(report), indent=1, allow_nan=False) + "\n", "utf-8")


def write_csv(report: ContextReport, path: Path) -> None:
    """One row for each length, depth, layer and head."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("seq_len", "depth", "layer", "head", "uniform", "visible", *_CSV))
        for cell in report.cells:
            for at, layer in enumerate(report.layers):
                for place, head in enumerate(report.heads):
                    values = [getattr(cell, name)[at][place] for name in _CSV]
                    facts = (cell.seq_len, cell.depth, layer, head, cell.uniform, cell.visible)
                    writer.writerow((*facts, *(f"{value:.6g}" for value in values)))


def write_html(report: ContextReport, path: Path) -> None:
    """Write the page: the findings, the figures, the figures' numbers, and the method."""
    path.write_text(html_page(report), "utf-8")


def html_page(report: ContextReport) -> str:
    """The page, which needs nothing else."""
    title = escape(context_plot.title(report))
    said = "".join(f"<li>{escape(each)}</li>" for each in findings(report))
    figures = "".join(
        "<figure>"
        + inline_svg(
            context_plot.panel(name, report),
            name=name,
            title=_ALTERNATIVES[name],
            description=f"{_ALTERNATIVES[name]}; the tables below hold its figures.",
        )
        + "</figure>"
        for name in context_plot.PANELS
    )
    body = f"<ul>{said}</ul>{figures}{_lengths(report)}{_cells(report)}{_heads(report)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n'
        f"<title>{title}</title>\n<style>{page_style()}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{body}{_method(report)}\n</main>\n</body>\n</html>\n"
    )


_WRITERS = {
    "context.json": write_json,
    "context.csv": write_csv,
    "context.png": context_plot.write_png,
    "context.html": write_html,
}
_ALTERNATIVES = {
    "fact": "Weight on the fact against the length of the context, of every head",
    "effective": "Effective keys of the question against the length of the context",
    "lift": "Weight on the fact over uniform weight, by length and depth",
    "beside": "Weight on the fact over that on the filler beside it, by length and depth",
    "exponents": "Exponent of the weight on the fact, by layer and head",
    "longest": "Weight on the fact at the longest context, by layer and head",
}


def _lengths(report: ContextReport) -> str:
    growths = [report.uniform, report.mean_fact, *report.best, report.mean_effective]
    heads = ["", *map(str, report.settings.seq_lens), "exponent"]
    rows = [
        [each.of, *(f"{value:.4g}" for value in each.values), context_plot.exponent(each)]
        for each in growths
    ]
    return _table("By length, mean over depths", heads, rows)


def _cells(report: ContextReport) -> str:
    rows = [
        [
            f"{cell.seq_len}, depth {cell.depth:g}",
            f"{cell.uniform:.2%}",
            *(f"{np.mean(getattr(cell, name)):.2%}" for name in ("fact", "beside", "sinks")),
            f"{np.mean(cell.effective):.1f}",
        ]
        for cell in report.cells
    ]
    heads = ["seq_len", "uniform", "fact", "beside", "sinks", "effective keys"]
    return _table("By length and depth, mean of heads", heads, rows)


def _heads(report: ContextReport) -> str:
    def row(each: Growth) -> list[str]:
        name = f"layer {each.layer} head {each.head}"
        return [
            name,
            f"{each.values[0]:.2%}",
            f"{each.values[-1]:.2%}",
            context_plot.exponent(each),
        ]

    first, last = report.settings.seq_lens[0], report.settings.seq_lens[-1]
    heads = ["head", f"at {first}", f"at {last}", "exponent"]
    rows = [row(each) for each in sorted(report.heads_fact, key=lambda each: -each.values[-1])]
    table = _table("Weight on the fact, every head, heaviest at the longest context", heads, rows)
    return f"<details><summary>Every head</summary>{table}</details>"


def _method(report: ContextReport) -> str:
    settings, server = report.settings, report.server
    facts = (
        f"{report.model} version {report.version}, variant {report.variant}, {report.mask}; server "
        f"{server.target}, attnserve {server.version}, {', '.join(server.providers)}; "
        f"{report.date}; {settings.trials} trials a cell, filler: {settings.filler}, seed "
        f"{settings.seed}; fact {report.fact_length:.1f} tokens, question "
        f"{report.question_length:.1f}"
    )
    return (
        f"<h2>How it was measured</h2><p>{escape(facts)}.</p>"
        "<p>Each context is filler sentences with one fact among them and a question at its end. "
        "Weights are those of the question's tokens, mean over them, on all tokens of the fact. "
        "Beside is the weight on as many filler tokens right before and after the fact: what any "
        "text at that depth gets. Exponents are slopes of ordinary least squares lines on log-log "
        "axes through one value a length, the mean over depths; their intervals are Student's t at "
        f"{report.mean_fact.confidence:.0%} and say how well one line suits these lengths. Weight "
        "is not use: what a head reads depends on its values too.</p>"
    )


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )
