"""A load report in words and as a table of text."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from attnserve_loadtest.report.load_schema import LoadReport, Step
from attnserve_loadtest.report.schema import Distribution
from attnserve_loadtest.report.terminal import counted, format_ms


def load_name(step: Step) -> str:
    """What was offered."""
    if step.offered is None:
        return counted(step.callers or 0, "caller")
    return f"{step.offered:,.1f}/s"


def said(step: Step) -> str:
    """One line on a load that is over."""
    lost = [
        f"{count} {name}"
        for count, name in (
            (step.refused, "refused"),
            (step.failed, "failed"),
            (step.cancelled, "given up"),
        )
        if count
    ]
    first = step.first
    took = (
        "no answer"
        if first is None
        else f"p50 {format_ms(first.p50)}, p99 {format_ms(first.p99)} ms"
    )
    verdict = "" if step.keeps_up else "; too much"
    return (
        f"{load_name(step)}: {step.throughput:,.1f} answers/s, {step.goodput:,.1f} good, "
        f"{', '.join([took, *lost])}{verdict}"
    )


def findings(report: LoadReport) -> list[str]:
    """What a reader wants to know first."""
    steps, found = report.steps, report.capacity
    sentences = []
    if found.best is None:
        sentences.append("no load that was tried could be kept up with")
    else:
        best = steps[found.best]
        within = f" within {', '.join(report.settings.slo)}" if report.settings.slo else ""
        sentences.append(
            f"the most that was kept up with{within}: {load_name(best)}, goodput "
            f"{best.goodput:,.1f} answers/s, {best.context_tokens_per_second:,.0f} tokens of "
            "context/s"
        )
    if (knee := shown_knee(report)) is not None:
        step = steps[knee]
        sentences.append(
            f"the knee, the most throughput for its latency: {load_name(step)}"
            + (f", p50 {format_ms(step.first.p50)} ms" if step.first is not None else "")
        )
    sentences += _of_first_and_between(report)
    if found.largest_context is not None and found.largest_context_step is not None:
        at = load_name(steps[found.largest_context_step])
        sentences.append(f"the largest context within the bounds: {found.largest_context}, at {at}")
    if found.most_callers is not None:
        sentences.append(f"the most callers within the bounds: {found.most_callers}")
    if found.cost_per_million_tokens is not None:
        sentences.append(
            f"a million tokens of context cost {found.cost_per_million_tokens:.4g} at "
            f"{found.price_per_hour:g} an hour for each server"
        )
    late = max((step.late.p99 for step in steps if step.late is not None), default=0.0)
    if late > 5 and report.settings.arrivals != "closed":
        sentences.append(
            f"the clients sent up to {format_ms(late)} ms late (p99): they are what is slow; give "
            "them a machine of their own or more --clients"
        )
    return sentences


def print_load(report: LoadReport, console: Console) -> None:
    """Print the table of loads and the findings."""
    table = Table(box=None, title=title(report), title_justify="left")
    shown = [n for n, heading in enumerate(COLUMNS) if heading not in _LEFT_OUT]
    for n in shown:
        table.add_column(COLUMNS[n], justify="right")
    for number, step in enumerate(report.steps):
        row = cells(step, knee=number == shown_knee(report))
        table.add_row(*(row[n] for n in shown), style="" if step.keeps_up else "dim")
    console.print()
    console.print(table)
    console.print()
    for sentence in findings(report):
        console.print(f"- {sentence}", markup=False, soft_wrap=True)
    if report.failure:
        console.print(f"- the first failure: {report.failure}", markup=False, soft_wrap=True)
    if not report.complete:
        console.print("interrupted: this is what was measured until then")


# Of these a terminal has no room for some.
COLUMNS = (
    "load", "due", "answered", "refused", "failed", "given up", "answers/s", "goodput/s",
    "first p50 ms", "p95 ms", "p99 ms", "between p50 ms", "p99 ms", "late p99 ms", "kept up",
)  # fmt: skip
_LEFT_OUT = ("due", "answered", "p95 ms")


def cells(step: Step, *, knee: bool) -> list[str]:
    """A row of the table of loads."""
    return [
        load_name(step) + (" (knee)" if knee else ""),
        str(step.due),
        str(step.answered),
        str(step.refused),
        str(step.failed),
        str(step.cancelled),
        f"{step.throughput:,.1f}",
        f"{step.goodput:,.1f}",
        *_ms(step.first, ("p50", "p95", "p99")),
        *_ms(step.between, ("p50", "p99")),
        *_ms(step.late, ("p99",)),
        "yes" if step.keeps_up else "no",
    ]


def shown_knee(report: LoadReport) -> int | None:
    """The knee, if there are loads enough for a curve to bend."""
    return report.capacity.knee if len(report.steps) > 2 else None


def title(report: LoadReport) -> str:
    """What the report is of, in one line."""
    settings = report.settings
    servers = f", {counted(len(report.servers), 'server')}" if len(report.servers) > 1 else ""
    what = "replay" if settings.trace else "load"
    return f"Latency and {what}: {settings.model}, {settings.arrivals}{servers}"


def _of_first_and_between(report: LoadReport) -> list[str]:
    step = report.steps[report.capacity.best or 0]
    found = []
    for name, values in (("time to first output", step.first), ("between tokens", step.between)):
        if values is not None:
            found.append(
                f"{name} at {load_name(step)}: p50 {format_ms(values.p50)}, p95 "
                f"{format_ms(values.p95)}, p99 {format_ms(values.p99)} ms"
            )
    return found


def _ms(values: Distribution | None, statistics: Sequence[str]) -> list[str]:
    return [
        "-" if values is None else format_ms(getattr(values, statistic)) for statistic in statistics
    ]
