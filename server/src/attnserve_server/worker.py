"""One process that serves: the only one, or one of a supervisor's.

A worker (`python -m attnserve_server.worker FD`) is told by its connection to end: the supervisor
closes it to have it drained, and the kernel does where the supervisor is no more, even killed. A
parent-death signal (prctl(2), PR_SET_PDEATHSIG) would do less: it is Linux's alone, comes at the
end of the thread that started the worker, and is lost if that is over before it is asked for.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from attnserve_proto.allocator import keep_freed_memory

from attnserve_server import __version__, logs
from attnserve_server.app import AttentionServer
from attnserve_server.engine.providers import ProviderError
from attnserve_server.processes import Assignment, Report, StartError
from attnserve_server.repository import ManifestError
from attnserve_server.settings import Settings


def serve(settings: Settings, stop: threading.Event, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM, SIGINT or `stop`, then drain.

    Args:
        settings: how to run the server.
        stop: ends it when set.
        ready: called once, with the line that says where it listens and what it serves.

    Raises:
        StartError: it cannot start.
    """
    keep_freed_memory()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server = AttentionServer(settings)
        server.start()
    except (ProviderError, ManifestError, OSError) as error:
        raise StartError(str(error)) from error
    names = ", ".join(sorted({model.manifest.name for model in server.store})) or "none"
    workers = f"; workers: {settings.workers}" if settings.workers > 1 else ""
    ready(
        f"attnserve-server {__version__} listening on {settings.host}:{server.port} "
        f"({server.providers.names[0]}; models: {names}{workers})"
    )
    stop.wait()
    server.drain()


def main() -> int:
    """Serve as one of several workers; the exit code: 0 after a drain, 1 if it cannot start."""
    supervisor: Connection = Connection(int(sys.argv[1]))
    assignment: Assignment = supervisor.recv()
    logs.configure(assignment.log_format, assignment.log_level)
    stop, serving = threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(supervisor, serving, stop), daemon=True).start()

    def ready(line: str) -> None:
        serving.set()
        _report(supervisor, Report(True, line))

    try:
        serve(assignment.settings, stop, ready)
    except StartError as error:
        _report(supervisor, Report(False, str(error)))
        return 1
    return 0


def _watch(supervisor: Connection, serving: threading.Event, stop: threading.Event) -> None:
    with contextlib.suppress(EOFError, OSError):
        supervisor.recv()
    if not serving.is_set():
        # Still loading models, which cannot be interrupted, and nobody to answer.
        os._exit(0)
    stop.set()


def _report(supervisor: Connection, report: Report) -> None:
    with contextlib.suppress(OSError):  # its end is _watch's to notice
        supervisor.send(report)


if __name__ == "__main__":
    sys.exit(main())
