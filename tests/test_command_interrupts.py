"""Ctrl-C while a command's modules load: 130 and one line, at whatever moment it comes.

Each command is run as it is installed. Python says when a module has been imported
(PYTHONPROFILEIMPORTTIME): moments are counted by that, so that a busy machine changes none of them.
What comes before the first line of the project's own code, the interpreter's own beginning, is not
looked at.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
FIRST = "attnserve_proto.starting"  # what comes next comes when Ctrl-C has been taken care of
CALL = ["--target", "127.0.0.1:1", "--timeout", "0.2"]
COMMANDS = {
    "info": ["attnserve", "info", *CALL],
    "inspect": ["attnserve", "inspect", "x", "--model", "m", "--out", "page.html", *CALL],
    "server": ["attnserve-server", "--repository", ".", "--port", "0", "--metrics-port", "-1"],
    "export": ["attnserve-export", "core", "--out", "models", "--name", "m", "--num-heads", "2",
               "--head-dim", "8"],
    "scaling": ["attnserve-loadtest", "scaling", "--model", "m", "--target", "127.0.0.1:1"],
    "decode": ["attnserve-loadtest", "decode", "--model", "m", *CALL],
    "context": ["attnserve-loadtest", "context", "--model", "m", *CALL],
}  # fmt: skip


class Ended:
    """How a process ended that got Ctrl-C once it had imported a module that `at` says yes to.

    Attributes:
        code: its exit code.
        said: the lines of its standard error that are its own.
        reached: False if there was no such module within 20 s, and it got Ctrl-C then.
    """

    def __init__(self, name: str, folder: Path, at: Callable[[str], bool]) -> None:
        program, *words = COMMANDS[name]
        process = subprocess.Popen(
            [BIN / program, *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        )  # fmt: skip
        late = threading.Timer(20, process.send_signal, [signal.SIGINT])
        late.start()
        self.reached, self.said = False, []
        assert process.stderr is not None
        with process:
            for line in process.stderr:
                if not line.startswith("import time:"):
                    self.said.append(line.rstrip())
                elif not self.reached and at(line.rpartition("|")[2].strip()):
                    late.cancel()
                    process.send_signal(signal.SIGINT)
                    self.reached = True
        late.cancel()
        self.code = process.returncode


def check(name: str, ended: Ended) -> None:
    program = COMMANDS[name][0]
    own = [line for line in ended.said if not re.match(r"\[ *[0-9.]+ s\] ", line)]  # progress
    assert ended.code == 130, ended.said
    assert own == [f"{program}: interrupted; nothing was left half written"], ended.said


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("info", "first"),
        ("info", "numpy"),
        ("info", "attnserve_client"),
        ("server", "first"),
        ("server", "attnserve_dataplane"),
        ("export", "first"),
        ("export", "torch._C"),
        ("scaling", "first"),
        ("scaling", "gevent"),
    ],
)
def test_ctrl_c_while_modules_load_is_one_line(name: str, module: str, tmp_path: Path) -> None:
    at = Counter(2) if module == "first" else lambda imported: imported == module
    ended = Ended(name, tmp_path, at)
    assert ended.reached
    check(name, ended)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_at_many_moments_is_one_line(name: str, tmp_path: Path) -> None:
    counted = Counter(1 << 30)
    Ended(name, tmp_path, counted)  # to its end
    step = max(1, counted.seen // 40)
    for most in range(2, counted.seen, step):
        ended = Ended(name, tmp_path, Counter(most))
        if name == "server" and ended.code == 0:  # it serves, and drains
            assert "Traceback" not in "\n".join(ended.said)
        elif ended.reached and ended.code != 1:  # 1: it had ended, without a server to talk to
            check(name, ended)


class Counter:
    """Says yes to the import that is so many behind the first module of the project's own."""

    def __init__(self, most: int) -> None:
        self.seen, self._most = 0, most

    def __call__(self, imported: str) -> bool:
        if self.seen or imported == FIRST:
            self.seen += 1
        return self.seen == self._most
