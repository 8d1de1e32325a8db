"""The command `attnserve-loadtest`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from attnserve_proto import commands
from attnserve_proto.commands import (
    INTERRUPTED,
    CommandError,
    Loading,
    Parser,
    access_of,
    add_access,
    add_missing_command,
    extension,
    values,
)

from attnserve_loadtest import __version__, parsing
from attnserve_loadtest import compare_command as compare
from attnserve_loadtest import decode_command as decode
from attnserve_loadtest import forecast_command as forecast
from attnserve_loadtest import load_command as load
from attnserve_loadtest import replay_command as replay
from attnserve_loadtest import simulate_command as simulate
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.report.schema import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        The exit status: 0, 1 for what cannot be done, 2 for wrong arguments, 130 after an
        interruption.
    """
    return commands.run("attnserve-loadtest", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        if getattr(parsed, "out", None) is not None:
            commands.check_folder("--out", parsed.out)
        status: int = parsed.run(parsed)
    except LoadTestError as error:
        where = f"see `attnserve-loadtest {parsed.command} --help`"
        raise CommandError(f"{error}; {where}") from None
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="attnserve-loadtest",
        description="Measures attnserve servers. For load tests with a web UI run "
        "`locust -f loadtest/locustfile.py --host HOST:PORT`.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    found = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    _add_scaling(found.add_parser("scaling", help="how latency grows with seq_len"))
    help_of_context = "a fact in a growing context"
    add_context = extension("attnserve_loadtest.commands", "context")
    if add_context is None:
        add_missing_command(found, "context", "attnserve-lens[context]", help=help_of_context)
    else:
        add_context(found.add_parser("context", help=help_of_context))
    decode.add_arguments(found.add_parser("decode", help="KV sessions that come and go"))
    load.add_arguments(found.add_parser("load", help="offered load, up to the knee"))
    replay.add_arguments(found.add_parser("replay", help="recorded traffic, as it came"))
    simulate.add_arguments(found.add_parser("simulate", help="the same at clusters of any size"))
    compare.add_arguments(found.add_parser("compare", help="two reports: what is faster"))
    forecast.add_arguments(found.add_parser("forecast", help="lengths that were not measured"))
    _add_report(found.add_parser("report", help="draw a report.json or load.json again"))
    return parser


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures a model at several sequence lengths with Locust, fits the exponent of latency "
        "in seq_len, and writes report.json, .csv, .png and .html. Several models or variants "
        "make one line each."
    )
    add = parser.add_argument
    add("--target", type=parsing.target, default="127.0.0.1:8001", metavar="HOST:PORT")
    add_access(parser)
    add("--model", type=parsing.names, required=True, metavar="NAME[,NAME...]")
    add(
        "--variant",
        type=parsing.names,
        default=("",),
        metavar="NAME[,NAME...]",
        help="default: the server picks",
    )
    add(
        "--seq-lens",
        type=parsing.seq_lens,
        default=(64, 128, 256, 512, 1024),
        metavar="N,N,...",
        help="default: 64,128,256,512,1024",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--requests",
        type=parsing.positive_int,
        metavar="N",
        help="measured requests of each length, over all rounds; default: 40",
    )
    amount.add_argument(
        "--duration",
        type=parsing.seconds,
        metavar="SECONDS",
        help="instead: measured seconds of each length, over all rounds",
    )
    add("--users", type=parsing.positive_int, default=1, help="requests under way at once; 1")
    add("--batch", type=parsing.positive_int, default=1, help="sequences a request; 1")
    add(
        "--rounds",
        type=parsing.positive_int,
        default=5,
        help="times to go through all lengths, in a random order each; 5",
    )
    add("--warmup", type=parsing.count, default=5, help="unmeasured requests of each length; 5")
    add(
        "--settle",
        type=parsing.count,
        default=1,
        help="unmeasured requests of each user whenever the length changes; 1",
    )
    add("--timeout", type=parsing.seconds, default=30.0, help="seconds a request; 30")
    add("--seed", type=parsing.count, default=0, help="of the inputs and the order; 0")
    add("--out", type=values.path, default=Path("reports/scaling"), metavar="DIR")
    parser.set_defaults(run=_run_scaling)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes .csv, .png and .html of a report.json or load.json, and prints its table."
    )
    parser.add_argument("json", type=values.path, metavar="report.json")
    parser.add_argument(
        "--out", type=values.path, metavar="DIR", help="default: where report.json lies"
    )
    parser.set_defaults(run=_run_report)


def _run_scaling(parsed: argparse.Namespace) -> int:
    # The runner patches the standard library: it comes before whatever opens sockets or threads.
    with Loading():
        from attnserve_loadtest.runner import run_scaling  # isort: skip
        from attnserve_loadtest.progress import make_progress
        from attnserve_loadtest.report.files import make_folder, write_report
        from attnserve_loadtest.report.terminal import make_console, print_report

    by_time = parsed.duration is not None
    settings = Settings(
        seq_lens=parsed.seq_lens,
        users=parsed.users,
        batch=parsed.batch,
        rounds=parsed.rounds,
        requests=None if by_time else parsed.requests or 40,
        duration_seconds=parsed.duration,
        warmup=parsed.warmup,
        settle=parsed.settle,
        timeout_seconds=parsed.timeout,
        seed=parsed.seed,
    )
    access = access_of(parsed, [parsed.target])
    make_folder(parsed.out)
    errors, console = make_console(stderr=True), make_console()
    report = run_scaling(
        parsed.target,
        parsed.model,
        parsed.variant,
        settings,
        access,
        lambda lanes, its: make_progress(lanes, its, errors),
    )
    paths = write_report(report, parsed.out)
    print_report(report, console)
    _print_paths(paths)
    return 0 if report.complete else INTERRUPTED


def _run_report(parsed: argparse.Namespace) -> int:
    with Loading():
        from attnserve_loadtest.report.files import write_report
        from attnserve_loadtest.report.json_file import read_json
        from attnserve_loadtest.report.load_files import finish
        from attnserve_loadtest.report.load_schema import LoadReport
        from attnserve_loadtest.report.terminal import make_console, print_report

    report = read_json(parsed.json)
    if isinstance(report, LoadReport):
        finish(report, parsed.out or parsed.json.parent)
        return 0
    paths = write_report(report, parsed.out or parsed.json.parent)
    print_report(report, make_console())
    _print_paths(paths)
    return 0


def _print_paths(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path)


if __name__ == "__main__":
    raise SystemExit(main())
