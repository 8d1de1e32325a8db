"""Loads that may take only so long: one that never ends delays nobody but whoever asked for it."""

import logging
import threading
from pathlib import Path

from attnserve_proto.manifest import ManifestError

from attnserve_server.models.store import LoadedModel, Loader

_log = logging.getLogger(__name__)


class SlowLoadError(ManifestError):
    """A version has not loaded in time, or an earlier load of it still goes on."""


class BoundedLoads:
    """Loads versions of models, each on a thread of its own. Safe to call from several threads.

    A load cannot be ended from outside: it is left to itself, and what it still gives is dropped.

    Args:
        load: loads one version's folder.
        seconds: that it may take; 0: as long as it takes.
    """

    def __init__(self, load: Loader, seconds: float) -> None:
        self._load = load
        self._seconds = seconds
        self._lock = threading.Lock()
        self._late: dict[Path, threading.Thread] = {}

    def __call__(self, folder: Path) -> LoadedModel | None:
        """Load one version's folder; None if nothing of it can run here.

        Raises:
            SlowLoadError: it has not loaded in time, or did not earlier and goes on.
            ManifestError: it does not load.
        """
        if self._seconds == 0:
            return self._load(folder)
        with self._lock:
            if folder in self._late and self._late[folder].is_alive():
                raise SlowLoadError(f"{folder}: an earlier load of it has not ended yet")
            self._late.pop(folder, None)
        load = _Load(self._load, folder)
        load.thread.join(self._seconds)
        if load.thread.is_alive():
            with self._lock:
                self._late[folder] = load.thread
            _log.error("a load does not end", extra={"folder": str(folder)})
            raise SlowLoadError(
                f"{folder}: has not loaded within {self._seconds:g} s (--max-load-seconds)"
            )
        return load.result()

    @property
    def unfinished(self) -> bool:
        """Whether any goes on for which nobody waits."""
        with self._lock:
            return any(thread.is_alive() for thread in self._late.values())


class _Load:
    """One load, under way."""

    def __init__(self, load: Loader, folder: Path) -> None:
        self._load, self._folder = load, folder
        self._model: LoadedModel | None = None
        self._error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="load", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._model = self._load(self._folder)
        except Exception as error:  # is raised to whoever waits
            self._error = error

    def result(self) -> LoadedModel | None:
        if self._error is not None:
            raise self._error
        return self._model
