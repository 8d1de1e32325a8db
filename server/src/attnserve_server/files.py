"""Files that settings name: read, and read again when they change."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SECONDS = 1.0

_log = logging.getLogger(__name__)

_State = tuple[tuple[int, int, int] | None, ...]


@dataclass
class _Watched:
    what: str
    paths: tuple[Path, ...]
    reload: Callable[[], None]
    state: _State = field(default=())


def read_text(path: Path, allowed: str, most_bytes: int | None = None) -> str:
    """The text of a file.

    Args:
        path: of it.
        allowed: what it should be, for the error.
        most_bytes: that it may have; None: any number.

    Raises:
        ValueError: it cannot be read, is larger, or is no text in UTF-8; does not name it.
    """
    try:
        if most_bytes is not None and path.stat().st_size > most_bytes:
            raise ValueError(f"larger than {most_bytes} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(error.strerror) from None
    except UnicodeDecodeError:
        raise ValueError(f"given bytes; allowed: {allowed}") from None


class WatchedFiles:
    """Looks every second whether files have changed, by time, size and inode, links followed.

    What cannot be used is said in the log, and what was there before stays in use.
    """

    def __init__(self) -> None:
        self._watched: list[_Watched] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="files", daemon=True)

    def add(self, what: str, paths: Sequence[Path], reload: Callable[[], None]) -> None:
        """Watch files from now on; before `start`.

        Args:
            what: they are, for the log.
            paths: of all files that are read together.
            reload: reads them again, and raises if they cannot be used.
        """
        self._watched.append(_Watched(what, tuple(paths), reload, _state(paths)))

    def start(self) -> None:
        """Begin to look, if there is something to look at."""
        if self._watched:
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_SECONDS):
            for watched in self._watched:
                now = _state(watched.paths)
                if now != watched.state:
                    watched.state = now
                    self._reload(watched)

    def _reload(self, watched: _Watched) -> None:
        try:
            watched.reload()
        except Exception as error:  # whatever is wrong with it, the server goes on
            _log.error(
                "files not taken, the former ones stay in use",
                extra={"what": watched.what, "reason": str(error)},
            )
        else:
            _log.info("files read again", extra={"what": watched.what})


def _state(paths: Sequence[Path]) -> _State:
    return tuple(map(_state_of, paths))


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
