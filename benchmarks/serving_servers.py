"""Servers of the serving benchmark: processes of their own, whose CPU time and memory are known."""

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 90.0


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        address: host:port.
        process: its first process; it may have started others.
        said: what its ready line said besides the address.
    """

    address: str
    process: psutil.Process
    said: str = ""

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far."""
        return sum(self._each(lambda p: sum(p.cpu_times()[:2])))

    def memory_bytes(self) -> int:
        """Resident memory of all its processes; what they share counts in each."""
        return int(sum(self._each(lambda p: p.memory_info().rss)))

    def _each(self, figure: Callable[[psutil.Process], float]) -> list[float]:
        figures = []
        for process in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                figures.append(figure(process))
        return figures


def attnserve(repository: Path, *options: str) -> contextlib.AbstractContextManager[Server]:
    """attnserve-server on the CPU."""
    command = [sys.executable, "-m", "attnserve_server.cli", "--repository", str(repository)]
    command += ["--port", "0", "--metrics-port", "-1", "--log-level", "error"]
    return start([*command, "--provider", "cpu", *options])


def echo() -> contextlib.AbstractContextManager[Server]:
    """The bare grpcio echo."""
    return start([sys.executable, str(Path(__file__).with_name("echo_server.py"))])


@contextlib.contextmanager
def start(command: Sequence[str]) -> Iterator[Server]:
    """Start a server, and stop it and all that it started when the `with` block ends.

    Args:
        command: prints a line with `listening on HOST:PORT` once it can be called or soon will.

    Raises:
        RuntimeError: it ended instead; the message has the last line that it printed.
    """
    with tempfile.NamedTemporaryFile() as output:
        # Its own group: a terminal's interrupt is for this process, which stops the servers.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, process_group=0
        )
        tree = psutil.Process(process.pid)
        try:
            address, said = _ready(process, Path(output.name))
            yield Server(address, tree, said)
        finally:
            _stop(process, tree)


def _ready(process: subprocess.Popen[bytes], output: Path) -> tuple[str, str]:
    deadline = time.monotonic() + START_SECONDS
    while True:
        ended = process.poll() is not None or time.monotonic() > deadline
        text = output.read_text(errors="replace")
        found = re.search(r"listening on (127\S+) (.*)\n", text)
        if found:
            return found[1], found[2]
        if ended:
            lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing"]
            raise RuntimeError(f"did not start; the last that it said: {lines[-1]}")
        time.sleep(0.02)


def _stop(process: subprocess.Popen[bytes], tree: psutil.Process) -> None:
    descendants = tree.children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
