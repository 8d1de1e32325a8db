"""Servers that are all started again, one after another, while sessions decode on them.

    python benchmarks/faults/rolling.py --json reports/rolling.json

Each server is told to end (SIGTERM), hands its sessions to the others, ends and is started again.
Sessions take steps of one token all the while, some one after another and some in batches; each
output is compared with attention in float64. None may be lost, nor wrong. A gap is the time from
one token of a session to its next.
"""

import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import mixed
import numpy as np
from attnserve_client import AttentionClient, AttnserveError, Batch, Session
from attnserve_proto.commands import Parser, values
from mixed import DIM, HEADS, TOLERANCE, Array

SERVERS, LAYERS, PROMPT, MOST_TOKENS = 3, 2, 32, 4096
# That all callers may take to begin.
_SECONDS = 120.0


class Plain:
    """Keys and values of one session, and what attention to them gives."""

    def __init__(self) -> None:
        self._held = np.zeros((LAYERS, 2, MOST_TOKENS, HEADS, DIM), np.float32)
        self._length = 0

    @property
    def is_full(self) -> bool:
        """Whether it takes no further token."""
        return self._length == MOST_TOKENS

    def last(self, layer: int, query: Array, key: Array, value: Array) -> Array:
        """The output of the last of some new tokens, [heads, dim], in float64."""
        end = self._length + len(key)
        held = self._held[layer]
        held[0, self._length : end], held[1, self._length : end] = key, value
        keys, values_ = held[:, :end].astype(np.float64)
        scores = np.einsum("hd,khd->hk", query[-1].astype(np.float64), keys) / np.sqrt(DIM)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        if layer == LAYERS - 1:
            self._length = end
        return np.asarray(np.einsum("hk,khd->hd", weights, values_))


@dataclass
class Tally:
    """What came of the steps.

    Attributes:
        callers: that take them.
        stop: tells them to end.
        gaps: (when a token came, seconds since the one before it of its session).
        lost: what ended sessions.
        wrong: by how much outputs were off.
    """

    callers: int
    stop: threading.Event = field(default_factory=threading.Event)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        # For all of them, once their sessions have their first tokens: others' prompts are no gaps.
        self.begun = threading.Barrier(self.callers + 1)

    def longest(self, since: float = 0.0) -> float:
        """The longest gap of tokens that came since then, ms; 0: none came."""
        return max((gap for came, gap in list(self.gaps) if came >= since), default=0.0) * 1e3


@dataclass
class Group:
    """Sessions that take their steps together."""

    steps: Session | Batch
    plains: list[Plain]
    came: float = 0.0

    def step(self, generator: np.random.Generator, tokens: int, tally: Tally) -> None:
        """Take one, and look at what comes."""
        count = len(self.plains)
        for layer in range(LAYERS):
            given = generator.standard_normal((3, count * tokens, HEADS, DIM), np.float32)
            output = self.steps.attend(layer, *given).output
            for n, plain in enumerate(self.plains):
                rows = slice(n * tokens, (n + 1) * tokens)
                expected = plain.last(layer, *given[:, rows])
                error = np.inf if output is None else np.abs(output[rows][-1] - expected).max()
                if not error <= TOLERANCE:
                    tally.wrong.append(float(error))
        now = time.monotonic()
        if self.came:
            tally.gaps.extend([(now, now - self.came)] * count)
        self.came = now


def decode(addresses: Sequence[str], number: int, count: int, tally: Tally) -> None:
    """One caller: its sessions take step after step, in one batch if its number is odd."""
    generator = np.random.default_rng(number)
    with AttentionClient(addresses) as client:
        sessions = [
            client.session("causal", num_layers=LAYERS, max_tokens=MOST_TOKENS, reserved_tokens=256)
            for _ in range(count)
        ]
        plains = [Plain() for _ in sessions]
        groups = (
            [Group(client.batch(sessions), plains)]
            if number % 2
            else [Group(one, [plain]) for one, plain in zip(sessions, plains, strict=True)]
        )
        tokens = PROMPT
        while not tally.stop.is_set():
            for group in list(groups):
                try:
                    if not group.plains[0].is_full:
                        group.step(generator, tokens, tally)
                except AttnserveError as error:
                    tally.lost.extend([str(error)] * len(group.plains))
                    groups.remove(group)
            if tokens == PROMPT:
                tally.begun.wait(_SECONDS)
                for group in groups:
                    group.came = time.monotonic()
            tokens = 1


@contextlib.contextmanager
def serving(repository: Path) -> Iterator[list[mixed.Server]]:
    """Servers, each of which hands its sessions to the others."""
    ports = [common.free_port() for _ in range(SERVERS)]
    limits = ("--metrics-port", "-1", "--max-queue-ms", "60000", "--max-queue", "4096")
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                mixed.Server(
                    repository,
                    *limits,
                    "--move-sessions-to",
                    ",".join(f"127.0.0.1:{other}" for other in ports if other != port),
                    port=port,
                )
            )
            for port in ports
        ]


def restart(server: mixed.Server, tally: Tally, settle: float) -> dict[str, Any]:
    """End a server and start it again; what came of it."""
    before = time.monotonic()
    code = server.end(signal.SIGTERM)
    ended = time.monotonic()
    if code != 0:
        tally.lost.append(f"exit code {code}; allowed: 0")
    server.start()
    started = time.monotonic()
    time.sleep(settle)
    return {
        "server": server.address,
        "ended_seconds": ended - before,
        "away_seconds": started - ended,
        "longest_gap_ms": tally.longest(before),
    }


def main() -> int:
    """Measure, print, and write the figures; 1 if anything was lost or wrong."""
    parsed = _parser().parse_args()
    callers = min(parsed.callers, parsed.sessions)
    tally, rows = Tally(callers), []
    counts = [len(range(n, parsed.sessions, callers)) for n in range(callers)]
    with tempfile.TemporaryDirectory() as folder:
        mixed.export(Path(folder), "causal")
        with serving(Path(folder)) as servers, ThreadPoolExecutor(callers) as pool:
            addresses = [server.address for server in servers]
            decoding = [
                pool.submit(decode, addresses, number, count, tally)
                for number, count in enumerate(counts)
            ]
            try:
                tally.begun.wait(_SECONDS)
                time.sleep(parsed.settle)
                steady = tally.longest()
                for _ in range(parsed.rounds):
                    rows += [restart(server, tally, parsed.settle) for server in servers]
            finally:
                tally.stop.set()
            for each in decoding:
                each.result(60)
    figures = {
        "servers": SERVERS,
        "sessions": parsed.sessions,
        "tokens": len(tally.gaps),
        "lost": len(tally.lost),
        "wrong": len(tally.wrong),
        "median_gap_ms": statistics.median(gap for _, gap in tally.gaps) * 1e3,
        "longest_gap_ms": tally.longest(),
        "longest_gap_before_ms": steady,
        "load_average": os.getloadavg()[0],
    }
    print("\n".join([*tally.lost[:20], *map(str, tally.wrong[:20])]))
    print(common.table(rows))
    print(common.table([figures]))
    common.write_json(parsed.json, figures | {"restarts": rows})
    return 1 if tally.lost or tally.wrong else 0


def _parser() -> Parser:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=values.integer(1, 10_000), default=200)
    parser.add_argument("--callers", type=values.integer(1, 256), default=8)
    parser.add_argument("--rounds", type=values.integer(1, 1000), default=1)
    parser.add_argument("--settle", type=values.seconds, default=3.0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
