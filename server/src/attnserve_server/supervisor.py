"""Several worker processes behind one port, each a whole server.

The supervisor loads no models and takes no calls: it holds the port, starts the workers, replaces
those that die, and serves the metrics of all. The kernel spreads connections over the workers,
which listen with SO_REUSEPORT (socket(7)).
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from types import FrameType

from attnserve_server.metrics import SHARED_FOLDER, MergedMetrics
from attnserve_server.processes import Assignment, Report, StartError
from attnserve_server.settings import usable_cores

# A worker that dies within this time of serving, or before it serves, has died quickly.
QUICK_SECONDS = 10.0
# A worker that dies quickly is started anew at once, then after these seconds; then that is it.
BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 4.0)
# What a worker may take to end beyond the time for its drain.
_GRACE_SECONDS = 10.0

_log = logging.getLogger(__name__)


def supervise(assignment: Assignment) -> None:
    """Serve with `assignment.settings.workers` processes until SIGTERM or SIGINT, then drain.

    Raises:
        StartError: a worker cannot start, or one keeps dying; the others have been drained.
    """
    settings = assignment.settings
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="attnserve-metrics-"))
        try:
            port = stack.enter_context(_reserved(settings.host, settings.port))
            metrics = MergedMetrics(folder)
            if settings.metrics_port is not None:
                metrics.serve(settings.host, settings.metrics_port)
        except OSError as error:
            raise StartError(str(error)) from error
        threads = settings.intra_op_threads or max(1, usable_cores() // settings.workers)
        settings = replace(settings, port=port, metrics_port=None, intra_op_threads=threads)
        _log.info(
            "supervising",
            extra={
                "address": f"{settings.host}:{port}",
                "metrics_port": metrics.port,
                "workers": settings.workers,
                "intra_op_threads": threads,
                "pid": os.getpid(),
            },
        )
        supervisor = _Supervisor(replace(assignment, settings=settings), metrics)
        stack.callback(supervisor.stop)
        supervisor.run()


@contextlib.contextmanager
def _reserved(host: str, port: int) -> Iterator[int]:
    """Hold a port that the workers can listen on, and no other server; gives its number."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM
        )[0]
        held = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    with held:
        # SO_REUSEPORT from the start would let the port of another such server be shared. Once
        # bound, it lets the workers in, as SO_REUSEADDR would let in anyone who does not listen.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(address)
        except OSError:
            raise OSError(f"cannot listen on {host}:{port}; is it in use?") from None
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield held.getsockname()[1]


@dataclass(eq=False, slots=True)
class _Worker:
    """A place for a worker, and the process that has it now, if any.

    Attributes:
        quick_deaths: how many processes in a row died quickly.
        start_at: when to start the next one, by `time.monotonic()`; None while one lives.
        serving_since: by `time.monotonic()`; None before it serves.
        reason: why it could not start, in its own words.
    """

    number: int
    process: subprocess.Popen[bytes] | None = None
    connection: Connection | None = None
    quick_deaths: int = 0
    start_at: float | None = 0.0
    serving_since: float | None = None
    reason: str | None = None

    def start(self, assignment: Assignment, environment: dict[str, str]) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            # A group of its own: Ctrl-C is the supervisor's to pass on.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "attnserve_server.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                process_group=0,
            )
        self.start_at = self.serving_since = self.reason = None
        with contextlib.suppress(OSError):  # has died already: its connection says so
            self.connection.send(assignment)

    def release(self) -> None:
        """Tell the process to end, if it has not."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class _Supervisor:
    def __init__(self, assignment: Assignment, metrics: MergedMetrics) -> None:
        self._assignment = assignment
        self._metrics = metrics
        self._environment = {**os.environ, SHARED_FOLDER: metrics.folder}
        self._workers = [_Worker(number) for number in range(assignment.settings.workers)]
        self._announced = False
        self._asked, self._ask = socket.socketpair()

    def run(self) -> None:
        """Keep the workers running until a signal comes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        while True:
            now = time.monotonic()
            for worker in self._workers:
                if worker.start_at is not None and worker.start_at <= now:
                    self._start(worker)
            waits = [w.start_at - now for w in self._workers if w.start_at is not None]
            by_connection = {w.connection: w for w in self._workers if w.connection is not None}
            for ready in wait([self._asked, *by_connection], min(waits, default=None)):
                if ready is self._asked:
                    return
                assert isinstance(ready, Connection)
                self._hear(by_connection[ready], ready)

    def stop(self) -> None:
        """Have all workers drain, and wait for their end."""
        settings = self._assignment.settings
        _log.info("stopping the workers", extra={"seconds_at_most": settings.drain_seconds})
        for worker in self._workers:
            worker.release()
        end = time.monotonic() + settings.drain_seconds + _GRACE_SECONDS
        for worker in self._workers:
            if worker.process is None:
                continue
            try:
                worker.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.error("killing a worker that did not end", extra=_about(worker))
                worker.process.kill()
                worker.process.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._ask.send(b"\0")

    def _start(self, worker: _Worker) -> None:
        try:
            worker.start(self._assignment, self._environment)
        except OSError as error:
            raise StartError(f"cannot start worker {worker.number}: {error}") from error
        _log.info("worker started", extra=_about(worker))

    def _hear(self, worker: _Worker, connection: Connection) -> None:
        try:
            report: Report = connection.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if not report.serving:
            worker.reason = report.line
            return
        worker.serving_since = time.monotonic()
        self._count()
        if not self._announced and all(w.serving_since is not None for w in self._workers):
            self._announced = True
            print(report.line, flush=True)

    def _count(self) -> None:
        serving = [worker for worker in self._workers if worker.serving_since is not None]
        self._metrics.workers.set(len(serving))

    def _bury(self, worker: _Worker) -> None:
        """A worker has died: have it replaced, or give up."""
        assert worker.process is not None
        worker.release()
        code = worker.process.wait()
        self._metrics.forget(worker.process.pid)
        reason = worker.reason or f"worker {worker.number} ended with {_ending(code)}"
        if not self._announced:
            raise StartError(reason)
        now = time.monotonic()
        served = 0.0 if worker.serving_since is None else now - worker.serving_since
        quick = worker.quick_deaths if served < QUICK_SECONDS else 0
        if quick == len(BACKOFF_SECONDS):
            raise StartError(f"{reason}; {quick + 1} times in a row, so the server ends")
        worker.quick_deaths = quick + 1
        worker.start_at = now + BACKOFF_SECONDS[quick]
        worker.serving_since = None
        self._count()
        self._metrics.restarts.inc()
        _log.warning(
            "worker died",
            extra={
                **_about(worker),
                "reason": reason,
                "restart_in_seconds": BACKOFF_SECONDS[quick],
            },
        )


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _about(worker: _Worker) -> dict[str, object]:
    pid = None if worker.process is None else worker.process.pid
    return {"worker": worker.number, "worker_pid": pid}
