"""The load generator: client processes that call a server in a closed or an open loop.

Closed loop: N callers, each of which sends its next request when it has its answer. A slow server
slows its own load down, so what callers would have waited is never measured.

Open loop: requests are due at times drawn beforehand, at a fixed rate (Poisson arrivals, as of
independent callers; or constant). Latency counts from the time a request was DUE, not from when it
was sent, and a request that could not be sent in time is still sent and counted. So a pause of the
server shows in all requests due while it lasted, which a closed loop leaves out: "coordinated
omission" (Gil Tene, "How NOT to Measure Latency", 2013). wrk2 measures in this way; HdrHistogram
adds the missing samples to a closed loop's. Refusals are timed from when they were sent, since they
say how soon the server refuses.

Callers are asyncio tasks, in several processes with one connection each: per request this takes
less CPU than a thread per caller from 16 callers on. Processes agree on a start on the monotonic
clock, which is the same in all processes of a Linux host. What comes before the end of the warm-up
is sent but not counted. The CPU time of clients is measured: they share the machine.
"""

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
from attnserve_client import keep_freed_memory
from numpy.typing import NDArray
from serving_calls import Call, Target, connect, is_refusal
from serving_servers import Server

DRAIN_SECONDS = 20.0
_START_DELAY = 0.1

ANSWERED, REFUSED, FAILED = range(3)


@dataclass(frozen=True)
class Load:
    """What to call, how often, and how long.

    Attributes:
        target: the server and the request.
        seconds: counted time.
        warm_up: seconds before it.
        callers: of a closed loop, over all processes.
        rate: requests per second of an open loop, over all processes; 0 is a closed loop.
        poisson: random arrivals instead of constant ones.
    """

    target: Target
    seconds: float
    warm_up: float = 0.5
    callers: int = 1
    rate: float = 0.0
    poisson: bool = True


@dataclass(frozen=True)
class Measured:
    """What became of the requests of one load.

    Attributes:
        load: what was asked for.
        due, sent, done: one entry per request, seconds from the end of the warm-up.
        outcome: ANSWERED, REFUSED or FAILED.
        failure: what the first failed request said.
        client_cpu, server_cpu: cores in use over the counted time.
        memory: (seconds, bytes resident in the server) over the counted time.
    """

    load: Load
    due: NDArray[np.float64]
    sent: NDArray[np.float64]
    done: NDArray[np.float64]
    outcome: NDArray[np.int8]
    failure: str
    client_cpu: float
    server_cpu: float = 0.0
    memory: tuple[tuple[float, int], ...] = field(default=())

    @property
    def throughput(self) -> float:
        """Answers per second."""
        ended = (self.done >= 0) & (self.done < self.load.seconds)
        return float(np.sum(ended & (self.outcome == ANSWERED))) / self.load.seconds

    def goodput(self, within: float) -> float:
        """Answers per second to requests due in the counted time, `within` seconds of that."""
        good = self._counted & (self.outcome == ANSWERED) & (self.done - self.due <= within)
        return float(np.sum(good)) / self.load.seconds

    def count(self, outcome: int) -> int:
        """Requests due in the counted time that ended so."""
        return int(np.sum(self._counted & (self.outcome == outcome)))

    def latency_ms(self, share: float) -> float:
        """Percentile of answers, from the time they were due; NaN if there are none."""
        return _quantile(self._of(ANSWERED, self.done - self.due), share)

    def refusal_ms(self, share: float) -> float:
        """Percentile of refusals, from the time they were sent; NaN if there are none."""
        return _quantile(self._of(REFUSED, self.done - self.sent), share)

    def late_ms(self, share: float) -> float:
        """Percentile of how late the clients sent; beyond a few ms, they cannot keep up."""
        return _quantile((self.sent - self.due)[self._counted], share)

    @property
    def _counted(self) -> NDArray[np.bool_]:
        return np.logical_and(self.due >= 0, self.due < self.load.seconds)

    def _of(self, outcome: int, times: NDArray[np.float64]) -> NDArray[np.float64]:
        chosen: NDArray[np.float64] = times[self._counted & (self.outcome == outcome)]
        return chosen


def _quantile(seconds: NDArray[np.float64], share: float) -> float:
    return float(np.quantile(seconds, share)) * 1e3 if len(seconds) else float("nan")


class Clients:
    """Client processes, ready to run one load after another."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def run(self, load: Load, server: Server) -> Measured:
        """Run a load and wait for its last answer; the server's CPU time and memory with it."""
        count = len(self._pipes)
        for number, pipe in enumerate(self._pipes):
            callers = load.callers // count + (number < load.callers % count)
            pipe.send((replace(load, callers=callers, rate=load.rate / count), number, count))
        replies = [pipe.recv() for pipe in self._pipes]
        if any(isinstance(reply, Exception) for reply in replies):
            self._give_up(replies)
        start = time.monotonic() + _START_DELAY
        for pipe in self._pipes:
            pipe.send(start)
        _sleep_until(start + load.warm_up)
        used, memory = server.cpu_seconds(), []
        for second in np.arange(0, load.seconds, 0.25):
            _sleep_until(start + load.warm_up + second)
            memory.append((float(second), server.memory_bytes()))
        _sleep_until(start + load.warm_up + load.seconds)
        used = server.cpu_seconds() - used
        parts = [pipe.recv() for pipe in self._pipes]
        if any(isinstance(part, Exception) for part in parts):
            raise next(part for part in parts if isinstance(part, Exception))
        times = np.concatenate([part[0] for part in parts])
        return Measured(
            load=load,
            due=times[:, 0],
            sent=times[:, 1],
            done=times[:, 2],
            outcome=times[:, 3].astype(np.int8),
            failure=next((part[1] for part in parts if part[1]), ""),
            client_cpu=sum(part[2] for part in parts) / load.seconds,
            server_cpu=used / load.seconds,
            memory=tuple(memory),
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
            process.start()
            theirs.close()
            started.append((process, ours))
        yield Clients([pipe for _, pipe in started])
    finally:
        for process, pipe in started:
            pipe.close()
            process.join(DRAIN_SECONDS)


def _client(pipe: Connection) -> None:
    """A client process: loads come in, times go out, until the pipe closes."""
    keep_freed_memory()
    while True:
        try:
            load, number, count = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(asyncio.run(_run(load, number, count, pipe)))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


class _Record:
    """Times of requests, in the order of their ends."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.rows: list[tuple[float, float, float, int]] = []
        self.failure = ""

    async def timed(self, call: Call, due: float | None = None) -> None:
        """Call once."""
        sent = time.monotonic()
        outcome = ANSWERED
        try:
            await call()
        except (Exception, asyncio.CancelledError) as error:
            outcome = REFUSED if is_refusal(error) else FAILED
            if outcome == FAILED:
                self.failure = self.failure or f"{type(error).__name__}: {error}"
        done = time.monotonic()
        self.rows.append((sent if due is None else due, sent, done, outcome))


async def _run(
    load: Load, number: int, count: int, pipe: Connection
) -> tuple[NDArray[np.float64], str, float]:
    call, close = connect(load.target)
    try:
        await call()
        pipe.send("connected")
        loop = asyncio.get_running_loop()
        start = await loop.run_in_executor(None, pipe.recv)
        if start is None:
            return np.empty((0, 4)), "", 0.0
        counted = start + load.warm_up
        record = _Record(counted)
        used = threading.Thread(target=_measure_cpu, args=(counted, load.seconds, cpu := [0.0]))
        used.start()
        await asyncio.sleep(start - time.monotonic())
        if load.rate:
            await _open_loop(load, call, record, number, count)
        else:
            end = counted + load.seconds
            await asyncio.gather(*(_caller(call, record, end) for _ in range(load.callers)))
        used.join()
    finally:
        await close()
    times = np.array(record.rows, np.float64).reshape(-1, 4)
    times[:, :3] -= counted
    return times, record.failure, cpu[0]


async def _caller(call: Call, record: _Record, end: float) -> None:
    while time.monotonic() < end:
        await record.timed(call)


async def _open_loop(load: Load, call: Call, record: _Record, number: int, count: int) -> None:
    start = record.start - load.warm_up
    under_way: set[asyncio.Task[None]] = set()
    for due in start + _arrivals(load, number, count):
        # Even if late: answers must be taken in between.
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(record.timed(call, due))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    late = (await asyncio.wait(under_way, timeout=DRAIN_SECONDS))[1] if under_way else set()
    for task in late:
        task.cancel()
    await asyncio.gather(*late)


def _arrivals(load: Load, number: int, count: int) -> NDArray[np.float64]:
    """When requests of one process are due, seconds from the start."""
    length = load.warm_up + load.seconds
    if not load.poisson:
        return np.arange(number / count, length * load.rate) / load.rate
    generator = np.random.default_rng(number)
    times = np.empty(0)
    while not len(times) or times[-1] < length:
        gaps = generator.exponential(1 / load.rate, 1000)
        times = np.concatenate([times, (times[-1] if len(times) else 0) + np.cumsum(gaps)])
    return times[times < length]


def _measure_cpu(start: float, seconds: float, used: list[float]) -> None:
    _sleep_until(start)
    before = time.process_time()
    _sleep_until(start + seconds)
    used[0] = time.process_time() - before


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
