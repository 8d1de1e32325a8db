"""A fake server in a process of its own, and the commands, also in processes of their own.

Locust patches the standard library for gevent; that must not reach the process of the tests.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import free_port

TESTS = Path(__file__).parent
LOCUSTFILE = TESTS.parent / "locustfile.py"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def target() -> Iterator[str]:
    """Address of a fake server; it ends when its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "fake_attention_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address
    yield address
    process.stdin.close()
    process.stdout.close()
    assert process.wait(timeout=10) == 0


@pytest.fixture
def loadtest() -> Run:
    """Runs `attnserve-loadtest` with arguments."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "attnserve_loadtest", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def locust() -> Run:
    """Runs Locust on the package's locustfile without its web UI."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        port = str(free_port())  # Locust's own may be another test's
        ports = ["--master-port", port, "--master-bind-port", port]
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "locust",
                "-f",
                str(LOCUSTFILE),
                "--headless",
                *ports,
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run
