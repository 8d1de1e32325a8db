"""Sends requests and keeps their times."""

import asyncio
import time

import numpy as np

from attnserve_loadtest.load.measured import (
    ANSWERED,
    CANCELLED,
    FAILED,
    REFUSED,
    ROW,
    TOKEN,
    Rows,
)
from attnserve_loadtest.load.plan import Caller, Heard
from attnserve_loadtest.load.requests import Generation, Request

_TIMES = ("due", "sent", "first", "done")


class Record:
    """The requests of one process, in the order of their ends.

    Args:
        caller: sends them.

    Attributes:
        failure: what the first failed request said.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._rows: list[tuple[float | int, ...]] = []
        self._tokens: list[tuple[float | int, ...]] = []
        self.failure = ""

    @property
    def count(self) -> int:
        """Requests that have ended."""
        return len(self._rows)

    async def connect(self, request: Request) -> None:
        """Send a request that is not kept, so that the first one finds a connection.

        Raises:
            Exception: it was not answered.
        """
        await self._caller.call(request, Heard())

    async def timed(
        self, request: Request, due: float | None = None, cancel: float | None = None
    ) -> None:
        """Send one request and keep its times.

        Args:
            request: what to send.
            due: monotonic seconds; None: when it is sent.
            cancel: seconds after which it is given up; None: never.
        """
        sent = time.monotonic()
        outcome, heard = ANSWERED, Heard()
        given_up = False

        def give_up(task: "asyncio.Task[None]") -> None:
            nonlocal given_up
            given_up = True
            task.cancel()

        timer = None
        if cancel is not None and (task := asyncio.current_task()) is not None:
            timer = asyncio.get_running_loop().call_later(cancel, give_up, task)
        try:
            await self._caller.call(request, heard)
        except (Exception, asyncio.CancelledError) as error:
            if given_up:
                outcome = CANCELLED
            else:
                outcome = REFUSED if self._caller.is_refusal(error) else FAILED
                if outcome == FAILED:
                    self.failure = self.failure or f"{type(error).__name__}: {error}"
        finally:
            if timer is not None:
                timer.cancel()
        done = time.monotonic()
        self._keep(request, heard, (sent if due is None else due, sent, done), outcome)

    def tables(self, start: float) -> tuple[Rows, Rows]:
        """All rows and tokens so far, their times counted from `start` (monotonic seconds)."""
        rows, tokens = np.array(self._rows, ROW), np.array(self._tokens, TOKEN)
        for name in _TIMES:
            rows[name] -= start
        tokens["at"] -= start
        return rows, tokens

    def _keep(
        self, request: Request, heard: Heard, times: tuple[float, float, float], outcome: int
    ) -> None:
        due, sent, done = times
        row = len(self._rows)
        is_session = isinstance(request, Generation)
        length = request.prompt if isinstance(request, Generation) else request.seq_len
        tokens = request.tokens if isinstance(request, Generation) else 0
        first = heard.first
        if first is None:
            first = done if outcome == ANSWERED else float("nan")
        self._rows.append(
            (due, sent, first, done, heard.compute, heard.queue, outcome, length, tokens,
             heard.target)
        )  # fmt: skip
        if is_session:
            self._tokens.extend((row, *token) for token in heard.tokens)
