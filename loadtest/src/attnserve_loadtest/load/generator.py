"""Client processes that call servers in a closed or an open loop.

Closed loop: N callers, each of which sends its next request when it has its answer. A slow server
slows its own load down, so what callers would have waited is never measured.

Open loop: requests are due at times drawn beforehand (`attnserve_loadtest.load.plan`). Latency
counts from the time a request was DUE, not from when it was sent, and a request that could not be
sent in time is still sent and counted. So a pause of the server shows in all requests due while it
lasted, which a closed loop leaves out: "coordinated omission" (Gil Tene, "How NOT to Measure
Latency", 2013). wrk2 measures in this way; HdrHistogram adds the missing samples to those of a
closed loop. Refusals are timed from when they were sent, since they say how soon the server
refuses.

Callers are asyncio tasks, in several processes with connections of their own: per request this
takes less CPU than a thread per caller from 16 callers on. Processes agree on a start on the
monotonic clock, which is the same in all processes of a Linux host. What comes before the end of
the warm-up is sent but not counted. The CPU time of clients is measured: they share the machine.
"""

import asyncio
import gc
import multiprocessing
import selectors
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

import numpy as np
from attnserve_client import keep_freed_memory

from attnserve_loadtest.load.measured import ROW, TOKEN, Measured, Rows
from attnserve_loadtest.load.plan import Arrival, Load, plan
from attnserve_loadtest.load.record import Record

DRAIN_SECONDS = 20.0
_START_DELAY = 0.1
# Requests that are begun before the loop looks at answers again.
_AT_ONCE = 8
_MEMORY_SECONDS, _TICK_SECONDS = 0.25, 0.5


class Watched(Protocol):
    """A server whose processes can be seen from here."""

    def cpu_seconds(self) -> float:
        """CPU time so far."""
        ...

    def memory_bytes(self) -> int:
        """Resident memory."""
        ...


class Clients:
    """Client processes, ready to run one load after another."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def run(
        self,
        load: Load,
        server: Watched | None = None,
        tick: Callable[[float], None] = lambda _: None,
    ) -> Measured:
        """Run a load and wait for its last answer.

        Args:
            load: what to send.
            server: whose CPU time and memory are measured with it; None: nobody's.
            tick: told now and then how many seconds the load has lasted.

        Raises:
            Exception: what kept a client from connecting, or ended it.
        """
        count = len(self._pipes)
        for number, pipe in enumerate(self._pipes):
            callers = load.callers // count + (number < load.callers % count)
            pipe.send((replace(load, callers=callers), number, count))
        replies = [pipe.recv() for pipe in self._pipes]
        if any(isinstance(reply, Exception) for reply in replies):
            self._give_up(replies)
        start = time.monotonic() + _START_DELAY
        for pipe in self._pipes:
            pipe.send(start)
        used, memory = _watch(server, start + load.warm_up, load.seconds)
        for pipe in self._pipes:
            while not pipe.poll(_TICK_SECONDS):
                tick(time.monotonic() - start)
        parts = [pipe.recv() for pipe in self._pipes]
        if any(isinstance(part, Exception) for part in parts):
            raise next(part for part in parts if isinstance(part, Exception))
        rows, tokens = _joined([part[0] for part in parts], [part[1] for part in parts])
        return Measured(
            load=load,
            rows=rows,
            tokens=tokens,
            failure=next((part[2] for part in parts if part[2]), ""),
            client_cpu=sum(part[3] for part in parts) / load.seconds,
            server_cpu=used / load.seconds,
            memory=memory,
        )

    def _give_up(self, replies: list[Any]) -> NoReturn:
        """Raise what kept a client from connecting; the others wait for the next load."""
        for pipe, reply in zip(self._pipes, replies, strict=True):
            if not isinstance(reply, Exception):
                pipe.send(None)
                pipe.recv()
        raise next(reply for reply in replies if isinstance(reply, Exception))


@contextmanager
def clients(count: int) -> Iterator[Clients]:
    """Start client processes; they end with the `with` block."""
    context = multiprocessing.get_context("spawn")
    started = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client, args=(theirs,), daemon=True)
            with _interruption_held():
                process.start()
            theirs.close()
            started.append((process, ours))
        yield Clients([pipe for _, pipe in started])
    finally:
        for process, pipe in started:
            pipe.close()
            process.join(DRAIN_SECONDS)


@contextmanager
def _interruption_held() -> Iterator[None]:
    """Ctrl-C waits, in a process that is started now until it can answer: see `_client`."""
    resource_tracker.ensure_running()  # it would be started now, and let Ctrl-C through after that
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop that wakes up when it is told to.

    asyncio's own, over epoll, rounds what it sleeps up to whole milliseconds.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def _client(pipe: Connection) -> None:
    """A client process: loads come in, times go out, until the pipe closes."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    except KeyboardInterrupt:  # it came while modules were loaded
        return
    keep_freed_memory()
    # Whatever is imported by now stays: collections need not look at it again.
    gc.freeze()
    while True:
        try:
            load, number, count = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                pipe.send(runner.run(_run(load, number, count, pipe)))
        except (EOFError, KeyboardInterrupt, BrokenPipeError):
            return
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


async def _run(
    load: Load, number: int, count: int, pipe: Connection
) -> tuple[Rows, Rows, str, float]:
    arrivals = plan(load, number, count) if load.is_open else []
    caller = load.target.connect()
    try:
        first = load.mix.draw(1, np.random.default_rng(load.seed))[0]
        if load.schedule:
            first = load.schedule[0].request
        record = Record(caller)
        await record.connect(first)
        pipe.send("connected")
        loop = asyncio.get_running_loop()
        start = await loop.run_in_executor(None, pipe.recv)
        if start is None:
            return np.empty(0, ROW), np.empty(0, TOKEN), "", 0.0
        counted = start + load.warm_up
        used = threading.Thread(target=_measure_cpu, args=(counted, load.seconds, cpu := [0.0]))
        used.start()
        await asyncio.sleep(start - time.monotonic())
        if load.is_open:
            await open_loop(arrivals, record, start)
        else:
            end = counted + load.seconds
            random = np.random.default_rng([load.seed, number])
            await asyncio.gather(
                *(_closed_loop(load, record, end, random) for _ in range(load.callers))
            )
        used.join()
    finally:
        await caller.close()
    rows, tokens = record.tables(counted)
    return rows, tokens, record.failure, cpu[0]


async def _closed_loop(load: Load, record: Record, end: float, random: np.random.Generator) -> None:
    share = load.cancel.share if load.cancel is not None else 0.0
    while time.monotonic() < end:
        (request,) = load.mix.draw(1, random)
        gives_up = load.cancel is not None and random.random() < share
        after = load.cancel.after if load.cancel is not None and gives_up else None
        await record.timed(request, cancel=after)


async def open_loop(arrivals: Sequence[Arrival], record: Record, start: float) -> None:
    """Send what is due when it is due, and wait for all answers.

    Args:
        arrivals: in the order of their due times.
        record: sends them and keeps their times.
        start: monotonic seconds that due times count from.
    """
    loop = asyncio.get_running_loop()
    under_way: set[asyncio.Task[None]] = set()
    all_sent = loop.create_future()
    upcoming = deque(arrivals)

    def send_due() -> None:
        for _ in range(_AT_ONCE):
            if not upcoming:
                all_sent.set_result(None)
                return
            due = start + upcoming[0].due
            if due > time.monotonic():
                loop.call_at(due, send_due)
                return
            each = upcoming.popleft()
            task = loop.create_task(record.timed(each.request, due=due, cancel=each.cancel))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        # However late: answers must be taken in between.
        loop.call_soon(send_due)

    send_due()
    await all_sent
    late = (await asyncio.wait(under_way, timeout=DRAIN_SECONDS))[1] if under_way else set()
    for task in late:
        task.cancel()
    await asyncio.gather(*late)


def _joined(rows: list[Rows], tokens: list[Rows]) -> tuple[Rows, Rows]:
    """The tables of all processes as one, in the order of due times."""
    offset = 0
    for part, of_sessions in zip(rows, tokens, strict=True):
        of_sessions["row"] += offset
        offset += len(part)
    all_rows, all_tokens = np.concatenate(rows), np.concatenate(tokens)
    order = np.argsort(all_rows["due"], kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    all_tokens["row"] = place[all_tokens["row"]]
    return all_rows[order], all_tokens


def _watch(
    server: Watched | None, start: float, seconds: float
) -> tuple[float, tuple[tuple[float, int], ...]]:
    """A server's CPU seconds over the counted time, and its memory now and then."""
    if server is None:
        return 0.0, ()
    _sleep_until(start)
    used, memory = server.cpu_seconds(), []
    for second in np.arange(0, seconds, _MEMORY_SECONDS):
        _sleep_until(start + second)
        memory.append((float(second), server.memory_bytes()))
    _sleep_until(start + seconds)
    return server.cpu_seconds() - used, tuple(memory)


def _measure_cpu(start: float, seconds: float, used: list[float]) -> None:
    _sleep_until(start)
    before = time.process_time()
    _sleep_until(start + seconds)
    used[0] = time.process_time() - before


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
