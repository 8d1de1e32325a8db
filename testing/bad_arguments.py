"""What options of each kind do not take, and how a command is to answer it."""

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator

HUGE, NOT_UTF8 = "9" * 400, "a\udcff"
BAD = {
    "number": ("x", "", "nan", "inf", "-1e9", HUGE, "1 2", "0x10"),
    "real": ("x", "", "nan", "inf", "-1e400", HUGE, "1 2"),
    "numbers": ("x", "", "nan", "1,,2", "-1e9", HUGE, "1;2"),
    "reals": ("x", "", "nan", "1,,2", "-inf", HUGE, "1;2"),
    "span": ("x", "", "nan", "2-1", "0-3", HUGE, "1-"),
    "choice": ("x", "", "nan", HUGE),
    "name": ("", "a/b", ".a", "ä", "a b", HUGE, NOT_UTF8),
    "names": ("", "a,", "a/b", HUGE),
    "path": ("", "a\0b", HUGE, "a/" * 3000),
    "text": ("", "a\0b", NOT_UTF8),
    "title": ("a\nb", "a" * 2000, NOT_UTF8),
    "target": ("", "nan", "host", "host:0", "host:99999", "::1:80", "a b:1", f"{HUGE}:1"),
    "arrivals": ("x", "", "bursts", "bursts:1", "bursts:-2", "poisson:2", f"bursts:{HUGE}"),
    "slo": ("x", "", "p99", "p0=5ms", "p100=1ms", "p99=5", "p99=-5ms", "p99=0ms", "p99=2h",
            "p99=5ms,p99=6ms", "p99=5ms,", "mean=5ms", f"p99={HUGE}ms"),
    "roles": ("", "root", "infer,infer", "infer,", "Admin", HUGE),
    "host": ("", "a b", "1::2::3", "[::1", "unix:", f"unix:{HUGE}", HUGE),
}  # fmt: skip


def actions(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, argparse.Action]]:
    """(path of subcommands, what an option is called, its action) of all that take a value."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, each in action.choices.items():
                yield from actions(each, (*path, name))
        elif action.nargs != 0:
            name = (
                action.option_strings[0]
                if action.option_strings
                else str(action.metavar or action.dest)
            )
            yield path, name, action


def words_of(name: str, given: str) -> list[str]:
    """What is given to an option, or in the place of an argument without a name."""
    return [f"{name}={given}"] if name.startswith("--") else [given]


def wrongly_answered(
    run: Callable[[list[str]], object], words: list[str], name: str, *, helped: bool = True
) -> list[tuple[list[str], str]]:
    """The words, and what was said, unless they are refused as they should be.

    That is with code 2 and in one line, which names the argument, what was given and what is
    allowed, and says where the options are explained.

    Args:
        run: takes the words.
        words: of the command line, one of them wrong.
        name: of the argument that is wrong.
        helped: False for what others print behind their usage (Locust).
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(words)
            return [(words, "accepted")]
        except SystemExit as ended:
            code = ended.code
    said = err.getvalue()
    lines = said.splitlines() or [""]
    known = f"argument {name}: " in lines[-1] and (
        "given" in lines[-1] or "invalid choice" in lines[-1]
    )
    line = len(lines[-1]) < 1000 and (
        not helped or (len(lines) == 1 and lines[-1].endswith("--help`"))
    )
    return [] if code == 2 and not out.getvalue() and known and line else [(words, said)]
