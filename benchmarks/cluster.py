"""One client over several servers: what it makes of them, and what it loses with one.

    goodput     three servers against one, 24 callers in a closed loop; the servers answer after a
                fixed time, one request after another (fixed_server.py), as this machine has not
                the cores for three that compute
    shards      a step of one session by heads over two servers against one server of all heads,
                and by context; 8 heads of 64, interleaved
    kills       one of three servers is killed with SIGKILL under a steady load and started anew:
                every answer and every session's step is compared with attention in float64

The servers of the last two are attnserve's, on the CPU; they and the client share the machine. The
load average is said.

    python benchmarks/cluster.py --json reports/cluster.json
"""

import itertools
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import serving_sections
from attnserve_client import AttentionClient, AttnserveError, Session, Shards
from attnserve_proto.commands import Parser, values
from common import process
from serving_report import Bar, Row, Section
from serving_servers import Server, attnserve

Array = np.ndarray[Any, Any]

GOODPUT_BAR, OVERHEAD_BAR_MS, BACK_BAR, BACK_SECONDS = 2.7, 0.2, 0.95, 2.0
FIXED_MS, CALLERS, IN_TIME_SECONDS = 5.0, 24, 0.25
HEADS, DIM, CONTEXT = 8, 64, 256
# Of the kills: callers, each of which is due so often a second, and the most that an answer takes.
STEADY_CALLERS, STEADY_RATE, STEADY_BOUND_SECONDS = 8, 20.0, 0.5
POSITIONS, SETTLE_SECONDS, WINDOW_SECONDS = 16, 1.0, 1.0


def goodput(seconds: float, rounds: int) -> Section:
    """Answers in time, of three servers and of one."""
    rows: list[Row] = []
    with ExitStack() as stack:
        command = [sys.executable, str(Path(__file__).with_name("fixed_server.py")), str(FIXED_MS)]
        addresses = [
            stack.enter_context(process(command, lambda line: line.split()[-1])) for _ in range(3)
        ]
        for number, count in itertools.product(range(rounds), (1, 3)):
            with AttentionClient(addresses[:count]) as client:
                rate = _closed_loop(client, seconds)
            rows.append({"round": number, "servers": count, "goodput/s": rate})
    of = {
        count: statistics.median(row["goodput/s"] for row in rows if row["servers"] == count)
        for count in (1, 3)
    }
    note = f"{CALLERS} callers, {FIXED_MS:g} ms a request; {_load_average()}"
    bar = Bar("three servers / one", of[3] / of[1], GOODPUT_BAR, at_least=True)
    return Section("goodput", rows, [bar], [note])


def shards(repository: Path, steps: int, rounds: int) -> Section:
    """Steps of one token, after 256 of context."""
    generator = np.random.default_rng(0)
    kinds: dict[str, tuple[str, Shards | None]] = {
        "one server, all heads": ("whole", None),
        "one server, half of the heads": ("half", None),
        "two servers, by heads": ("half", Shards(2)),
        "two servers, by context": ("whole", Shards(2, "context")),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        servers = [stack.enter_context(attnserve(repository)) for _ in range(2)]
        client = stack.enter_context(AttentionClient([each.address for each in servers]))
        sessions: dict[str, tuple[Session, int]] = {}
        for kind, (model, over) in kinds.items():
            heads = HEADS // 2 if over is None and model == "half" else HEADS
            session = client.session(model, num_layers=1, max_tokens=1 << 16, shards=over)
            for _ in range(2):
                session.attend(0, *_tensors(generator, heads, CONTEXT // 2))
            sessions[kind] = session, heads
        for _ in range(rounds):
            for kind, (session, heads) in sessions.items():
                given = _tensors(generator, heads, 1)
                taken = []
                for _ in range(steps):
                    start = time.perf_counter()
                    session.attend(0, *given)
                    taken.append(time.perf_counter() - start)
                session.truncate(CONTEXT)
                times[kind].append(statistics.median(taken) * 1e3)
    rows: list[Row] = [
        {"session": kind, "step, ms": statistics.median(each)} for kind, each in times.items()
    ]
    one = times["one server, all heads"]
    over_one = [
        statistics.median(a - b for a, b in zip(times[kind], one, strict=True))
        for kind in ("two servers, by heads", "two servers, by context")
    ]
    bars = [Bar("by heads over two: over one, ms", over_one[0], OVERHEAD_BAR_MS)]
    notes = [f"by context over two: {over_one[1]:.3f} ms over one", _load_average()]
    return Section("shards", rows, bars, notes)


def kills(repository: Path, count: int) -> Section:
    """Kill one of three servers under load, start it anew, `count` times."""
    rows: list[Row] = []
    tally = _Tally()
    with (
        _Three(repository) as servers,
        AttentionClient(servers.addresses) as client,
        ThreadPoolExecutor(2 * STEADY_CALLERS) as pool,
    ):
        callers = [
            *(pool.submit(_call, client, tally, n) for n in range(STEADY_CALLERS)),
            *(pool.submit(_decode, client, tally, n) for n in range(STEADY_CALLERS)),
        ]
        try:
            time.sleep(2 * SETTLE_SECONDS)
            for number in range(count):
                rows.append({"kill": number, **_kill(client, servers, tally)})
                if (number + 1) % 10 == 0:
                    print(f"{number + 1} of {count} kills", file=sys.stderr, flush=True)
        finally:
            tally.stop.set()
        for caller in callers:
            caller.result(60)
    back = [float(row["goodput after"]) for row in rows]
    notes = [
        f"{tally.calls} calls, {tally.steps} steps; sessions at killed servers: "
        f"{sum(int(row['sessions there']) for row in rows)}, reported lost: {tally.reported}",
        _load_average(),
    ]
    bars = [
        Bar("calls lost", tally.lost, 0),
        Bar("calls wrong", tally.wrong, 0),
        Bar("sessions wrong without an error", tally.silent, 0),
        Bar("least goodput from 2 s after the replacement", min(back), BACK_BAR, at_least=True),
        Bar("median of them", statistics.median(back), BACK_BAR, at_least=True),
    ]
    return Section("kills", rows, bars, notes)


@dataclass
class _Tally:
    """What became of calls and sessions.

    Attributes:
        lost, wrong: calls that raised, or whose answer was another than attention.
        silent: steps likewise, though no error had told of their session.
        reported: sessions of which an error told that they are lost.
        answered: when calls were answered within the bound.
    """

    calls: int = 0
    lost: int = 0
    wrong: int = 0
    steps: int = 0
    silent: int = 0
    reported: int = 0
    answered: list[float] = field(default_factory=list)
    sessions: dict[int, Session] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def within(self, start: float, seconds: float) -> float:
        """The share of the calls that were due in some time and were answered within the bound."""
        with self.lock:
            answered = sum(start <= moment < start + seconds for moment in self.answered)
        return answered / (STEADY_CALLERS * STEADY_RATE * seconds)


class _Three:
    """Three servers, that are killed and started anew where they were."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._stack = ExitStack()
        self._running = [self._start("0") for _ in range(3)]

    def __enter__(self) -> "_Three":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, port: str) -> Server:
        return self._stack.enter_context(attnserve(self._repository, "--port", port))

    @property
    def addresses(self) -> list[str]:
        """Of the three."""
        return [each.address for each in self._running]

    def kill(self, index: int) -> None:
        """End one with SIGKILL."""
        self._running[index].process.kill()

    def replace(self, index: int) -> None:
        """Start it anew; it listens once this returns."""
        self._running[index] = self._start(self.addresses[index].rpartition(":")[2])


def _kill(client: AttentionClient, servers: _Three, tally: _Tally) -> Row:
    before = tally.within(time.monotonic() - WINDOW_SECONDS, WINDOW_SECONDS)
    index = random.randrange(3)
    address = servers.addresses[index]
    there = [each for each in tally.sessions.values() if _address(client, each) == address]
    servers.kill(index)
    killed = time.monotonic()
    time.sleep(WINDOW_SECONDS)
    without = tally.within(killed, WINDOW_SECONDS)
    servers.replace(index)
    back = time.monotonic()
    time.sleep(BACK_SECONDS + WINDOW_SECONDS + STEADY_BOUND_SECONDS)
    return {
        "goodput before": before,
        "in the second of the kill": without,
        "goodput after": tally.within(back + BACK_SECONDS, WINDOW_SECONDS),
        "sessions there": len(there),
        "serves again": client.server_states[address] == "serving",
    }


def _call(client: AttentionClient, tally: _Tally, number: int) -> None:
    """Calls at a steady rate, each compared."""
    generator = np.random.default_rng(number)
    due = time.monotonic() + number / STEADY_CALLERS / STEADY_RATE
    while not tally.stop.wait(max(0.0, due - time.monotonic())):
        query, key, value = _tensors(generator, HEADS, POSITIONS)
        batch = [each.swapaxes(0, 1)[None] for each in (query, key, value)]
        with tally.lock:
            tally.calls += 1
        try:
            output = client.attend(*batch, model="whole", timeout=30.0).output
        except AttnserveError:
            with tally.lock:
                tally.lost += 1
        else:
            assert output is not None
            right = np.allclose(output[0].swapaxes(0, 1), _causal(query, key, value), atol=1e-4)
            with tally.lock:
                tally.wrong += not right
                if time.monotonic() - due <= STEADY_BOUND_SECONDS:
                    tally.answered.append(due)
        due += 1 / STEADY_RATE


def _decode(client: AttentionClient, tally: _Tally, number: int) -> None:
    """Sessions of one token a step, each step compared; one that is lost is opened anew."""
    generator = np.random.default_rng(1000 + number)
    while not tally.stop.is_set():
        try:
            session = client.session("whole", num_layers=1, max_tokens=512)
        except AttnserveError:
            continue
        tally.sessions[number] = session
        told: list[list[Array]] = [[], [], []]
        for _ in range(512):
            if tally.stop.wait(1 / STEADY_RATE):
                return
            for held, new in zip(told, _tensors(generator, HEADS, 1), strict=True):
                held.append(new)
            query = told[0][-1]
            key, value = (np.concatenate(held) for held in told[1:])
            try:
                output = session.attend(0, query, key[-1:], value[-1:]).output
            except AttnserveError:
                with tally.lock:
                    tally.reported += 1
                break
            assert output is not None
            right = np.allclose(output, _causal(query, key, value), atol=1e-4)
            with tally.lock:
                tally.steps += 1
                tally.silent += not right


def _closed_loop(client: AttentionClient, seconds: float) -> float:
    """Answers in time, a second."""
    generator = np.random.default_rng(0)
    query, key, value = (
        each.swapaxes(0, 1)[None] for each in _tensors(generator, HEADS, POSITIONS)
    )
    client.attend(query, key, value, model="whole")
    time.sleep(0.5)  # until all servers have said how they are
    end = time.monotonic() + seconds

    def call() -> int:
        good = 0
        while (start := time.monotonic()) < end:
            client.attend(query, key, value, model="whole")
            good += time.monotonic() - start <= IN_TIME_SECONDS
        return good

    with ThreadPoolExecutor(CALLERS) as pool:
        return sum(each.result() for each in [pool.submit(call) for _ in range(CALLERS)]) / seconds


def _address(client: AttentionClient, session: Session) -> str:
    assert client._cluster is not None
    found = client._cluster.of(lambda server: server.connection is session._connection)
    return "" if found is None else found.server.address


def _tensors(generator: np.random.Generator, heads: int, tokens: int) -> tuple[Array, Array, Array]:
    query, key, value = generator.standard_normal((3, tokens, heads, DIM)).astype(np.float32)
    return query, key, value


def _causal(query: Array, key: Array, value: Array) -> Array:
    """Of [T, H, D], in float64; the queries are the last of the keys' positions."""
    scores = np.einsum("qhd,khd->hqk", query.astype(float), key.astype(float)) / DIM**0.5
    later = np.triu(np.ones(scores.shape[1:], bool), 1 + len(key) - len(query))
    scores[:, later] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    attention: Array = np.einsum("hqk,khd->qhd", weights, value.astype(float))
    return attention


@contextmanager
def _models(given: Path | None) -> Iterator[Path]:
    """A repository with causal cores of all heads, `whole`, and of half of them, `half`."""
    if given is not None:
        yield given
        return
    from attnserve_export.cli import main as export

    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("whole", HEADS), ("half", HEADS // 2)):
            arguments = ["core", "--out", folder, "--name", name, "--mask", "causal"]
            if export([*arguments, "--num-heads", str(count), "--head-dim", str(DIM)]) != 0:
                raise RuntimeError(f"{name} could not be exported")
        yield Path(folder)


def _load_average() -> str:
    return f"load average of the machine: {os.getloadavg()[0]:.1f}"


def main() -> int:
    """Run the benchmark; 1 if a section could not be measured."""
    options = _parser().parse_args()
    seconds, rounds, steps = (0.5, 1, 20) if options.quick else (5.0, 3, 200)
    with _models(options.repository) as models:
        done, failed = serving_sections.measured(
            options.sections,
            {
                "goodput": lambda: goodput(seconds, rounds),
                "shards": lambda: shards(models, steps, 1 if options.quick else 20),
                "kills": lambda: kills(models, 1 if options.quick else options.kills),
            },
        )
    return serving_sections.write("cluster", options, done, failed)


def _parser() -> Parser:
    parser = serving_sections.arguments(
        __doc__ or "",
        ["goodput", "shards", "kills"],
        repository="take `whole` and `half` from there, of 8 and of 4 heads of 64",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="in seconds: figures say little")
    add("--kills", type=values.integer(1, 10_000), default=50, help="how often (default 50)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
