"""Shows how far a run is: a live table on a terminal, one line a round elsewhere.

Drawing takes the time of the process that measures. It happens in the greenlet of a user, after
its request was timed and at most a few times a second; with one user no request is under way then.
"""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from attnserve_loadtest.report.schema import Settings
from attnserve_loadtest.report.terminal import counted
from attnserve_loadtest.samples import Sample
from attnserve_loadtest.schedule import Block

_REDRAW_SECONDS = 0.25


class Progress(Protocol):
    """What the runner tells."""

    def __enter__(self) -> Self:
        """The run begins."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The run is over."""
        ...

    def add(self, block: Block, sample: Sample) -> None:
        """A request of the block has ended."""

    def finish(self, block: Block) -> None:
        """The block is over."""

    def skip(self, block: Block) -> None:
        """The block is left out: all requests of its lane fail."""


def make_progress(
    lanes: Sequence[tuple[str, int]], settings: Settings, console: Console
) -> Progress:
    """The display that suits the console.

    Args:
        lanes: (series, seq_len) of each lane, in their order.
        settings: of the run.
        console: where to show it.
    """
    return (LiveProgress if console.is_terminal else LineProgress)(lanes, settings, console)


class _Counts:
    """What each lane has so far."""

    def __init__(self, lanes: Sequence[tuple[str, int]], settings: Settings) -> None:
        self.lanes = lanes
        self.answered: list[list[float]] = [[] for _ in lanes]
        self.failed = [0] * len(lanes)
        self.rounds = settings.rounds

    def add(self, block: Block, sample: Sample) -> None:
        if not block.measured:
            return
        if sample.failure is None:
            self.answered[block.lane].append(sample.end_to_end_us / 1e3)
        else:
            self.failed[block.lane] += 1

    def p50_p95(self, lane: int) -> tuple[str, str]:
        if not self.answered[lane]:
            return "-", "-"
        p50, p95 = np.percentile(self.answered[lane], [50, 95])
        return f"{p50:.2f}", f"{p95:.2f}"


def _weight(block: Block) -> float:
    """How much of the bar a block is: its requests or its seconds."""
    return block.seconds if block.seconds is not None else float(block.requests or 0)


def _total(settings: Settings, lanes: int) -> float:
    settling = settings.settle * settings.users * settings.rounds
    measured = settings.duration_seconds if settings.requests is None else settings.requests
    return lanes * (settings.warmup + settling + (measured or 0))


class LiveProgress:
    """A table of the lanes that fills while the run goes on, and a bar."""

    def __init__(
        self, lanes: Sequence[tuple[str, int]], settings: Settings, console: Console
    ) -> None:
        self._counts = _Counts(lanes, settings)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._bars.add_task("warm-up", total=_total(settings, len(lanes)))
        self._current: int | None = None
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next = 0.0

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._live.start()
        self._draw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the table away; the report's own follows."""
        self._live.stop()

    def add(self, block: Block, sample: Sample) -> None:
        """Count a request."""
        self._counts.add(block, sample)
        if block.requests is not None:
            self._bars.advance(self._task, 1)
        self._current = block.lane
        if time.monotonic() >= self._next:
            self._describe(block)
            self._draw()

    def finish(self, block: Block) -> None:
        """Move the bar on."""
        if block.requests is None:
            self._bars.advance(self._task, _weight(block))

    def skip(self, block: Block) -> None:
        """Move the bar on."""
        self._bars.advance(self._task, _weight(block))

    def _describe(self, block: Block) -> None:
        where = "warm-up" if block.round < 0 else f"round {block.round + 1}/{self._counts.rounds}"
        self._bars.update(self._task, description=where)

    def _draw(self) -> None:
        table = Table(box=None, pad_edge=False)
        table.add_column("series")
        for heading in ("seq_len", "answers", "failures", "p50 ms", "p95 ms"):
            table.add_column(heading, justify="right")
        for index, (label, seq_len) in enumerate(self._counts.lanes):
            table.add_row(
                label,
                str(seq_len),
                str(len(self._counts.answered[index])),
                str(self._counts.failed[index]),
                *self._counts.p50_p95(index),
                style="bold" if index == self._current else "",
            )
        self._live.update(Group(table, self._bars), refresh=True)
        self._next = time.monotonic() + _REDRAW_SECONDS


class LineProgress:
    """One line a round for each series, for logs and pipes."""

    def __init__(
        self, lanes: Sequence[tuple[str, int]], settings: Settings, console: Console
    ) -> None:
        self._counts = _Counts(lanes, settings)
        self._console = console
        self._round = -1
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        """Say what begins."""
        lengths = sorted({seq_len for _, seq_len in self._counts.lanes})
        self._say(f"warm-up; lengths {', '.join(map(str, lengths))}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Say how the last round went."""
        self._report_round()

    def add(self, block: Block, sample: Sample) -> None:
        """Count a request."""
        if block.round != self._round:
            self._report_round()
            self._round = block.round
        self._counts.add(block, sample)

    def finish(self, block: Block) -> None:
        """Nothing to say yet."""

    def skip(self, block: Block) -> None:
        """Nothing to say."""

    def _report_round(self) -> None:
        if self._round < 0:
            return
        for series in dict.fromkeys(label for label, _ in self._counts.lanes):
            figures = "  ".join(
                f"{seq_len}: {self._counts.p50_p95(index)[0]}"
                for index, (label, seq_len) in enumerate(self._counts.lanes)
                if label == series
            )
            self._say(f"round {self._round + 1}/{self._counts.rounds} {series} p50 ms  {figures}")
        failed = sum(self._counts.failed)
        if failed:
            self._say(f"{counted(failed, 'request')} failed so far")

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self._started
        self._console.print(
            f"[{seconds:6.1f} s] {text}", markup=False, highlight=False, soft_wrap=True
        )
