"""The command `attnserve-loadtest load`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from attnserve_proto.commands import INTERRUPTED, Loading, access_of, add_access, values

from attnserve_loadtest import parsing
from attnserve_loadtest.load.arrivals import POISSON, read_arrivals
from attnserve_loadtest.load.slo import read_slo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Offers load as it comes from outside: requests are due at times of their own, and latency "
        "counts from then. By default the rate rises until the servers no longer keep up. Writes "
        "load.json, .csv, .png and .html."
    )
    add_common(parser)
    add = parser.add_argument
    add(
        "--seq-lens",
        type=parsing.weighted_seq_lens,
        default=((512,), (1.0,)),
        metavar="N[:W],...",
        help="lengths, and how often each comes: 128:3,1024:1; 512",
    )
    loads = parser.add_mutually_exclusive_group()
    loads.add_argument(
        "--ramp",
        type=parsing.rate_span,
        default=(10.0, 1e5),
        metavar="LOW-HIGH",
        help="requests/s, from LOW until it is too much; 10-100000",
    )
    loads.add_argument(
        "--rates", type=parsing.rates, metavar="N,N,...", help="instead: exactly these requests/s"
    )
    loads.add_argument(
        "--callers",
        type=parsing.span,
        metavar="LOW-HIGH",
        help="instead: callers who wait for their answer, until they are too many",
    )
    add(
        "--arrivals",
        type=read_arrivals,
        default=POISSON,
        metavar="KIND",
        help="poisson, constant or bursts:N; poisson",
    )
    add(
        "--sessions",
        type=values.number(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of KV sessions among the requests, 0..1; 0",
    )
    add("--prompt", type=parsing.span, default=(32, 512), metavar="N[-N]", help="tokens; 32-512")
    add("--tokens", type=parsing.span, default=(16, 128), metavar="N[-N]", help="made; 16-128")
    add("--think", type=values.seconds, default=0.0, help="mean rest of a session's user, s; 0")
    add(
        "--cancel",
        type=values.number(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of callers who give up, 0..1; 0",
    )
    add("--cancel-after", type=values.seconds, default=0.05, help="seconds until they do; 0.05")
    add("--duration", type=parsing.seconds, default=10.0, help="seconds of each load; 10")
    add("--warmup", type=values.seconds, default=1.0, help="seconds before it; 1")
    add(
        "--refinements",
        type=values.integer(0, 20),
        default=3,
        help="loads between the last kept up with and the first not; 3",
    )
    add("--out", type=values.path, default=Path("reports/load"), metavar="DIR")
    parser.set_defaults(run=run)


def add_common(parser: argparse.ArgumentParser) -> None:
    """What replaying a trace takes as well."""
    add = parser.add_argument
    add(
        "--target",
        type=parsing.targets,
        default=("127.0.0.1:8001",),
        metavar="HOST:PORT[,...]",
        help="several share the load; 127.0.0.1:8001",
    )
    add_access(parser)
    add("--model", type=values.name, required=True, metavar="NAME")
    add("--variant", type=values.name, metavar="NAME", help="default: the server picks")
    add("--layers", type=parsing.positive_int, default=4, help="of the sessions; 4")
    add(
        "--slo",
        type=read_slo,
        default=(),
        metavar="BOUND,...",
        help="[latency:|first:|between:]pN=TIME: p99=50ms, first:p95=0.2s",
    )
    add(
        "--price-per-hour",
        type=parsing.positive_float,
        metavar="PRICE",
        help="of one server: then what a million tokens of context cost",
    )
    add("--clients", type=values.integer(1, 64), default=2, help="processes that send; 2")
    add("--timeout", type=parsing.seconds, default=30.0, help="seconds a request; 30")
    add("--seed", type=parsing.count, default=0, help="of arrivals, lengths and inputs; 0")


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LoadTestError: it cannot go on; the message is one line for the user.
    """
    with Loading():
        from attnserve_loadtest.load.plan import Cancel, Load
        from attnserve_loadtest.load.requests import Mix, Span
        from attnserve_loadtest.load.run import Steps, find_servers, run_loads
        from attnserve_loadtest.report.files import make_folder
        from attnserve_loadtest.report.load_files import finish
        from attnserve_loadtest.report.load_schema import LoadSettings
        from attnserve_loadtest.report.load_text import said

    access = access_of(parsed, parsed.target)
    make_folder(parsed.out)
    seq_lens, weights = parsed.seq_lens
    mix = Mix(seq_lens, weights, parsed.sessions, Span(*parsed.prompt), Span(*parsed.tokens),
              parsed.think)  # fmt: skip
    _check_bounds(parsed)
    found = find_servers(
        parsed.target,
        parsed.model if mix.lengths() else None,
        parsed.model if parsed.sessions else None,
        variant=parsed.variant or "",
        seq_lens=mix.lengths(),
        num_layers=parsed.layers,
        timeout=parsed.timeout,
        seed=parsed.seed,
        access=access,
    )
    load = Load(
        found.servers,
        parsed.duration,
        parsed.warmup,
        arrivals=parsed.arrivals,
        mix=mix,
        cancel=Cancel(parsed.cancel, parsed.cancel_after) if parsed.cancel else None,
        seed=parsed.seed,
    )
    settings = LoadSettings(
        model=parsed.model,
        variant=parsed.variant or "",
        session_model=parsed.model if parsed.sessions else None,
        num_layers=parsed.layers,
        arrivals="closed" if parsed.callers else str(parsed.arrivals),
        seq_lens=tuple(mix.lengths()),
        weights=weights if mix.lengths() else (),
        sessions=parsed.sessions,
        prompt=parsed.prompt,
        tokens=parsed.tokens,
        think_seconds=parsed.think,
        cancel_share=parsed.cancel,
        cancel_seconds=parsed.cancel_after,
        slo=tuple(map(str, parsed.slo)),
        step_seconds=parsed.duration,
        warmup_seconds=parsed.warmup,
        clients=parsed.clients,
        timeout_seconds=parsed.timeout,
        seed=parsed.seed,
        trace="",
        speed=1.0,
    )
    steps = Steps(parsed.ramp, is_ramp=True, refinements=parsed.refinements)
    if parsed.callers:
        low, high = parsed.callers
        steps = Steps((low, high), is_ramp=True, closed=True, refinements=parsed.refinements)
    elif parsed.rates:
        steps = Steps(parsed.rates, is_ramp=False)
    report = run_loads(
        found,
        load,
        steps,
        settings,
        parsed.slo,
        price_per_hour=parsed.price_per_hour,
        progress=lambda step: print(f"{_clear()}{said(step)}", file=sys.stderr, flush=True),
        tick=lambda elapsed: _tick(elapsed, parsed.warmup + parsed.duration),
    )
    finish(report, parsed.out)
    return 0 if report.complete else INTERRUPTED


def _tick(elapsed: float, whole: float) -> None:
    """On a terminal, how far a load is."""
    if sys.stderr.isatty():
        print(f"{_clear()}{elapsed:.0f} of {whole:.0f} s", end="", file=sys.stderr, flush=True)


def _clear() -> str:
    return "\r\x1b[K" if sys.stderr.isatty() else ""


def _check_bounds(parsed: Any) -> None:
    """A bound on what there is none of would never be met."""
    from attnserve_loadtest.errors import LoadTestError

    for bound in parsed.slo:
        if bound.quantity == "between" and not parsed.sessions:
            raise LoadTestError(f"--slo: given {bound}, but there are no sessions: use --sessions")
        if bound.quantity == "latency" and parsed.sessions == 1:
            raise LoadTestError(
                f"--slo: given {bound}, but there are only sessions: bound first: or between:"
            )
