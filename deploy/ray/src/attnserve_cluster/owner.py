"""The actor that one server belongs to: starts it, watches it, starts it again, and ends it.

Ray places the actor by what a server takes of a node, and restarts it elsewhere when its node dies.
"""

import asyncio
import contextlib
import os

import ray.util
from attnserve_proto.commands import CommandError
from attnserve_server import configuration
from attnserve_server.settings import Settings

from attnserve_cluster.metrics import MetricsError, MetricsPlace, Window
from attnserve_cluster.plan import ServerPlan
from attnserve_cluster.process import PortsTakenError, ServerProcess, free_ports
from attnserve_cluster.report import Report, State

_LOOK_SECONDS = 1.0
# Between a server's end and its next start: doubled each time, from the first on again once one
# has lasted.
_FIRST_PAUSE, _LONGEST_PAUSE, _LASTING = 0.5, 30.0, 60.0
# What a server may take to end beyond the time of its drain.
_END_SECONDS = 10.0


class ServerOwner:
    """One server.

    Args:
        plan: how it is.
    """

    async def __init__(self, plan: ServerPlan) -> None:  # type: ignore[misc]  # by Ray
        self._plan = plan
        self._host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._report = Report(State.STARTING, node=self._host)
        self._ports: list[int] = []  # that it had; it gets them again if they are free
        self._leave = asyncio.Event()  # set: it is to go
        self._leave_by = 0.0
        self._task = asyncio.ensure_future(self._keep())

    async def report(self) -> Report:
        """How it is."""
        if self._task.done() and self._report.state != State.ENDED:
            await self._task  # a defect: its error
        return self._report

    async def retire(self, seconds: float) -> None:
        """Let it go: once its KV sessions have ended, or after so many seconds.

        What is left is drained: calls under way are answered. Should the server have been told to
        hand its sessions to others as it drains, it does so then.
        """
        self._leave_by = asyncio.get_running_loop().time() + seconds
        self._leave.set()

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while not self._leave.is_set():
            began = loop.time()
            try:
                trouble = await self._run()
            except (PortsTakenError, CommandError, OSError) as error:
                trouble = str(error)
            if self._leave.is_set():
                break
            if loop.time() - began > _LASTING:
                pause = _FIRST_PAUSE
            self._tell(State.FAILED, trouble=trouble, restarts=self._report.restarts + 1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leave.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._tell(State.ENDED)

    def _tell(self, state: State, **changed: object) -> None:
        running = state in (State.SERVING, State.RETIRING, State.DRAINING)
        if not running:
            changed = {"address": "", "pid": 0, "measured": None} | changed
        self._report = self._report.but(state=state, **changed)

    async def _run(self) -> str:
        """Run the server until it ends; why it did.

        Raises:
            PortsTakenError, CommandError, OSError: it cannot be started.
        """
        settings = self._settings(0, 0)
        ports = free_ports(self._host, 2, self._plan.ports, self._ports)
        process = await ServerProcess.start(self._plan.words(self._host, *ports))
        ended = asyncio.ensure_future(process.ended())
        try:
            self._tell(State.STARTING, pid=process.pid)
            address = await self._listening(process)
            if address:
                self._ports = ports
                self._tell(State.SERVING, address=address, trouble="")
                await self._watch(ended, self._metrics_place(settings, ports[1]))
            elif not self._leave.is_set():
                await asyncio.wait([ended], timeout=_END_SECONDS)
            if self._leave.is_set() and not ended.done():
                self._tell(State.DRAINING)
                process.terminate()
                await asyncio.wait([ended], timeout=settings.drain_seconds + _END_SECONDS)
        finally:
            process.kill()
        code = await ended
        return (
            f"ended with {code}: {process.last_words}"
            if process.last_words
            else (f"ended with {code}")
        )

    def _settings(self, port: int, metrics_port: int) -> Settings:
        """What the server makes of its arguments, this node's environment and files.

        Raises:
            CommandError: it will not take them.
        """
        words = self._plan.words(self._host, port, metrics_port)
        try:
            return configuration.read(words, os.environ)
        except SystemExit:  # said on standard error
            raise CommandError("attnserve-server does not take its options; see its log") from None

    def _metrics_place(self, settings: Settings, port: int) -> MetricsPlace:
        host = f"[{self._host}]" if ":" in self._host else self._host
        certificate = settings.tls_certificate
        scheme = "http" if certificate is None else "https"
        return MetricsPlace(
            f"{scheme}://{host}:{port}/metrics",
            "" if certificate is None else str(certificate),
            self._plan.metrics_token_file,
        )

    async def _listening(self, process: ServerProcess) -> str:
        """Where it listens; empty: it has ended, or is to go."""
        ready = asyncio.ensure_future(process.ready())
        leave = asyncio.ensure_future(self._leave.wait())
        await asyncio.wait([ready, leave], return_when=asyncio.FIRST_COMPLETED)
        leave.cancel()
        if not ready.done():
            ready.cancel()
            return ""
        return ready.result()

    async def _watch(self, ended: "asyncio.Future[int]", place: MetricsPlace) -> None:
        """Read its load until it has ended, or is to be drained."""
        loop = asyncio.get_running_loop()
        window = Window()
        while not ended.done():
            try:
                measured = window.add(await asyncio.to_thread(place.read))
                self._report = self._report.but(measured=measured, trouble="")
            except MetricsError as error:
                measured = None
                self._report = self._report.but(measured=None, trouble=str(error))
            if self._leave.is_set():
                self._tell(State.RETIRING)
                left = self._leave_by - loop.time()
                if left <= 0 or (measured is not None and measured.sessions == 0):
                    return
            await self._pause(ended)

    async def _pause(self, ended: "asyncio.Future[int]") -> None:
        """Wait for the next look; less, if it ends, or is told to go, meanwhile."""
        waits: list[asyncio.Future[object]] = [ended]  # type: ignore[list-item]
        leave = None
        if not self._leave.is_set():
            leave = asyncio.ensure_future(self._leave.wait())
            waits.append(leave)  # type: ignore[arg-type]
        await asyncio.wait(waits, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if leave is not None:
            leave.cancel()
