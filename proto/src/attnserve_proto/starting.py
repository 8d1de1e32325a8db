"""Ctrl-C while a command's modules load, and while its process ends: one line, and 130.

Modules are no place for a KeyboardInterrupt: half of them would be loaded, some would swallow it,
and its traceback would be of code that nobody asked about. Nothing has been begun then, so the
process can end where it is. Imports next to nothing itself, to be ready early.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

INTERRUPTED = 130  # 128 + SIGINT, as shells say it
MESSAGE = "interrupted; nothing was left half written"

_program = ""
_standard_error = 2  # a descriptor


def start(program: str) -> None:
    """Make Ctrl-C end this process at once, unless SIGINT is ignored here (as by `nohup`).

    Args:
        program: its name, for the line.
    """
    global _program
    _program = program
    _replace(signal.default_int_handler, _end)


class Interruptible:
    """Work that a KeyboardInterrupt may end; before and after it Ctrl-C does what it did."""

    def __enter__(self) -> None:
        """Let Ctrl-C raise."""
        self._changed = _replace(_end, signal.default_int_handler)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let Ctrl-C end the process again, unless the work has decided otherwise."""
        if self._changed:
            _replace(signal.default_int_handler, _end)


class Loading:
    """Modules loaded amid such work: Ctrl-C ends the process at once, where `start` said so."""

    def __enter__(self) -> None:
        """Let Ctrl-C end the process."""
        self._changed = bool(_program) and _replace(signal.default_int_handler, _end)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let it raise again."""
        if self._changed:
            _replace(_end, signal.default_int_handler)


class Silence:
    """Nothing on standard error, whoever writes there, but that the process was interrupted."""

    def __enter__(self) -> None:
        """Send what is written there nowhere."""
        global _standard_error
        self._kept = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        _standard_error = self._kept

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let it be written again."""
        global _standard_error
        os.dup2(self._kept, 2)
        _standard_error = 2
        os.close(self._kept)


def _replace(old: object, new: Callable[[int, FrameType | None], None]) -> bool:
    if signal.getsignal(signal.SIGINT) is not old:
        return False
    signal.signal(signal.SIGINT, new)
    return True


def _end(number: int, frame: FrameType | None) -> None:
    os.write(_standard_error, f"{_program}: {MESSAGE}\n".encode())
    os._exit(INTERRUPTED)
