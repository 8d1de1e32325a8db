"""The command `attnserve-loadtest context`."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from attnserve_loadtest import parsing
from attnserve_loadtest.errors import LoadTestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Places a fact at several depths of contexts of several lengths, asks for it at the end, "
        "and measures the weight that each head of a transformer model gives to it, beside uniform "
        "attention and the filler next to it, and over how many keys the question spreads its "
        "weight. Writes context.json, .csv, .png and .html."
    )
    add = parser.add_argument
    add("--target", type=parsing.target, default="127.0.0.1:8001", metavar="HOST:PORT")
    add("--model", required=True, metavar="NAME", help="a transformer model")
    add(
        "--seq-lens",
        type=parsing.seq_lens,
        default=(64, 96, 128, 192, 256, 384, 512),
        metavar="N,N,...",
        help="tokens; default: 64,96,128,192,256,384,512",
    )
    add(
        "--depths",
        type=_depths,
        default=(0.0, 0.25, 0.5, 0.75, 1.0),
        metavar="D,D,...",
        help="0 is first, 1 right before the question; default: 0,0.25,0.5,0.75,1",
    )
    add("--trials", type=parsing.positive_int, default=4, help="contexts of each cell; 4")
    add("--layers", type=_indices, metavar="N,N,...", help="default: all")
    add("--heads", type=_indices, metavar="N,N,...", help="default: all")
    add("--filler", type=Path, metavar="FILE", help="text to take the filler's sentences from")
    add("--timeout", type=parsing.positive_float, default=60.0, help="seconds a request; 60")
    add("--seed", type=parsing.count, default=0, help="of the filler and its order; 0")
    add("--out", type=Path, default=Path("reports/context"), metavar="DIR")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LoadTestError: it cannot go on; the message is one line for the user.
    """
    # Imported here: matplotlib takes its time, and other commands do without.
    from attnserve_loadtest.context import run_context
    from attnserve_loadtest.context_report import findings, write_context_report
    from attnserve_loadtest.context_schema import ContextSettings
    from attnserve_loadtest.report.files import make_folder

    settings = ContextSettings(
        seq_lens=parsed.seq_lens,
        depths=parsed.depths,
        trials=parsed.trials,
        seed=parsed.seed,
        filler=parsed.filler.name if parsed.filler else "grammar",
    )
    make_folder(parsed.out)
    progress = _Progress(len(settings.seq_lens) * len(settings.depths) * settings.trials)
    report = run_context(
        parsed.target,
        parsed.model,
        settings,
        layers=parsed.layers,
        heads=parsed.heads,
        filler=_sentences(parsed.filler) if parsed.filler else (),
        timeout=parsed.timeout,
        progress=progress,
    )
    progress.end()
    for sentence in findings(report):
        print(f"- {sentence}")
    for path in write_context_report(report, parsed.out):
        print(path)
    return 0


class _Progress:
    """One line that changes on a terminal; one line a length elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._length = total, 0, 0
        self._started, self._live = time.monotonic(), sys.stderr.isatty()

    def __call__(self, seq_len: int, depth: float, trial: int) -> None:
        seconds = time.monotonic() - self._started
        line = f"[{seconds:6.1f} s] {self._done}/{self._total} contexts; {seq_len} tokens"
        if self._live:
            print(f"\r{line}, depth {depth:g}, trial {trial} ", end="", file=sys.stderr, flush=True)
        elif seq_len != self._length:
            print(line, file=sys.stderr, flush=True)
        self._length = seq_len
        self._done += 1

    def end(self) -> None:
        """The last line."""
        seconds = time.monotonic() - self._started
        start = "\r" if self._live else ""
        print(
            f"{start}[{seconds:6.1f} s] {self._done} contexts{' ' * 40}".rstrip(), file=sys.stderr
        )


def _sentences(path: Path) -> Sequence[str]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"--filler: cannot read {path}: {error}") from None
    found = [" ".join(each.split()) for each in re.split(r"(?<=[.!?])\s+", text)]
    return list(dict.fromkeys(each for each in found if each))


def _depths(text: str) -> tuple[float, ...]:
    try:
        found = sorted({float(part) for part in parsing.names(text)})
    except ValueError:
        found = [-1.0]
    if not all(0 <= each <= 1 for each in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers from 0 to 1")
    return tuple(found)


def _indices(text: str) -> tuple[int, ...]:
    return tuple(sorted({parsing.count(part) for part in parsing.names(text)}))
