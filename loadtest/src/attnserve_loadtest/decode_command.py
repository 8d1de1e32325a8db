"""The command `attnserve-loadtest decode`."""

import argparse
import sys
from pathlib import Path

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
    add("--model", required=True, metavar="NAME", help="a causal core model")
    add("--rate", type=parsing.positive_float, default=2.0, help="sessions a second; 2")
    add("--duration", type=parsing.positive_float, default=30.0, help="seconds of arrivals; 30")
    add("--prompt", type=_span, default=(32, 512), metavar="N[-N]", help="tokens; 32-512")
    add("--tokens", type=_span, default=(16, 128), metavar="N[-N]", help="generated; 16-128")
    add("--pause", type=parsing.positive_float, default=0.5, help="seconds, half-way; 0.5")
    add("--layers", type=parsing.positive_int, default=4, help="of the callers' model; 4")
    add("--bound-ms", type=parsing.positive_float, default=50.0, help="between tokens; 50")
    add("--timeout", type=parsing.positive_float, default=60.0, help="seconds a request; 60")
    add("--seed", type=parsing.count, default=0, help="of arrivals and lengths; 0")
    add("--out", type=Path, default=Path("reports/decode"), metavar="DIR")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LoadTestError: it cannot go on; the message is one line for the user.
    """
    # Imported here: matplotlib takes its time, and other commands do without.
    from attnserve_loadtest.decode_load import DecodeSettings, run_decode
    from attnserve_loadtest.decode_report import findings, write_decode_report
    from attnserve_loadtest.report.files import make_folder

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
        parsed.target, parsed.model, settings, timeout=parsed.timeout, progress=_progress
    )
    for sentence in findings(report):
        print(f"- {sentence}")
    for path in write_decode_report(report, parsed.out):
        print(path)
    return 0


def _progress(sessions: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{sessions} sessions ", end="", file=sys.stderr, flush=True)


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    low = parsing.positive_int(first)
    high = parsing.positive_int(last) if last else low
    if high < low:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or N-N, the larger one last")
    return low, high
