"""Many callers: batching, other servers, and more load than the server can take."""

import contextlib
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from attnserve_loadtest.load.generator import Clients
from attnserve_loadtest.load.measured import ANSWERED, FAILED, REFUSED, Measured
from attnserve_loadtest.load.plan import Load
from attnserve_server.settings import usable_cores
from serving_calls import Protocol, Target
from serving_peers import PEERS, missing, serve
from serving_report import Bar, Row, Section
from serving_servers import Server, attnserve

# How attnserve-server is told not to batch.
UNBATCHED = ("--max-batch-size", "1")

CALLERS_BAR = 3.0
# Requests/s against any of them, by length; the same file is held to no more than being ahead.
PEER_BARS = {32: 4.0, 64: 4.0, 256: 2.5}
P99_BAR = 1.0
GOODPUT_BAR, REFUSAL_BAR_MS, MEMORY_BAR = 0.9, 20.0, 1.1


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: counted, of each load.
        warm_up: seconds before.
        rounds: of turns.
    """

    seconds: float
    warm_up: float
    rounds: int


def callers(
    repository: Path, clients: Clients, *, count: int, seq_len: int, effort: Effort
) -> Section:
    """Many callers of short requests, against the same server without batching.

    Both servers are up; one is called, the other idle, in turns.
    """
    rows: list[Row] = []
    bars = []
    with attnserve(repository) as batched, attnserve(repository, *UNBATCHED) as unbatched:
        servers = {"batched": batched, "unbatched": unbatched}
        for protocol in PROTOCOLS:
            targets = {n: Target(protocol, s.address, seq_len) for n, s in servers.items()}
            runs = _turns(clients, servers, targets, count, effort)
            rows += [{"protocol": protocol, **_row(name, r)} for name, r in runs.items()]
            ratio, p99 = _against(runs["batched"], runs["unbatched"])
            what = f"{count} callers of S={seq_len}, {protocol}"
            bars.append(Bar(f"{what}: requests/s / unbatched", ratio, CALLERS_BAR, at_least=True))
            bars.append(Bar(f"{what}: p99 / unbatched", p99, P99_BAR))
    return Section("callers", rows, bars, [_PROTOCOLS])


def peers(
    repository: Path,
    clients: Clients,
    venvs: Path,
    *,
    counts: Sequence[int],
    seq_lens: Sequence[int],
    effort: Effort,
) -> Section:
    """attnserve and the peers that are installed, by the same tritonclient calls.

    All servers are up; one is called, the others idle, in turns. The bars are for the most callers.
    """
    file = repository / "causal" / "1" / "model.onnx"
    rows: list[Row] = []
    bars = []
    with _contenders(repository, venvs, file) as (servers, models, notes):
        for seq_len in seq_lens:
            for count in counts:
                targets = {
                    name: Target("triton", server.address, seq_len, models.get(name, "causal"))
                    for name, server in servers.items()
                }
                targets["attnserve, sdk"] = Target("sdk", servers[OWN_CHOICE].address, seq_len)
                everyone = servers | {"attnserve, sdk": servers[OWN_CHOICE]}
                runs = _turns(clients, everyone, targets, count, effort)
                rows += [
                    {"seq_len": seq_len, "callers": count, **_row(name, r)}
                    for name, r in runs.items()
                ]
                if count == max(counts):
                    bars += _peer_bars(runs, seq_len, count)
    return Section("peers", rows, bars, notes)


def overload(
    repository: Path,
    clients: Clients,
    *,
    seq_lens: Sequence[int],
    counts: Sequence[int],
    factors: Sequence[float],
    good_within: float,
    effort: Effort,
) -> Section:
    """The peak of a closed loop, then open loops at multiples of it, the last of which has bars."""
    rows: list[Row] = []
    bars = []
    for protocol, seq_len in itertools.product(PROTOCOLS, seq_lens):
        with attnserve(repository) as server:
            target = Target(protocol, server.address, seq_len)
            closed = [
                clients.run(Load(target, effort.seconds, effort.warm_up, callers=n), server)
                for n in counts
            ]
            peak = max(closed, key=lambda run: run.goodput(good_within))
            capacity = peak.goodput(good_within)
            rows.append(_open_row("closed", target, peak, capacity, good_within))
            for factor in factors:
                load = Load(target, effort.seconds * 2, effort.warm_up, rate=factor * capacity)
                run = clients.run(load, server)
                rows.append(_open_row(f"{factor:g}x", target, run, capacity, good_within))
        bars += _overload_bars(rows[-1])
    note = (
        f"Goodput: answers within {good_within:g} s of the time that the request was due, per "
        "second. Latency counts from then as well; refusals are timed from when they were sent. "
        "late_p99_ms: how late the clients were in sending. memory_growth: the last quarter of "
        "the time / the second."
    )
    return Section("overload", rows, bars, [_PROTOCOLS, note])


PROTOCOLS: tuple[Protocol, ...] = ("sdk", "message")

OWN_CHOICE, SAME_FILE = "attnserve", "attnserve, same file"

_PROTOCOLS = (
    "sdk: the typed API through the SDK. message: the same, by a request built once and with "
    "answers left unread, which is the least that clients can take of the machine they share."
)


@contextlib.contextmanager
def _contenders(
    repository: Path, venvs: Path, file: Path
) -> Iterator[tuple[dict[str, Server], dict[str, str], list[str]]]:
    """Servers by contender, models by contender where they are not `causal`, and notes."""
    threads = usable_cores()
    notes = [f"Every server computes with {threads} threads that do not spin while idle."]
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(attnserve(repository))
        servers = {OWN_CHOICE: ours, SAME_FILE: ours}
        notes.append(
            f"{OWN_CHOICE}: with the variant that it picks. {SAME_FILE}: with {file.name}, the "
            "file that the peers serve, alone in its model."
        )
        for peer in PEERS:
            reason = missing(peer, venvs)
            if not reason:
                try:
                    server = stack.enter_context(serve(peer, venvs, file, threads))
                except RuntimeError as error:
                    reason = str(error)
                else:
                    servers[peer.name] = server
                    notes.append(f"{peer.name}: {server.said}; {peer.about}.")
            if reason:
                notes.append(f"{peer.name}: not measured: {reason}")
        yield servers, {SAME_FILE: "same-file"}, notes


def _turns(
    clients: Clients,
    servers: dict[str, Server],
    targets: dict[str, Target],
    count: int,
    effort: Effort,
) -> dict[str, list[Measured]]:
    """A closed loop on each contender, in rounds, in an order that rotates."""
    names = list(targets)
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    for number in range(effort.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            load = Load(targets[name], effort.seconds, effort.warm_up, callers=count)
            runs[name].append(clients.run(load, servers[name]))
    return runs


def _row(name: str, runs: list[Measured]) -> Row:
    """Medians over rounds."""

    def median(figure: Sequence[float]) -> float:
        return float(statistics.median(figure))

    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    return {
        "contender": name,
        "requests/s": median([run.throughput for run in runs]),
        **{f"{p}_ms": median([r.latency_ms(s) for r in runs]) for p, s in shares.items()},
        "server_cores": median([run.server_cpu for run in runs]),
        "client_cores": median([run.client_cpu for run in runs]),
        "failed": sum(run.count(FAILED) + run.count(REFUSED) for run in runs),
        "failure": next((run.failure for run in runs if run.failure), "")[:120],
    }


def _against(ours: list[Measured], theirs: list[Measured]) -> tuple[float, float]:
    """Medians, over rounds, of the ratios of requests/s and of p99."""
    pairs = list(zip(ours, theirs, strict=True))
    rates = [a.throughput / b.throughput if b.throughput else float("nan") for a, b in pairs]
    p99 = [a.latency_ms(0.99) / b.latency_ms(0.99) for a, b in pairs]
    return statistics.median(rates), statistics.median(p99)


def _peer_bars(runs: dict[str, list[Measured]], seq_len: int, count: int) -> list[Bar]:
    bars = []
    for ours, bound in ((OWN_CHOICE, PEER_BARS.get(seq_len, 1.0)), (SAME_FILE, 1.0)):
        for peer in PEERS:
            if peer.name in runs:
                ratio, p99 = _against(runs[ours], runs[peer.name])
                what = f"{ours} / {peer.name}, S={seq_len}, {count} callers"
                bars.append(Bar(f"{what}: requests/s", ratio, bound, at_least=True))
                bars.append(Bar(f"{what}: p99", p99, P99_BAR))
    return bars


def _overload_bars(row: Row) -> list[Bar]:
    what = f"S={row['seq_len']} at {row['load']}, {row['protocol']}"
    slowest = row["refused_max_ms"] if row["refused"] else 0.0
    return [
        Bar(f"{what}: goodput / peak", row["goodput/peak"], GOODPUT_BAR, at_least=True),
        Bar(f"{what}: slowest refusal, ms", slowest, REFUSAL_BAR_MS),
        Bar(f"{what}: memory growth", row["memory_growth"], MEMORY_BAR),
        Bar(f"{what}: requests that failed", float(row["failed"]), 0),
    ]


def _open_row(name: str, target: Target, run: Measured, capacity: float, within: float) -> Row:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    seconds = np.array([second for second, _ in run.memory])
    resident = np.array([size for _, size in run.memory], np.float64)
    quarter = run.load.seconds / 4
    second = resident[(seconds >= quarter) & (seconds < 2 * quarter)]
    last = resident[seconds >= 3 * quarter]
    goodput = run.goodput(within)
    return {
        "protocol": target.protocol,
        "seq_len": target.seq_len,
        "load": name,
        "offered/s": run.load.rate or float("nan"),
        "callers": run.load.callers if not run.load.rate else "",
        "goodput/s": goodput,
        "goodput/peak": goodput / capacity if capacity else float("nan"),
        **{f"{p}_ms": run.latency_ms(share) for p, share in shares.items()},
        "answered": run.count(ANSWERED),
        "refused": run.count(REFUSED),
        "failed": run.count(FAILED),
        "refused_p50_ms": run.refusal_ms(0.5),
        "refused_p99_ms": run.refusal_ms(0.99),
        "refused_max_ms": run.refusal_ms(1.0),
        "late_p99_ms": run.late_ms(0.99),
        "memory_MiB": float(np.max(resident)) / 2**20,
        "memory_growth": float(np.median(last) / np.median(second)) if len(second) else 1.0,
        "server_cores": run.server_cpu,
        "client_cores": run.client_cpu,
        "failure": run.failure[:120],
    }
