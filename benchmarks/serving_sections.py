"""The sections of a benchmark: which are asked for, measured one by one, printed and written."""

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from serving_report import Section


def arguments(doc: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the options that all such benchmarks have."""
    parser = common.arguments(doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--sections", default=",".join(names), help="which, separated by commas (default: all)")
    add("--repository", type=Path, help="take `causal` from there instead of exporting it")
    add("--markdown", type=Path, help="also write the tables to this file")
    return parser


def parsed(parser: argparse.ArgumentParser, names: Sequence[str]) -> argparse.Namespace:
    """The options given, `sections` as a list; ends the program if one is unknown."""
    options = parser.parse_args()
    options.sections = options.sections.split(",")
    unknown = sorted(set(options.sections) - set(names))
    if unknown:
        parser.error(f"--sections: given {', '.join(unknown)}; known: {', '.join(names)}")
    return options


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
