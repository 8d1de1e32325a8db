"""One run of a server, as a child process of this one."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Self

from attnserve_cluster.plan import Ports

_LONGEST_LINE = 1 << 20


class PortsTakenError(Exception):
    """There is no free port; the message says where."""


class ServerProcess:
    """A server; made by `start`.

    Attributes:
        last_words: the last line on standard error that is no line of its log; empty: none yet.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.last_words = ""
        assert process.stderr is not None
        self._listening = asyncio.ensure_future(self._listen(process.stderr))

    @classmethod
    async def start(cls, words: Sequence[str]) -> Self:
        """Start one with such arguments. It ends, at the latest, with this process."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "attnserve_cluster.child",
            str(os.getpid()),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def ready(self) -> str:
        """Where it listens, once it does; empty: it has ended instead."""
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode(errors="replace")
        return line.partition("listening on ")[2].partition(" ")[0]

    async def ended(self) -> int:
        """The exit code, once there is one, and all of its words have been read."""
        code = await self._process.wait()
        await self._listening
        return code

    def terminate(self) -> None:
        """Let it drain, and end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # Popen's own way asks first whether the process has ended; asyncio, which waits for that,
        # would not be told with which code it did.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        """Pass on what it says on standard error, to Ray's log of this actor."""
        while True:
            try:
                line = (await stream.readline()).decode(errors="replace")
            except ValueError:  # a line without end
                continue
            if not line:
                return
            sys.stderr.write(line)
            sys.stderr.flush()
            if not line.startswith("{"):
                self.last_words = line.strip()


def free_ports(host: str, count: int, ports: Ports | None, preferred: Sequence[int]) -> list[int]:
    """Ports of a host that nobody listens on now.

    Args:
        host: an address of this machine.
        count: how many.
        ports: of which; None: of all.
        preferred: to be taken if they are free.

    Raises:
        PortsTakenError: there are too few.
    """
    candidates = list(preferred)
    if ports is None:
        candidates += [0] * count
    else:
        others = [port for port in range(ports.low, ports.high + 1) if port not in preferred]
        # gRPC's is the lowest that is free; owners that look at the same time differ in the rest.
        candidates += [*others[:1], *random.sample(others[1:], len(others) - 1)] if others else []
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in candidates:
            with contextlib.suppress(OSError):
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                listener = held.enter_context(socket.create_server((host, port), family=family))
                found.append(int(listener.getsockname()[1]))
            if len(found) == count:
                return found
    within = "" if ports is None else f" in {ports.low}-{ports.high}"
    raise PortsTakenError(f"{host}: has no {count} free ports{within}")
