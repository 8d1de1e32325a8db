"""Ends a process in which a computation does not end, so that its supervisor starts it again."""

import logging
import os
import threading
import time

from attnserve_dataplane import DataPlane

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""

_LOOK_SECONDS = 0.25

_log = logging.getLogger(__name__)


class Watchdog:
    """Looks at the data plane from a thread of its own, until `stop`.

    Args:
        plane: that knows of runs which were stopped and do not end.
        exit_seconds: how long there may be some before the process exits; 0: it never does.
    """

    def __init__(self, plane: DataPlane, exit_seconds: float) -> None:
        self._plane = plane
        self._exit_seconds = exit_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        if self._exit_seconds > 0:
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        since: float | None = None
        while not self._stopped.wait(_LOOK_SECONDS):
            wedged = self._plane.wedged_runs
            now = time.monotonic()
            if wedged == 0:
                since = None
            elif since is None:
                since = now
            elif now - since >= self._exit_seconds:
                exit_now("the process exits, since a computation does not end", wedged)


def exit_now(event: str, wedged: int) -> None:
    """End the process at once: threads within a run cannot be joined."""
    _log.critical(event, extra={"wedged_runs": wedged, "exit_code": EXIT_CODE})
    logging.shutdown()
    os._exit(EXIT_CODE)
