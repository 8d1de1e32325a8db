"""`load.html`: one page that needs nothing else; light or dark as the reader's system is."""

from html import escape
from pathlib import Path

from attnserve_loadtest.report import load_plot, page
from attnserve_loadtest.report.load_schema import LoadReport, ServiceTime, Step
from attnserve_loadtest.report.load_text import (
    COLUMNS,
    cells,
    findings,
    load_name,
    shown_knee,
    title,
)
from attnserve_loadtest.report.svg import inline_svg
from attnserve_loadtest.report.terminal import counted


def write_load_html(report: LoadReport, path: Path) -> None:
    """Write the page."""
    path.write_text(load_page(report), "utf-8")


def load_page(report: LoadReport) -> str:
    """The page: findings, plots, all loads as a table, lengths and servers, and the method."""
    sections = [_summary(report), _figures(report), _loads(report)]
    sections += [_lengths(report), _targets(report), _service(report), _method(report)]
    return page.page(title(report), [each for each in sections if each])


def _summary(report: LoadReport) -> str:
    note = "" if report.complete else '<p class="warning">The run was interrupted.</p>'
    if report.failure:
        note += f'<p class="warning">The first failure: {escape(report.failure)}</p>'
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(report))
    return f"{note}<ul>{items}</ul>"


def _figures(report: LoadReport) -> str:
    spoken = " ".join(findings(report))
    figures = (
        inline_svg(
            load_plot.latency_figure(report),
            name="latency",
            title=title(report),
            description=f"Latency over load. {spoken}. The tables below hold all figures.",
        ),
        inline_svg(
            load_plot.throughput_figure(report),
            name="throughput",
            title="Throughput and goodput",
            description="Answers and good answers over load; the tables below hold all figures.",
        ),
    )
    return "\n".join(f'<figure tabindex="0">{figure}</figure>' for figure in figures)


def _loads(report: LoadReport) -> str:
    rows = [
        page.row([escape(cell) for cell in cells(step, knee=number == shown_knee(report))])
        for number, step in enumerate(report.steps)
    ]
    bounds = [
        page.row(
            [
                load_name(step),
                escape(result.bound),
                "-" if result.observed_ms is None else f"{result.observed_ms:.3f}",
                "met" if result.met else "missed",
            ]
        )
        for step in report.steps
        for result in step.bounds
    ]
    found = "<h2>Loads</h2>\n" + page.table(page.head(COLUMNS), rows, "All loads")
    if bounds:
        head = page.head(("load", "bound", "observed ms", ""))
        found += page.table(head, bounds, "Bounds; what never came has no time")
    return found


def _lengths(report: LoadReport) -> str:
    rows = [
        page.row(
            [
                load_name(step),
                str(each.seq_len),
                str(each.due),
                *(page.ms(each.latency, statistic) for statistic in ("p50", "p95", "p99")),
                {True: "met", False: "missed", None: "-"}[each.met],
            ]
        )
        for step in report.steps
        for each in step.lengths
    ]
    if not rows or report.settings.trace:
        return ""
    head = page.head(("load", "seq_len", "due", "p50 ms", "p95 ms", "p99 ms", "bounds"))
    return "<h2>Lengths</h2>\n" + page.table(head, rows, "Requests with one answer, by length")


def _targets(report: LoadReport) -> str:
    if len(report.servers) < 2:
        return ""
    rows = [
        _target_row(step, number) for step in report.steps for number in range(len(step.targets))
    ]
    head = page.head(("load", "server", "answered", "refused", "failed", "first p50 ms", "p99 ms"))
    return "<h2>Servers</h2>\n" + page.table(head, rows, "By server")


def _target_row(step: Step, number: int) -> str:
    each = step.targets[number]
    counts = [str(count) for count in (each.answered, each.refused, each.failed)]
    times = [page.ms(each.first, statistic) for statistic in ("p50", "p99")]
    return page.row([load_name(step), escape(each.target), *counts, *times])


def _service(report: LoadReport) -> str:
    service = report.service
    rows = []
    for name, fit in (
        ("request with one answer, by seq_len", service.single),
        ("prompt, by its tokens", service.prompt),
        ("one more token, by the session's tokens", service.step),
    ):
        if fit is not None:
            rows.append(_service_row(name, fit))
    if not rows:
        return ""
    head = page.head(("computing of", "constant ms", "linear ms", "quadratic ms", "at", "off by"))
    return "<h2>Service times</h2>\n" + page.table(
        head, rows, "At the lowest load: what a simulation is made from"
    )


def _service_row(name: str, fit: ServiceTime) -> str:
    parts = (fit.constant, fit.linear * fit.longest, fit.quadratic * fit.longest**2)
    milliseconds = [f"{part * 1e3:.4f}" for part in parts]
    return page.row([name, *milliseconds, f"{fit.longest:.0f}", f"{fit.off:.0%}"])


def _method(report: LoadReport) -> str:
    settings, client = report.settings, report.client
    servers = "; ".join(
        f"{each.target}, attnserve {each.version}, ONNX Runtime {each.onnxruntime_version}"
        for each in report.servers
    )
    lengths = ", ".join(
        f"{n} ({w:g})" for n, w in zip(settings.seq_lens, settings.weights, strict=True)
    )
    facts = {
        "Date": report.date,
        "Servers": servers,
        "Client": f"attnserve-loadtest {client.attnserve_loadtest}, Python {client.python}, "
        f"{client.system}, {counted(client.cpu_count, 'processor')}, "
        f"{counted(settings.clients, 'process')}",
        "Arrivals": settings.arrivals,
        "Lengths": lengths or "-",
        "Sessions": f"{settings.sessions:g} of the requests",
        "Each load": f"{settings.step_seconds:g} s after {settings.warmup_seconds:g} s",
        "Seed": str(settings.seed),
    }
    if settings.trace:
        facts["Trace"] = f"{settings.trace}, {settings.speed:g} times as fast"
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return (
        f"<section><h2>How it was measured</h2>\n<dl>{items}</dl>\n"
        "<p>In an open loop requests are due at times drawn beforehand, and latency counts from "
        "then: a pause of the server shows in all requests that were due while it lasted. Goodput "
        "are answers within all bounds. A load is kept up with if 0.95 of what was due is answered "
        "in its time and all bounds are met. The knee is the load with the most throughput for its "
        "mean latency (Kleinrock's power).</p></section>"
    )
