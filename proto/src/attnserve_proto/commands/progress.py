"""How far a command is: one line that changes on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 5.0


class Progress:
    """Counts steps, and says on standard error how many are done and how long the rest takes.

    Nothing is said of work that takes less than a moment.

    Args:
        total: steps.
        of: what they are, in the plural.
    """

    def __init__(self, total: int, of: str) -> None:
        self._total, self._of, self._done = total, of, 0
        self._live = sys.stderr.isatty()
        self._every = _TERMINAL_SECONDS if self._live else _LOG_SECONDS
        self._started = time.monotonic()
        self._next = self._started + self._every
        self._shown = False

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the line away."""
        if self._live and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def step(self, note: str = "", count: int = 1) -> None:
        """One more is done, or several.

        Args:
            note: what the step was of.
            count: how many steps it was.
        """
        self._done += count
        now = time.monotonic()
        if now < self._next:
            return
        self._next, self._shown = now + self._every, True
        left = (now - self._started) / self._done * (self._total - self._done)
        line = f"{self._done}/{self._total} {self._of}, about {_spoken(left)} left"
        line += f"; {note}" if note else ""
        start, end = ("\r\x1b[K", "") if self._live else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)


def _spoken(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
