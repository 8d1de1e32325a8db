"""The report as text."""

from rich.console import Console
from rich.table import Table

from attnserve_loadtest.fitting import growth_of
from attnserve_loadtest.report.schema import PARTS, Distribution, Fit, Point, Report, Series

_WIDTH_WITHOUT_TERMINAL = 140


def make_console(*, stderr: bool = False) -> Console:
    """A console; where there is no terminal, wide enough for the tables."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
    return console


def print_report(report: Report, console: Console) -> None:
    """Print a table of each series, its fits, and what to mind."""
    for series in report.series:
        console.print()
        console.print(_table(series))
        for fit in series.fits:
            console.print(f"  {describe_fit(fit)}", markup=False)
            if growth := describe_growth(fit):
                console.print(f"    {growth}", markup=False)
        if overlapping := describe_overlapping(series):
            console.print(f"  {overlapping}", markup=False, soft_wrap=True)
        for failure in series.failures:
            console.print(
                f"  {failure.count} failed with {failure.code}: {failure.message}",
                markup=False,
                soft_wrap=True,
            )
    console.print()
    if report.drift is not None:
        console.print(f"drift: last round / first round = {report.drift:.3f}")
    if not report.complete:
        console.print("interrupted: this is what was measured until then")


def describe_fit(fit: Fit) -> str:
    """One line: the exponent, its interval, R², points, and the neighbours' exponents."""
    interval = (
        "no interval with 2 lengths"
        if fit.low is None or fit.high is None
        else f"{fit.confidence:.0%} confidence {fit.low:.2f} to {fit.high:.2f}"
    )
    r_squared = "" if fit.r_squared is None else f", R² {fit.r_squared:.4f}"
    local = ", ".join(
        f"{each.from_seq_len}→{each.to_seq_len}: {each.exponent:.2f}"
        for each in fit.local_exponents
    )
    name = fit.quantity.replace("_", " ")
    return (
        f"{name} ~ seq_len^{fit.exponent:.2f} "
        f"({interval}{r_squared}, {fit.points} lengths; between neighbours {local})"
    )


def describe_growth(fit: Fit) -> str:
    """One line: the constant, linear and quadratic part at the longest length; may be empty."""
    growth = growth_of(fit)
    if growth is None:
        return ""
    return (
        f"at {growth.seq_len}: constant {format_ms(growth.constant_ms)} + linear "
        f"{format_ms(growth.linear_ms)} + quadratic {format_ms(growth.quadratic_ms)} ms "
        f"(off by at most {growth.off:.0%})"
    )


def describe_overlapping(series: Series) -> str:
    """One line on requests whose time cannot be split; empty if there are none."""
    count = sum(point.overlapping for point in series.points)
    if not count:
        return ""
    are = "is" if count == 1 else "are"
    return (
        f"{counted(count, 'answer')} {are} not in {', '.join(PARTS)}: the server's own timings "
        "exceed the end to end, so they overlap"
    )


def _table(series: Series) -> Table:
    table = Table(title=f"{series.label} ({series.kind})", title_justify="left", box=None)
    headings = (
        "seq_len",
        "count",
        "failures",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "mean ms",
        "requests/s",
        "tokens/s",
        *PARTS,
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for point in series.points:
        table.add_row(*_cells(point))
    table.caption = f"{' + '.join(PARTS)} = mean"
    table.caption_justify = "left"
    return table


def _cells(point: Point) -> list[str]:
    whole = point.end_to_end
    latency = ["-"] * 4
    if whole is not None:
        latency = [format_ms(ms) for ms in (whole.p50, whole.p95, whole.p99, whole.mean)]
    return [
        str(point.seq_len),
        str(point.count),
        str(point.failures),
        *latency,
        f"{point.requests_per_second:,.1f}",
        f"{point.tokens_per_second:,.0f}",
        *(_mean(getattr(point, name)) for name in PARTS),
    ]


def _mean(distribution: Distribution | None) -> str:
    return "-" if distribution is None else format_ms(distribution.mean)


def counted(number: float, noun: str) -> str:
    """A number and what it counts, in the plural unless it is 1."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def format_ms(milliseconds: float) -> str:
    """Milliseconds to about three figures, the microsecond at most."""
    magnitude = abs(milliseconds)
    return f"{milliseconds:.{3 if magnitude < 10 else 2 if magnitude < 100 else 1}f}"
