"""The sections of a benchmark: which are asked for, measured one by one, printed and written."""

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
from attnserve_proto.commands import Parser, values
from serving_report import Section


def arguments(
    doc: str,
    names: Sequence[str],
    repository: str = "take `causal` from there instead of exporting it",
) -> Parser:
    """A parser with the options that all such benchmarks have; `sections` are a tuple."""
    parser = common.arguments(doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--sections",
        type=values.listed(values.one_of(names)),
        default=tuple(names),
        help="which, separated by commas (default: all)",
    )
    add("--repository", type=values.path, help=repository)
    add("--markdown", type=values.path, help="also write the tables to this file")
    return parser


def measured(
    names: Sequence[str], made: Mapping[str, Callable[[], Section]]
) -> tuple[list[Section], dict[str, str]]:
    """Measure sections one by one and print each.

    Returns:
        Those that could be measured, and why the others could not.
    """
    done: list[Section] = []
    failed: dict[str, str] = {}
    for name in names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            done.append(made[name]())
        except Exception as error:  # the other sections can still be measured
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        print(done[-1].text(), flush=True)
    return done, failed


def write(
    benchmark: str,
    options: argparse.Namespace,
    done: Sequence[Section],
    failed: Mapping[str, str],
    **more: Any,
) -> int:
    """Write figures and tables to where `options` say, and print how many bars are met.

    Args:
        more: what else the JSON is to hold, before the sections.

    Returns:
        The exit status: 1 if a section could not be measured.
    """
    figures = {section.name: section.figures() for section in done}
    content = {"benchmark": benchmark, **more, "sections": figures, "failed": dict(failed)}
    common.write_json(options.json, content)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text("\n".join(section.markdown() for section in done))
    bars = [bar for section in done for bar in section.bars]
    print(f"bars met: {sum(bar.met for bar in bars)} of {len(bars)}")
    for name, reason in failed.items():
        print(f"{name}: could not be measured: {reason}")
    return 1 if failed else 0
