"""The data plane against what its bytes and its kernel must cost, and overloaded.

Causal attention of 8 heads of 64 in FP32, on the CPU. The echo is a bare nghttp2 server that moves
the same bytes (native/echo.cc); load is made by gRPC's own C++ client (native/load.cc), beyond
capacity by a bare nghttp2 client (native/flood.cc). All of a section runs side by side, in rounds
of a few seconds that take turns; medians of rounds count.

    one-caller   p50 against (echo + the same graph in process)
    callers      16 callers: requests/s against the echo's, the server's CPU time for each
    cores        requests/s at 256 positions, with two cores against one
    overload     open loop beyond capacity: goodput, refusals, health checks, memory, recovery
    sdk          p50 through the Python SDK against (the same bytes to the echo + in process)
    shared       p50 through shared memory against in process
    connections  memory of idle connections

    python benchmarks/dataplane.py --json reports/dataplane.json
"""

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import dataplane_native as native
import grpc
import numpy as np
import serving_latency as latency
import serving_sections
import serving_servers
from attnserve_client import AttentionClient, keep_freed_memory
from attnserve_client import _channel as channel
from attnserve_proto.commands import Parser, values
from dataplane_native import Loads
from serving_calls import HEAD_DIM, NUM_HEADS, tensors
from serving_report import Bar, Row, Section
from serving_servers import Server

ECHO_THREADS = 2
OVER_AT_ONE_MS = 0.10
RATIO_BARS = {32: 1.25, 64: 1.25, 256: 1.25, 1024: 1.1, 4096: 1.1}
CALLERS, CALLERS_BAR, CPU_BAR_MS = 16, 0.5, 0.20
CORES_BAR = 1.7
GOODPUT_BAR, REFUSAL_BAR_MS, HEALTH_BAR_MS = 0.95, 10.0, 20.0
MEMORY_BAR, RECOVERY_BAR_MS = 1.2, 1000.0
SDK_BAR = 1.1
SHARED_SHORT_BAR_MS, SHARED_LONG_BAR = 0.35, 1.02
CONNECTIONS_BAR_MB = 200.0

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    lengths: tuple[int, ...] = (1, 32, 64, 256, 1024, 4096)
    callers_lengths: tuple[int, ...] = (32, 64, 256)
    overload_lengths: tuple[int, ...] = (32, 256, 1024)
    factors: tuple[float, ...] = (2.0, 4.0, 10.0)
    rounds: int = 5
    seconds: float = 2.0  # of a round
    overload_seconds: float = 60.0
    sdk_rounds: int = 400
    connections: int = 10_000

    def seconds_at(self, seq_len: int) -> float:
        """Of a round; more where a request takes long."""
        return self.seconds * max(1, seq_len // 1024)


QUICK = Sizes(rounds=3, seconds=1.0, overload_seconds=5.0, sdk_rounds=100, connections=1000)


def one_caller(repository: Path, loads: Loads, sizes: Sizes) -> Section:
    """What one caller waits for."""
    rows, bars = [], []
    with (
        native.echo(ECHO_THREADS) as echo,
        _attnserve(repository) as server,
        AttentionClient(server.address) as client,
    ):
        session = latency.InProcess(repository, client)
        for seq_len in sizes.lengths:
            call = session.call(*tensors(seq_len))
            times: dict[str, list[float]] = {"echo": [], "attnserve": [], "in_process": []}
            for _ in range(sizes.rounds):
                for name, one in (("echo", echo), ("attnserve", server)):
                    figures = loads.closed(one, seq_len, 1, sizes.seconds_at(seq_len))
                    times[name].append(figures["answers"]["p50_ms"])
                times["in_process"].append(_p50_ms(call, sizes.seconds / 2))
            row: Row = {f"{name}_ms": median(values) for name, values in times.items()}
            least = row["echo_ms"] + row["in_process_ms"]
            row |= {"over_ms": row["attnserve_ms"] - least}
            row |= {"ratio": row["attnserve_ms"] / least}
            rows.append({"seq_len": seq_len, **row})
            if seq_len in RATIO_BARS:
                text = f"one caller, S={seq_len}: p50 / (echo + in process)"
                bars.append(Bar(text, row["ratio"], RATIO_BARS[seq_len]))
            else:
                text = f"one caller, S={seq_len}: p50, ms over (echo + in process)"
                bars.append(Bar(text, row["over_ms"], OVER_AT_ONE_MS))
    return Section("one-caller", rows, bars)


def callers(repository: Path, loads: Loads, sizes: Sizes) -> Section:
    """What many callers get, and what each request costs."""
    rows, bars = [], []
    with native.echo(ECHO_THREADS) as echo, _attnserve(repository) as server:
        for seq_len in sizes.callers_lengths:
            runs: dict[str, list[tuple[float, float, float]]] = {"echo": [], "attnserve": []}
            for _ in range(sizes.rounds):
                for name, one in (("echo", echo), ("attnserve", server)):
                    before = one.cpu_seconds()
                    got = loads.closed(one, seq_len, CALLERS, sizes.seconds)
                    # The first quarter, in which as much is served, is not counted.
                    requests = got["goodput"] * sizes.seconds
                    cpu = (one.cpu_seconds() - before) / requests * 1e3
                    runs[name].append((got["goodput"], cpu, got["answers"]["p99_ms"]))
            row: Row = {"seq_len": seq_len}
            for name, each in runs.items():
                rate, cpu, p99 = (median(values) for values in zip(*each, strict=True))
                row |= {f"{name}/s": rate, f"{name}_cpu_ms": cpu, f"{name}_p99_ms": p99}
            row |= {"share": row["attnserve/s"] / row["echo/s"]}
            rows.append(row)
            if seq_len == 32:
                text = f"{CALLERS} callers, S=32:"
                bars.append(Bar(f"{text} requests/s / echo's", row["share"], CALLERS_BAR, True))
                cpu = row["attnserve_cpu_ms"]
                bars.append(Bar(f"{text} server's CPU ms a request", cpu, CPU_BAR_MS))
    return Section("callers", rows, bars)


def cores(repository: Path, loads: Loads, sizes: Sizes) -> Section:
    """Two cores against one. The client is pinned nowhere: its share is said."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        return Section("cores", [], [], ["not measured: there is one core"])
    rates: dict[int, list[float]] = {1: [], 2: []}
    share: dict[int, list[float]] = {1: [], 2: []}
    with _pinned(repository, usable[:1]) as one, _pinned(repository, usable[:2]) as two:
        for _ in range(sizes.rounds):
            for count, server in ((1, one), (2, two)):
                got = loads.closed(server, 256, CALLERS, sizes.seconds)
                rates[count].append(got["goodput"])
                share[count].append(got["cpu_seconds"] / sizes.seconds)
    rows = [
        {"cores": count, "requests/s": median(rates[count]), "client_cores": median(share[count])}
        for count in rates
    ]
    ratio = median(rates[2]) / median(rates[1])
    bar = Bar("S=256: requests/s with two cores / with one", ratio, CORES_BAR, at_least=True)
    notes = [f"The machine has {len(usable)} cores, of which the client takes its share too."]
    return Section("cores", rows, [bar], notes)


def overload(
    repository: Path, loads: Loads, sizes: Sizes, deadline: float, together: bool
) -> Section:
    """Open loops beyond capacity; server and client on cores of their own, if there are two."""
    rows, bars = [], []
    usable = sorted(os.sched_getaffinity(0))
    half = len(usable) // 2
    if half and not together:
        loads = replace(loads, cores=tuple(usable[half:]))
    for seq_len in sizes.overload_lengths:
        with _pinned(repository, usable[:half] if half and not together else usable) as server:
            runs = [
                loads.closed(server, seq_len, CALLERS, sizes.seconds) for _ in range(sizes.rounds)
            ]
            closed = max(run["goodput"] for run in runs)
            memory = server.memory_bytes()
            # A closed loop may be at its client's limit: the server's is what counts.
            more = loads.open(server, seq_len, 1.3 * closed, 2 * sizes.seconds, deadline)
            capacity = max(closed, more["goodput"])
            for factor in sizes.factors:
                row = _beyond(loads, server, seq_len, capacity * factor, sizes, deadline)
                row |= {"goodput/peak": row["goodput/s"] / capacity}
                row |= {"memory/capacity": row.pop("memory") / memory}
                rows.append({"seq_len": seq_len, "load": f"{factor:g}x", **row})
                text = f"overload {factor:g}x, S={seq_len}:"
                bars += [
                    Bar(f"{text} goodput / peak", row["goodput/peak"], GOODPUT_BAR, True),
                    Bar(f"{text} refusals' p99, ms", row["refusal_p99_ms"], REFUSAL_BAR_MS),
                    Bar(f"{text} health checks' p99, ms", row["health_p99_ms"], HEALTH_BAR_MS),
                    Bar(f"{text} memory / at capacity", row["memory/capacity"], MEMORY_BAR),
                    Bar(f"{text} first answer after it, ms", row["recovery_ms"], RECOVERY_BAR_MS),
                ]
    notes = [
        f"Answers count within {deadline} s of when they were due. offered/s is what the client "
        "could offer. Server and client "
        + ("share all cores." if together or not half else f"have {half} core(s) each.")
    ]
    return Section("overload", rows, bars, notes)


def sdk(repository: Path, sizes: Sizes) -> Section:
    """Through the Python SDK; the same bytes go to the echo through grpcio."""
    rows, bars = [], []
    with (
        native.echo(ECHO_THREADS) as echo,
        _attnserve(repository) as server,
        AttentionClient(server.address, stream_threshold_bytes=1 << 62) as unary,
        AttentionClient(server.address, stream_threshold_bytes=0) as streamed,
        grpc.insecure_channel(echo.address, options=channel.options(echo.address)) as bare,
    ):
        session = latency.InProcess(repository, unary)
        plain: Any = bare.unary_unary("/echo/unary", None, None)
        stream: Any = bare.stream_stream("/echo/stream", None, None)
        lengths = latency.Lengths(sizes.lengths, sizes.sdk_rounds)
        for seq_len, rounds in lengths.each():
            q, k, v = tensors(seq_len)
            data = b"".join(array.tobytes() for array in (q, k, v))
            chunks = [
                data[at : at + channel.CHUNK_BYTES]
                for at in range(0, len(data), channel.CHUNK_BYTES)
            ]
            times = latency.in_turns(
                {
                    "unary": partial(unary.attend, q, k, v, model="causal"),
                    "streamed": partial(streamed.attend, q, k, v, model="causal"),
                    "in_process": session.call(q, k, v),
                    "echo_unary": partial(plain, data),
                    "echo_stream": partial(_streamed, stream, chunks),
                },
                rounds,
            )
            row: Row = {f"{n}_ms": float(np.median(t)) * 1e3 for n, t in times.items()}
            for name, floor in (("unary", "echo_unary"), ("streamed", "echo_stream")):
                ratio = row[f"{name}_ms"] / (row[f"{floor}_ms"] + row["in_process_ms"])
                row |= {f"{name}_ratio": ratio}
                bars.append(Bar(f"SDK, {name}, S={seq_len}: / (echo + in process)", ratio, SDK_BAR))
            rows.append({"seq_len": seq_len, **row})
    return Section("sdk", rows, bars)


def shared(repository: Path, sizes: Sizes) -> Section:
    """Through shared memory, the tensors lying there already."""
    section = latency.shared_memory(repository, latency.Lengths((64, 4096), sizes.sdk_rounds))
    over, ratio = section.rows[0]["shared_over_ms"], section.rows[1]["shared_ratio"]
    bars = [
        Bar("shared memory, S=64: ms over in process", over, SHARED_SHORT_BAR_MS),
        Bar("shared memory, S=4096: / in process", ratio, SHARED_LONG_BAR),
    ]
    return replace(section, name="shared", bars=bars)


def connections(repository: Path, sizes: Sizes) -> Section:
    """Idle connections, each with its preface and settings."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with _attnserve(repository) as server, contextlib.ExitStack() as stack:
        host, port = server.address.rsplit(":", 1)
        before = server.memory_bytes()
        for _ in range(sizes.connections):
            one = stack.enter_context(socket.create_connection((host, int(port))))
            one.sendall(_PREFACE)
        time.sleep(1)
        here = len(server.process.net_connections("tcp")) - 1
        grown = server.memory_bytes() - before
        row = {"connections": here, "before_MB": before / 1e6, "grown_MB": grown / 1e6}
    bar = Bar(f"{here} idle connections: MB", grown / 1e6, CONNECTIONS_BAR_MB)
    return Section("connections", [row], [bar])


def _beyond(
    loads: Loads, server: Server, seq_len: int, rate: float, sizes: Sizes, deadline: float
) -> Row:
    prober = loads.probe(server, sizes.overload_seconds)
    got = loads.open(server, seq_len, rate, sizes.overload_seconds, deadline)
    memory = server.memory_bytes()
    after = loads.closed(server, seq_len, 1, 2.0, deadline)
    health = native.probed(prober)
    statuses = got["statuses"]
    others = {k: n for k, n in statuses.items() if k not in (native.OK, native.RESOURCE_EXHAUSTED)}
    return {
        "asked/s": rate,
        "offered/s": got["offered"],
        "goodput/s": got["goodput"],
        "p99_ms": got["answers"]["p99_ms"],
        "refused": statuses.get(native.RESOURCE_EXHAUSTED, 0),
        "refusal_p99_ms": got["refusals"]["p99_ms"],
        "other_statuses": json.dumps(others),
        "health_p99_ms": health["answers"]["p99_ms"],
        "recovery_ms": after["first_ms"] if after["first_ms"] >= 0 else float("nan"),
        "sent_late_p99_ms": got["late_p99_ms"],
        "client_cores": got["cpu_seconds"] / got["seconds"],
        "memory": memory,
    }


def _attnserve(repository: Path) -> contextlib.AbstractContextManager[Server]:
    return serving_servers.attnserve(repository)


def _pinned(repository: Path, usable: list[int]) -> contextlib.AbstractContextManager[Server]:
    command = [sys.executable, "-m", "attnserve_server.cli", "--repository", str(repository)]
    command += ["--port", "0", "--metrics-port", "-1", "--log-level", "error"]
    names = ",".join(str(core) for core in usable)
    return serving_servers.start(["taskset", "-c", names, *command, "--provider", "cpu"])


def _streamed(method: Any, messages: list[bytes]) -> None:
    for _ in method(iter(messages)):
        pass


def _p50_ms(call: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end or not times:
        call()
        times.append(time.perf_counter() - started)
    return median(times) * 1e3


@contextlib.contextmanager
def _models(exported: Path | None) -> Iterator[Path]:
    """A repository with `causal`."""
    with tempfile.TemporaryDirectory() as folder:
        if exported is None:
            command = [sys.executable, "-m", "attnserve_export.cli", "core", "--name", "causal"]
            command += ["--mask", "causal", "--out", folder]
            command += ["--num-heads", str(NUM_HEADS), "--head-dim", str(HEAD_DIM)]
            subprocess.run(command, check=True, capture_output=True)
        else:
            shutil.copytree(exported / "causal", Path(folder) / "causal")
        yield Path(folder)


def main() -> int:
    """Run the benchmark; 1 if a section could not be measured."""
    options = _parser().parse_args()
    keep_freed_memory()
    sizes = QUICK if options.quick else Sizes()
    if options.seconds:
        sizes = replace(sizes, overload_seconds=options.seconds)
    if options.lengths:
        sizes = replace(
            sizes,
            lengths=options.lengths,
            callers_lengths=options.lengths,
            overload_lengths=options.lengths,
        )
    with _models(options.repository) as repository, native.loads() as loads:
        made: dict[str, Callable[[], Section]] = {
            "one-caller": lambda: one_caller(repository, loads, sizes),
            "callers": lambda: callers(repository, loads, sizes),
            "cores": lambda: cores(repository, loads, sizes),
            "overload": lambda: overload(
                repository, loads, sizes, options.deadline, options.together
            ),
            "sdk": lambda: sdk(repository, sizes),
            "shared": lambda: shared(repository, sizes),
            "connections": lambda: connections(repository, sizes),
        }
        done, failed = serving_sections.measured(options.sections, made)
    return serving_sections.write("dataplane", options, done, failed, load_average=os.getloadavg())


def _parser() -> Parser:
    names = ["one-caller", "callers", "cores", "overload", "sdk", "shared", "connections"]
    parser = serving_sections.arguments(__doc__ or "", names)
    add = parser.add_argument
    add("--quick", action="store_true", help="short rounds, and 5 s of each overload")
    seconds = values.some_seconds
    add("--seconds", type=seconds, help="of each overload (default 60; with --quick 5)")
    lengths = values.listed(values.integer(1, 1 << 20))
    add("--lengths", type=lengths, help="only these sequence lengths, separated by commas")
    add("--deadline", type=seconds, default=0.5, help="of calls in overload, seconds (default 0.5)")
    add("--together", action="store_true", help="overload: server and client on the same cores")
    return parser


if __name__ == "__main__":
    sys.exit(main())
