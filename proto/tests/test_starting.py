"""Ctrl-C before, amid and after a command's work, each in a process of its own."""

import subprocess
import sys

import pytest

BEGIN = """
import signal, sys
from attnserve_proto import commands, starting
def ctrl_c():
    signal.raise_signal(signal.SIGINT)
"""
SAID = "p: interrupted; nothing was left half written\n"


def run(*lines: str, before: str = "") -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a program."""
    command = [sys.executable, "-c", "\n".join([BEGIN, *lines])]
    if before:
        command = ["sh", "-c", f'{before}; exec "$0" "$@"', *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "lines",
    [
        ("starting.start('p')", "ctrl_c()"),
        ("starting.start('p')", "commands.run('p', lambda: 0)", "ctrl_c()"),
        ("starting.start('p')", "sys.exit(commands.run('p', ctrl_c))"),
        ("starting.start('p')", "def work():", "  with commands.Loading(): ctrl_c()",
         "commands.run('p', work)"),
        ("starting.start('p')", "def work():", "  with commands.Loading(): pass", "  ctrl_c()",
         "sys.exit(commands.run('p', work))"),
        ("sys.exit(commands.run('p', ctrl_c))",),
    ],
)  # fmt: skip
def test_it_ends_the_process_with_one_line(lines: tuple[str, ...]) -> None:
    assert run(*lines, "print('went on')") == (130, "", SAID)


def test_amid_work_it_is_an_exception_that_the_work_may_answer() -> None:
    lines = ("def work():", "  try: ctrl_c()", "  except KeyboardInterrupt: print('kept')",
             "  return 3", "starting.start('p')", "sys.exit(commands.run('p', work))")  # fmt: skip
    assert run(*lines) == (3, "kept\n", "")


def test_an_error_that_a_library_makes_of_it_is_none() -> None:
    lines = ("def loads():", "  try: ctrl_c()",
             "  except KeyboardInterrupt: raise ImportError('a')",
             "def work():", "  try: loads()",
             "  except ImportError as error: raise RuntimeError('b') from error",
             "starting.start('p')", "sys.exit(commands.run('p', work))")  # fmt: skip
    assert run(*lines) == (130, "", SAID)
    lines = ("def work(): raise RuntimeError('b')", "starting.start('p')",
             "commands.run('p', work)")  # fmt: skip
    code, _, said = run(*lines)
    assert code == 1
    assert said.endswith("RuntimeError: b\n")


def test_a_handler_of_the_works_own_stays() -> None:
    lines = ("def work():", "  signal.signal(signal.SIGINT, lambda *_: print('mine'))",
             "  with commands.Loading(): ctrl_c()", "  return 0",
             "starting.start('p')", "commands.run('p', work)", "ctrl_c()")  # fmt: skip
    assert run(*lines) == (0, "mine\nmine\n", "")


def test_in_silence_nothing_else_is_said() -> None:
    lines = ("import os", "def say(text): os.write(2, text)", "starting.start('p')", "def work():",
             "  say(b'a')", "  with commands.Silence(): say(b'b')", "  say(b'c')",
             "  with commands.Loading(), commands.Silence(): say(b'd'), ctrl_c()")  # fmt: skip
    assert run(*lines, "commands.run('p', work)") == (130, "", f"ac{SAID}")


def test_where_it_is_ignored_it_stays_ignored() -> None:
    lines = ("starting.start('p')", "ctrl_c()", "print(commands.run('p', lambda: 7))")
    assert run(*lines, before="trap '' INT") == (0, "7\n", "")


def test_without_start_nothing_is_changed() -> None:
    lines = ("def work():", "  with commands.Loading(): ctrl_c()", "  return 0",
             "sys.exit(commands.run('p', work))")  # fmt: skip
    assert run(*lines) == (130, "", SAID)


def test_a_command_begins_before_anything_heavy_is_loaded() -> None:
    lines = ("del sys.modules['attnserve_proto.commands']",)
    assert run(*lines)[0] == 0
    program = "import sys; before = set(sys.modules); import attnserve_proto.starting;"
    program += "print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded <= {"attnserve_proto", "signal", "enum", "types", "operator", "functools",
                      "collections", "_collections", "_functools", "_operator", "itertools",
                      "keyword", "reprlib"}  # fmt: skip
