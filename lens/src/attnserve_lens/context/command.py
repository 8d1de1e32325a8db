"""The command `attnserve-loadtest context`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from attnserve_loadtest import parsing
from attnserve_loadtest.errors import LoadTestError
from attnserve_proto.commands import INTERRUPTED, Loading, Progress, access_of, add_access, values


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
    add_access(parser)
    add("--model", type=values.name, required=True, metavar="NAME", help="a transformer model")
    add(
        "--seq-lens",
        type=parsing.seq_lens,
        default=(64, 96, 128, 192, 256, 384, 512),
        metavar="N,N,...",
        help="tokens; default: 64,96,128,192,256,384,512",
    )
    add(
        "--depths",
        type=values.ascending(values.number(0, 1)),
        default=(0.0, 0.25, 0.5, 0.75, 1.0),
        metavar="D,D,...",
        help="0 is first, 1 right before the question; default: 0,0.25,0.5,0.75,1",
    )
    add("--trials", type=parsing.positive_int, default=4, help="contexts of each cell; 4")
    add(
        "--layers", type=values.ascending(values.integer(0)), metavar="N,N,...", help="default: all"
    )
    add("--heads", type=values.ascending(values.integer(0)), metavar="N,N,...", help="default: all")
    add(
        "--filler",
        type=values.path,
        metavar="FILE",
        help="text to take the filler's sentences from",
    )
    add("--timeout", type=parsing.seconds, default=60.0, help="seconds a request; 60")
    add("--seed", type=parsing.count, default=0, help="of the filler and its order; 0")
    add("--out", type=values.path, default=Path("reports/context"), metavar="DIR")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        LoadTestError: it cannot go on; the message is one line for the user.
    """
    # Imported here: matplotlib takes its time, and other commands do without.
    with Loading():
        from attnserve_loadtest.report.files import make_folder

        from attnserve_lens.context.measure import run_context
        from attnserve_lens.context.report import findings, write_context_report
        from attnserve_lens.context.schema import ContextSettings

    settings = ContextSettings(
        seq_lens=parsed.seq_lens,
        depths=parsed.depths,
        trials=parsed.trials,
        seed=parsed.seed,
        filler=parsed.filler.name if parsed.filler else "grammar",
    )
    access = access_of(parsed, [parsed.target])
    make_folder(parsed.out)
    total = len(settings.seq_lens) * len(settings.depths) * settings.trials
    with Progress(total, "contexts") as progress:
        report = run_context(
            parsed.target,
            parsed.model,
            settings,
            access,
            layers=parsed.layers,
            heads=parsed.heads,
            filler=_sentences(parsed.filler) if parsed.filler else (),
            timeout=parsed.timeout,
            progress=lambda seq_len, depth, trial: progress.step(
                f"{seq_len} tokens, depth {depth:g}, trial {trial}"
            ),
        )
    for sentence in findings(report):
        print(f"- {sentence}")
    for path in write_context_report(report, parsed.out):
        print(path)
    complete = report.settings.seq_lens == settings.seq_lens
    if not complete:
        print("interrupted: these are the lengths that were measured", file=sys.stderr)
    return 0 if complete else INTERRUPTED


def _sentences(path: Path) -> Sequence[str]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"--filler: cannot read {path}: {error}") from None
    found = [" ".join(each.split()) for each in re.split(r"(?<=[.!?])\s+", text)]
    return list(dict.fromkeys(each for each in found if each))
