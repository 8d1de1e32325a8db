"""The command `attnserve-loadtest decode`."""

import argparse
import sys
from pathlib import Path

from attnserve_proto.commands import INTERRUPTED, Loading, access_of, add_access, values

from attnserve_loadtest import parsing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "KV sessions arrive at a rate, prefill, generate token by token, pause half-way and end. "
        "Measures the time between tokens and how many come within a bound. Writes decode.json, "
        ".csv and .png."
    )
    add = parser.add_argument
    add("--target", type=parsing.target, default="127.0.0.1:8001", metavar="HOST:PORT")
    add_access(parser)
    add("--model", type=values.name, required=True, metavar="NAME", help="a causal core model")
    add("--rate", type=parsing.positive_float, default=2.0, help="sessions a second; 2")
    add("--duration", type=parsing.seconds, default=30.0, help="seconds of arrivals; 30")
    add("--prompt", type=parsing.span, default=(32, 512), metavar="N[-N]", help="tokens; 32-512")
    add("--tokens", type=parsing.span, default=(16, 128), metavar="N[-N]", help="generated; 16-128")
    add("--pause", type=values.seconds, default=0.5, help="seconds, half-way; 0.5")
    add("--layers", type=parsing.positive_int, default=4, help="of the callers' model; 4")
    add("--bound-ms", type=parsing.positive_float, default=50.0, help="between tokens; 50")
    add("--timeout", type=parsing.seconds, default=60.0, help="seconds a request; 60")
    add("--seed", type=parsing.count, default=0, help="of arrivals and lengths; 0")
    add("--out", type=values.path, default=Path("reports/decode"), metavar="DIR")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LoadTestError: it cannot go on; the message is one line for the user.
    """
    # Imported here: matplotlib takes its time, and other commands do without.
    with Loading():
        from attnserve_loadtest.decode_load import DecodeSettings, run_decode
        from attnserve_loadtest.decode_report import findings, write_decode_report
        from attnserve_loadtest.report.files import make_folder

    access = access_of(parsed, [parsed.target])
    make_folder(parsed.out)
    settings = DecodeSettings(
        rate=parsed.rate,
        seconds=parsed.duration,
        prompt=parsed.prompt,
        tokens=parsed.tokens,
        pause=parsed.pause,
        num_layers=parsed.layers,
        bound_ms=parsed.bound_ms,
        seed=parsed.seed,
    )
    report = run_decode(
        parsed.target, parsed.model, settings, access, timeout=parsed.timeout, progress=_progress
    )
    for sentence in findings(report):
        print(f"- {sentence}")
    for path in write_decode_report(report, parsed.out):
        print(path)
    if not report.complete:
        print("interrupted: this is what was measured until then", file=sys.stderr)
    return 0 if report.complete else INTERRUPTED


def _progress(sessions: int, left: float) -> None:
    if sys.stderr.isatty():
        print(f"\r{sessions} sessions, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
