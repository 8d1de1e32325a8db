"""`report.html`: one page that needs nothing else; light or dark as the reader's system is."""

from html import escape
from pathlib import Path

from attnserve_loadtest.fitting import Growth, growth_of
from attnserve_loadtest.report import page, palette, plot
from attnserve_loadtest.report.schema import PARTS, Distribution, Fit, Point, Report, Series
from attnserve_loadtest.report.svg import inline_svg
from attnserve_loadtest.report.terminal import counted, describe_overlapping, format_ms

_LATENCY_COLUMNS = ("p50", "p95", "p99", "mean")


def write_html(report: Report, path: Path) -> None:
    """Write the page."""
    path.write_text(html_page(report), "utf-8")


def html_page(report: Report) -> str:
    """The page: the fits, the plots, every figure as a table, and how it was measured."""
    sections = [_summary(report), _figures(report)]
    sections += [_series_section(series) for series in report.series]
    sections.append(_method(report))
    return page.page(plot.title(report), sections)


def _summary(report: Report) -> str:
    rows = []
    for index, series in enumerate(report.series):
        for quantity in ("end_to_end", "compute"):
            fit = series.fit(quantity)
            if fit is not None:
                rows.append(_fit_row(index, series, fit))
    note = (
        "" if report.complete else '<p class="warning">The run was interrupted: figures so far.</p>'
    )
    failures = sum(each.count for series in report.series for each in series.failures)
    if failures:
        note += f'<p class="warning">{counted(failures, "request")} failed; see below.</p>'
    if not rows:
        return f"{note}<p>Fewer than two lengths were answered: there is no exponent.</p>"
    head = page.head(
        ("series", "of", "exponent", "confidence interval", "R²", "lengths", "last two lengths")
    )
    return (
        f"{note}<h2>How latency grows</h2>\n"
        "<p>Duration ≈ coefficient &#215; seq_len<sup>exponent</sup>, fitted to the medians. "
        "1 is linear, 2 is quadratic. Small lengths are dominated by constant costs; the exponent "
        "between the last two lengths says most about large ones.</p>\n"
        + page.table(head, rows, "Fitted exponents")
        + _growths(report)
    )


def _growths(report: Report) -> str:
    """The constant, linear and quadratic parts, where there are lengths enough."""
    rows = [
        _growth_row(index, series, fit, growth)
        for index, series in enumerate(report.series)
        for fit in series.fits
        if (growth := growth_of(fit)) is not None
    ]
    if not rows:
        return ""
    head = page.head(("series", "of", "at", "constant ms", "linear ms", "quadratic ms", "off by"))
    return (
        "<p>No power law has a constant part. The same medians as constant + linear + quadratic in "
        "seq_len, none below zero, by least squares of relative errors: what each part takes at "
        "the longest length, and how far the sum is off at most.</p>\n"
        + page.table(head, rows, "What latency is made of")
    )


def _growth_row(index: int, series: Series, fit: Fit, growth: Growth) -> str:
    parts = (growth.constant_ms, growth.linear_ms, growth.quadratic_ms)
    return (
        f'<tr><th scope="row">{_key(index)}{escape(series.label)}</th>'
        f"<td>{fit.quantity.replace('_', ' ')}</td><td>{growth.seq_len}</td>"
        + "".join(f"<td>{format_ms(part)}</td>" for part in parts)
        + f"<td>{growth.off:.0%}</td></tr>"
    )


def _key(index: int) -> str:
    colour = f"var(--series-{index % len(palette.LIGHT)})"
    return f'<span class="key" style="background:{colour}"></span>'


def _fit_row(index: int, series: Series, fit: Fit) -> str:
    interval = (
        "none with 2 lengths"
        if fit.low is None or fit.high is None
        else f"{fit.low:.2f} to {fit.high:.2f} ({fit.confidence:.0%})"
    )
    r_squared = "-" if fit.r_squared is None else f"{fit.r_squared:.4f}"
    last = fit.local_exponents[-1]
    return (
        f'<tr><th scope="row">{_key(index)}{escape(series.label)}</th>'
        f"<td>{fit.quantity.replace('_', ' ')}</td>"
        f"<td><strong>{fit.exponent:.2f}</strong></td><td>{interval}</td><td>{r_squared}</td>"
        f"<td>{fit.points}</td>"
        f"<td>{last.exponent:.2f} ({last.from_seq_len}→{last.to_seq_len})</td></tr>"
    )


def _figures(report: Report) -> str:
    names = ", ".join(series.label for series in report.series)
    figures = [
        inline_svg(
            plot.latency_figure(report),
            name="latency",
            title=plot.title(report),
            description=(
                f"Log-log plot of the median end to end with its band from p5 to p95, and of "
                f"compute alone, for {names}. {_spoken_fits(report)} The tables below hold all "
                "figures."
            ),
        )
    ]
    if any(series.fits for series in report.series):
        figures.append(
            inline_svg(
                plot.local_exponents_figure(report),
                name="exponents",
                title="Exponent between neighbouring lengths",
                description=f"The local exponents of {names}; the tables below hold them.",
            )
        )
    figures.append(
        inline_svg(
            plot.split_figure(report),
            name="split",
            title="Where the time goes",
            description=f"Shares of {', '.join(PARTS)} in the mean end to end of each length; "
            "the tables below hold the means.",
        )
    )
    return "\n".join(f'<figure tabindex="0">{figure}</figure>' for figure in figures)


def _spoken_fits(report: Report) -> str:
    return " ".join(
        f"{series.label}: {fit.quantity.replace('_', ' ')} grows as seq_len to the power of "
        f"{fit.exponent:.2f}."
        for series in report.series
        for fit in series.fits
    )


def _series_section(series: Series) -> str:
    shape = f"num_heads {series.num_heads}"
    if series.num_kv_heads and series.num_kv_heads != series.num_heads:
        shape += f", num_kv_heads {series.num_kv_heads}"
    facts = (
        f"{series.kind}, version {series.version}, {series.dtype}, {series.mask}, {shape}, "
        f"head_dim {series.head_dim}; variant run: {', '.join(series.variants_run) or 'none'}"
    )
    latency = page.table(
        page.head(
            (
                "seq_len",
                "count",
                "failures",
                *(f"{each} ms" for each in _LATENCY_COLUMNS),
                "requests/s",
                "tokens/s",
            )
        ),
        [_latency_row(point) for point in series.points],
        "Latency end to end and throughput",
    )
    split = page.table(
        page.head(("seq_len", *(f"{each} ms" for each in PARTS), "batch size")),
        [_split_row(point) for point in series.points],
        f"Means: {' + '.join(PARTS)} = end to end",
    )
    overlapping = describe_overlapping(series)
    if overlapping:
        split += f'<p class="warning">{escape(overlapping)}.</p>'
    fits = "".join(_fit_table(fit) for fit in series.fits)
    return (
        f"<section><h2>{escape(series.label)}</h2>\n<p>{escape(facts)}</p>\n"
        f"{latency}{split}{fits}{_failure_list(series)}</section>"
    )


def _latency_row(point: Point) -> str:
    whole = point.end_to_end
    latency = [page.ms(whole, each) for each in _LATENCY_COLUMNS]
    rates = [f"{point.requests_per_second:,.1f}", f"{point.tokens_per_second:,.0f}"]
    return page.row([str(point.seq_len), str(point.count), str(point.failures), *latency, *rates])


def _split_row(point: Point) -> str:
    means: list[Distribution | None] = [getattr(point, each) for each in PARTS]
    batch = "-" if point.batch_size is None else f"{point.batch_size:.2f}"
    return page.row([str(point.seq_len), *(page.ms(each, "mean") for each in means), batch])


def _fit_table(fit: Fit) -> str:
    local = {each.to_seq_len: each.exponent for each in fit.local_exponents}
    rows = [
        page.row(
            [
                str(each.seq_len),
                format_ms(each.observed_ms),
                format_ms(each.fitted_ms),
                f"{2**each.log2_ratio - 1:+.1%}",
                f"{local[each.seq_len]:.2f}" if each.seq_len in local else "-",
            ]
        )
        for each in fit.residuals
    ]
    head = page.head(
        ("seq_len", "p50 ms", "fitted ms", "off the line", "exponent from the one before")
    )
    name = fit.quantity.replace("_", " ")
    return (
        f"<details><summary>Residuals and local exponents, {name}</summary>"
        + page.table(head, rows, f"Fit of {name}")
        + "</details>"
    )


def _failure_list(series: Series) -> str:
    items = "".join(
        f"<li>{each.count} &#215; <code>{escape(each.code)}</code>: {escape(each.message)}</li>"
        for each in series.failures
    )
    return f"<h3>Failures</h3><ul>{items}</ul>" if items else ""


def _method(report: Report) -> str:
    settings, client, server = report.settings, report.client, report.server
    amount = (
        counted(settings.requests, "request")
        if settings.requests is not None
        else counted(settings.duration_seconds or 0, "second")
    )
    drift = "one round" if report.drift is None else f"{report.drift:.3f}"
    facts = {
        "Date": report.date,
        "Server": f"{server.target}, attnserve {server.version}, ONNX Runtime "
        f"{server.onnxruntime_version}, {', '.join(server.providers)}",
        "Client": f"attnserve-loadtest {client.attnserve_loadtest}, attnserve-client "
        f"{client.attnserve_client}, Locust {client.locust}, grpcio {client.grpcio}, "
        f"Python {client.python}, {client.system}, {counted(client.cpu_count, 'processor')}",
        "Load": f"{counted(settings.users, 'user')}, batch {settings.batch}; at each length "
        f"{amount} in {counted(settings.rounds, 'round')}, "
        f"{settings.warmup} to warm up, seed {settings.seed}",
        "Drift": f"{drift} (last round / first round)",
    }
    items = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return (
        f"<section><h2>How it was measured</h2>\n<dl>{items}</dl>\n"
        "<p>End to end is from the call of the SDK to its return. Deserialize, queue, compute and "
        "serialize are the server's own timings, spans that follow one another; wire is the rest "
        "of end to end, request by request: the network and the client. Each round goes through "
        "all lengths in another random order, so that a drift of the machine falls on all of them "
        "alike. The exponent is the slope of an ordinary least "
        "squares line through the medians on log-log axes; its interval is Student's t, and says "
        "how well one line suits these lengths.</p></section>"
    )
