"""The command `attnserve-loadtest simulate`."""

import argparse
import sys
from pathlib import Path

from attnserve_proto.commands import INTERRUPTED, Loading, Progress, values

from attnserve_loadtest import parsing
from attnserve_loadtest.load.slo import read_slo
from attnserve_loadtest.replay_command import add_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Simulates what recorded traffic would find at clusters of several sizes, by service times "
        "of a report: a discrete-event simulation, not a measurement. Writes simulation.json, "
        ".csv, .png and .html."
    )
    add_trace(parser)
    add = parser.add_argument
    add(
        "--report",
        type=values.path,
        required=True,
        metavar="load.json",
        help="of `load` or `replay` with sessions: where the service times are",
    )
    add(
        "--servers",
        type=values.ascending(values.integer(1, 100_000)),
        default=(1, 2, 5, 10, 20, 50, 100),
        metavar="N,N,...",
        help="sizes of the cluster; 1,2,5,10,20,50,100",
    )
    add(
        "--slo",
        type=read_slo,
        default=(),
        metavar="BOUND,...",
        help="[first:|between:]pN=TIME: first:p95=0.2s,between:p99=50ms",
    )
    add(
        "--prefix-tokens",
        type=parsing.count,
        default=0,
        metavar="N",
        help="tokens of prefixes that each server keeps; 0",
    )
    add("--price-per-hour", type=parsing.positive_float, metavar="PRICE", help="of one server")
    add("--seed", type=parsing.count, default=0, help="of the choice of servers; 0")
    add("--out", type=values.path, default=Path("reports/simulation"), metavar="DIR")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LoadTestError: it cannot go on; the message is one line for the user.
    """
    with Loading():
        from attnserve_loadtest.load.sizing import Sizing, simulate_sizes
        from attnserve_loadtest.load.trace import read_trace
        from attnserve_loadtest.report.files import make_folder
        from attnserve_loadtest.report.simulation_files import finish

    trace = read_trace(parsed.trace, parsed.limit)
    make_folder(parsed.out)
    sizing = Sizing(
        sizes=parsed.servers,
        speed=parsed.speed,
        length_scale=parsed.length_scale,
        prefix_tokens=parsed.prefix_tokens,
        price_per_hour=parsed.price_per_hour,
        seed=parsed.seed,
    )
    total = len(trace.requests) * len(parsed.servers)
    with Progress(total, "simulated requests") as progress:

        def step(count: int) -> None:
            for _ in range(count):
                progress.step()

        report = simulate_sizes(trace, parsed.report, sizing, parsed.slo, step=step)
    finish(report, parsed.out)
    if not report.complete:
        print("interrupted: these are the sizes that were whole by then", file=sys.stderr)
    return 0 if report.complete else INTERRUPTED
