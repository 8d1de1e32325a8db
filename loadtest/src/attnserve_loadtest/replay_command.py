"""The command `attnserve-loadtest replay`."""

import argparse
import sys
from pathlib import Path

from attnserve_proto.commands import INTERRUPTED, Loading, Progress, access_of, values

from attnserve_loadtest import parsing
from attnserve_loadtest.load_command import add_common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Replays recorded traffic: a CSV file of Azure's LLM inference traces or JSON lines of "
        "Mooncake's. Each request is a KV session of the recorded lengths; equal prefixes are "
        "shared. Writes load.json, .csv, .png and .html."
    )
    add_trace(parser)
    add_common(parser)
    parser.add_argument(
        "--as",
        dest="kind",
        choices=("sessions", "single"),
        default="sessions",
        help="single: requests with one answer, of the input's length; sessions",
    )
    parser.add_argument("--out", type=values.path, default=Path("reports/replay"), metavar="DIR")
    parser.set_defaults(run=run)


def add_trace(parser: argparse.ArgumentParser) -> None:
    """What simulating a trace takes as well."""
    parser.add_argument("trace", type=values.path, metavar="TRACE")
    add = parser.add_argument
    add("--speed", type=parsing.positive_float, default=1.0, help="times as fast as recorded; 1")
    add(
        "--length-scale",
        type=values.number(0, 1e3, above=True),
        default=1.0,
        help="what all lengths are multiplied by; 1",
    )
    add("--limit", type=parsing.positive_int, metavar="N", help="the first N requests alone")


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LoadTestError: it cannot go on; the message is one line for the user.
    """
    with Loading():
        from attnserve_loadtest.errors import LoadTestError
        from attnserve_loadtest.load.plan import Load
        from attnserve_loadtest.load.requests import Generation, Single
        from attnserve_loadtest.load.run import Steps, find_servers, run_loads
        from attnserve_loadtest.load.trace import read_trace
        from attnserve_loadtest.report.files import make_folder
        from attnserve_loadtest.report.load_files import finish
        from attnserve_loadtest.report.load_schema import LoadSettings
        from attnserve_loadtest.report.load_text import said

    trace = read_trace(parsed.trace, parsed.limit)
    single = parsed.kind == "single"
    arrivals = trace.arrivals(speed=parsed.speed, length_scale=parsed.length_scale, single=single)
    for bound in parsed.slo:
        if bound.quantity == ("between" if single else "latency"):
            allowed = "latency: or first:" if single else "first: or between:"
            raise LoadTestError(f"--slo: given {bound}, which these requests have not: {allowed}")
    access = access_of(parsed, parsed.target)
    make_folder(parsed.out)
    requests = [each.request for each in arrivals]
    lengths = sorted({each.seq_len for each in requests if isinstance(each, Single)})
    sessions = [each for each in requests if isinstance(each, Generation)]
    found = find_servers(
        parsed.target,
        parsed.model if single else None,
        None if single else parsed.model,
        variant=parsed.variant or "",
        seq_lens=lengths,
        num_layers=parsed.layers,
        timeout=parsed.timeout,
        seed=parsed.seed,
        access=access,
    )
    # The last request counts, too.
    seconds = max(arrivals[-1].due, 1e-3) * (1 + 1e-9)
    settings = LoadSettings(
        model=parsed.model,
        variant=parsed.variant or "",
        session_model=None if single else parsed.model,
        num_layers=parsed.layers,
        arrivals="trace",
        seq_lens=(),
        weights=(),
        sessions=0.0 if single else 1.0,
        prompt=_ends([each.prompt for each in sessions]),
        tokens=_ends([each.tokens for each in sessions]),
        think_seconds=0.0,
        cancel_share=0.0,
        cancel_seconds=0.0,
        slo=tuple(map(str, parsed.slo)),
        step_seconds=seconds,
        warmup_seconds=0.0,
        clients=parsed.clients,
        timeout_seconds=parsed.timeout,
        seed=parsed.seed,
        trace=f"{trace.name} ({trace.kind}, {len(arrivals)} requests)",
        speed=parsed.speed,
    )
    told = 0
    with Progress(max(1, int(seconds)), "seconds of the trace") as progress:

        def tick(elapsed: float) -> None:
            nonlocal told
            while told < min(int(elapsed), int(seconds)):
                told += 1
                progress.step()

        report = run_loads(
            found,
            Load(found.servers, seconds, 0.0, schedule=arrivals, seed=parsed.seed),
            Steps((0.0,), is_ramp=False),
            settings,
            parsed.slo,
            price_per_hour=parsed.price_per_hour,
            progress=lambda step: print(said(step), file=sys.stderr, flush=True),
            tick=tick,
        )
    finish(report, parsed.out)
    return 0 if report.complete else INTERRUPTED


def _ends(numbers: list[int]) -> tuple[int, ...]:
    return (min(numbers), max(numbers)) if numbers else ()
