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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import serving
from handmade import attention, write_core

BIN = Path(sys.executable).parent
# Behind it comes the module of the entry point, then Ctrl-C is taken care of.
FIRST = "attnserve_proto.starting"
NOBODY = "127.0.0.1:1"
CALL = ["--target", NOBODY, "--timeout", "0.2"]
LOADTEST = ["--model", "m", "--target", NOBODY]
COMMANDS = {
    "info": ["attnserve", "info", *CALL],
    "inspect": ["attnserve", "inspect", "x", "--model", "m", "--out", "page.html", *CALL],
    "server": ["attnserve-server", "--repository", ".", "--port", "0", "--metrics-port", "-1"],
    "export": ["attnserve-export", "core", "--out", "models", "--name", "m", "--num-heads", "2",
               "--head-dim", "8"],
    "scaling": ["attnserve-loadtest", "scaling", *LOADTEST],
    "load": ["attnserve-loadtest", "load", "--seq-lens", "16", *LOADTEST],
    "decode": ["attnserve-loadtest", "decode", *LOADTEST],
    "context": ["attnserve-loadtest", "context", *LOADTEST],
    "cluster": ["attnserve-cluster", "status", "--address", NOBODY],
}  # fmt: skip


class Ended:
    """How a process ended that got Ctrl-C once it had imported a module that `at` says yes to.

    Attributes:
        code: its exit code.
        said: the lines of its standard error that are its own.
        reached: False if there was no such module within 20 s, and it got Ctrl-C then.
    """

    def __init__(
        self, name: str, folder: Path, at: Callable[[str], bool], address: str = NOBODY
    ) -> None:
        program, *words = COMMANDS[name]
        process = subprocess.Popen(
            [BIN / program, *(address if word == NOBODY else word for word in words)],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}, process_group=0,
        )  # fmt: skip

        def interrupt() -> None:
            # As a terminal does: to all processes of the group.
            os.killpg(process.pid, signal.SIGINT)

        late = threading.Timer(20, interrupt)
        late.start()
        self.reached, self.said = False, []
        assert process.stderr is not None
        with process:
            for line in process.stderr:
                if not line.startswith("import time:"):
                    self.said.append(line.rstrip())
                elif not self.reached and at(line.rpartition("|")[2].strip()):
                    late.cancel()
                    interrupt()
                    self.reached = True
        late.cancel()
        self.code = process.returncode


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
        ("cluster", "first"),
        ("cluster", "ray._raylet"),
    ],
)
def test_ctrl_c_while_modules_load_is_one_line(name: str, module: str, tmp_path: Path) -> None:
    at = Counter(3) if module == "first" else lambda imported: imported == module
    ended = Ended(name, tmp_path, at)
    program = COMMANDS[name][0]
    assert ended.reached
    assert ended.code == 130, ended.said
    assert ended.said == [f"{program}: interrupted; nothing was left half written"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("models")
    write_core(folder, "m", attention(2, 8, mask="causal"))
    with serving.process(folder) as server:
        yield server.address


@pytest.mark.slow
@pytest.mark.needs_library
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_at_many_moments_is_one_line(name: str, address: str, tmp_path: Path) -> None:
    counted = Counter(1 << 30)
    Ended(name, tmp_path, counted, address)  # for 20 s, if it takes so long
    for most in range(3, counted.seen, max(1, counted.seen // 40)):
        folder = tmp_path / str(most)
        folder.mkdir()
        ended = Ended(name, folder, Counter(most), address)
        # Progress is no line of the end's.
        own = [line for line in ended.said if not re.match(r"\[ *[0-9.]+ s\] ", line)]
        where = (most, ended.code, ended.said)
        if name == "cluster":
            own = own[-1:]  # Ray loads modules as it ends: what was wrong has been said by then
        if ended.code == 130:
            assert len(own) == 1, where
            assert "interrupted" in own[0], where
        elif ended.code == 1:
            assert len(own) == 1, where
            # It had begun to work, and has nothing to show; nobody's Ray cluster is there.
            said = "interrupted before anything was measured"
            assert said in own[0] or name in ("inspect", "cluster"), where
        else:
            # The server drains; a short call was quicker than Ctrl-C.
            assert (name in ("server", "info"), ended.code) == (True, 0), where
            assert "Traceback" not in "".join(own), where


class Counter:
    """Says yes to the import that is so many behind the first module of the project's own."""

    def __init__(self, most: int) -> None:
        self.seen, self._most = 0, most

    def __call__(self, imported: str) -> bool:
        if self.seen or imported == FIRST:
            self.seen += 1
        return self.seen == self._most
