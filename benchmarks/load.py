"""The load generator and the simulated cluster against what the project holds them to.

    arrivals    2,000 requests/s at constant and random times: how late they were sent, and what
                the clients took of the machine
    pause       a server that stands still for 1 s, in an open and in a closed loop
    simulation  a trace of 10 minutes and 10,000 sessions at clusters of up to 100 servers: how
                long that takes

The server is attnserve's, on the CPU, causal attention of 4 heads of 8, FP32; requests have 8
positions, so that the machine is left to the clients as far as it can be. Both share it: the load
average is said. Each is repeated, and the median counts.

    python benchmarks/load.py --json reports/load-bars.json
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import serving_sections
from attnserve_client import AttentionClient
from attnserve_loadtest.load.arrivals import CONSTANT, POISSON, Arrivals
from attnserve_loadtest.load.callers import Servers
from attnserve_loadtest.load.generator import Clients, clients
from attnserve_loadtest.load.measured import ANSWERED
from attnserve_loadtest.load.plan import Arrival, Load
from attnserve_loadtest.load.requests import Generation, Mix
from attnserve_loadtest.load.simulation import Cluster, simulate
from attnserve_loadtest.load.slo import Bound, good
from attnserve_loadtest.report.load_schema import Service, ServiceTime
from attnserve_proto.commands import Parser, values
from serving_report import Bar, Row, Section
from serving_servers import Server, attnserve

RATE, LATE_BAR_MS, CORES_BAR = 2000.0, 1.0, 1.0
PAUSE_SECONDS, PAUSE_AT = 1.0, 2.0
SESSIONS, TRACE_SECONDS, MOST_SERVERS, SIMULATION_BAR_SECONDS = 10_000, 600.0, 100, 300.0

EXPORT = ["core", "--name", "causal", "--mask", "causal", "--num-heads", "4", "--head-dim", "8"]
MIX = Mix((8,), (1.0,))


def arrivals(server: Server, load: Clients, seconds: float, rounds: int) -> Section:
    """How late requests are sent at 2,000/s."""
    target = _target(server)
    rows: list[Row] = []
    bars = []
    for kind in (CONSTANT, POISSON):
        runs = [_arrivals(target, load, kind, seconds) for _ in range(rounds)]
        rows += runs
        late = statistics.median(float(run["late_p99_ms"]) for run in runs)
        cores = statistics.median(float(run["client_cores"]) for run in runs)
        bars.append(Bar(f"{kind}: late p99, ms", late, LATE_BAR_MS))
        bars.append(Bar(f"{kind}: client's cores", cores, CORES_BAR))
    return Section("arrivals", rows, bars, [_load_average()])


def pause(server: Server, load: Clients, rounds: int) -> Section:
    """A server that stands still for 1 s of 5: its 20% of an open loop's requests wait."""
    target = _target(server)
    rows: list[Row] = []
    for number in range(rounds):
        for name, each in (
            ("open, 500/s", Load(target, 5.0, rate=500.0, arrivals=CONSTANT, mix=MIX)),
            ("closed, 2 callers", Load(target, 5.0, callers=2, mix=MIX)),
        ):
            stopper = threading.Thread(target=_stop, args=(server, each.warm_up))
            stopper.start()
            run = load.run(each, server)
            stopper.join()
            rows.append(
                {
                    "round": number,
                    "load": name,
                    "answered": run.count(ANSWERED),
                    "p50_ms": run.latency_ms(0.5),
                    "p99_ms": run.latency_ms(0.99),
                    "max_ms": run.latency_ms(1.0),
                }
            )
    opened = [float(row["p99_ms"]) for row in rows if str(row["load"]).startswith("open")]
    # 500 of 2,500 wait, evenly up to 1 s: 1% of all took 0.95 s or more.
    bar = Bar("open loop: p99, ms", statistics.median(opened), 950.0, at_least=True)
    return Section("pause", rows, [bar], [_load_average()])


def simulation(share: float = 1.0) -> Section:
    """10 minutes and 10,000 sessions, lengths as of a chat, at eight sizes up to 100 servers.

    Args:
        share: of the trace and of its sessions.
    """
    random = np.random.default_rng(0)
    count, seconds = int(SESSIONS * share), TRACE_SECONDS * share
    due = np.sort(random.random(count)) * seconds
    prompts = np.clip(random.lognormal(6.9, 1.0, count), 16, 8000).astype(int)
    tokens = np.clip(random.lognormal(5.0, 0.8, count), 1, 1500).astype(int)
    trace = [
        Arrival(float(moment), Generation(int(prompt), int(made)))
        for moment, prompt, made in zip(due, prompts, tokens, strict=True)
    ]
    service = Service(
        single=None,
        prompt=ServiceTime(2e-3, 1e-4, 1e-8, 16, 8000, 0.0, ()),
        step=ServiceTime(5e-3, 1e-6, 0.0, 16, 9500, 0.0, ()),
        single_wire_seconds=None,
        prompt_wire_seconds=5e-3,
        step_wire_seconds=2e-3,
    )
    bounds = (Bound("first", 0.95, 1.0), Bound("between", 0.99, 0.1))
    rows: list[Row] = []
    whole = time.perf_counter()
    for servers in (2, 3, 5, 10, 20, 30, 50, MOST_SERVERS):
        start = time.perf_counter()
        found = simulate(trace, Cluster(service, servers))
        within = int(np.sum(good(found.measured, bounds)))
        rows.append(
            {
                "servers": servers,
                "goodput/s": within / seconds,
                "good": within / count,
                "busy": found.busy,
                "seconds": time.perf_counter() - start,
            }
        )
    whole = time.perf_counter() - whole
    note = f"{count} sessions in {seconds:g} s, {int(tokens.sum())} tokens; {_load_average()}"
    return Section(
        "simulation", rows, [Bar("all sizes: seconds", whole, SIMULATION_BAR_SECONDS)], [note]
    )


def _arrivals(target: Servers, load: Clients, kind: Arrivals, seconds: float) -> Row:
    run = load.run(Load(target, seconds, rate=RATE, arrivals=kind, mix=MIX))
    return {
        "arrivals": str(kind),
        "answered": run.count(ANSWERED),
        "due": len(run.due_rows),
        **{f"late_p{share * 100:g}_ms": run.late_ms(share) for share in (0.5, 0.9, 0.99, 0.999)},
        "p50_ms": run.latency_ms(0.5),
        "p99_ms": run.latency_ms(0.99),
        "client_cores": run.client_cpu,
    }


def _target(server: Server) -> Servers:
    with AttentionClient(server.address) as client:
        return Servers((server.address,), client.get_model("causal"))


def _stop(server: Server, warm_up: float) -> None:
    time.sleep(warm_up + PAUSE_AT)
    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(PAUSE_SECONDS)
    os.kill(server.process.pid, signal.SIGCONT)


def _load_average() -> str:
    return f"load average of the machine: {os.getloadavg()[0]:.1f}"


@contextmanager
def _server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "attnserve_export.cli", *EXPORT, "--out", folder]
        subprocess.run(command, check=True, capture_output=True)
        with attnserve(Path(folder)) as server:
            yield server


def main() -> int:
    """Run the benchmark; 1 if a section could not be measured."""
    options = _parser().parse_args()
    seconds, rounds = (2.0, 1) if options.quick else (10.0, 5)
    with _server() as server, clients(options.clients) as load:
        made: dict[str, Callable[[], Section]] = {
            "arrivals": lambda: arrivals(server, load, seconds, rounds),
            "pause": lambda: pause(server, load, rounds),
            "simulation": lambda: simulation(0.02 if options.quick else 1.0),
        }
        done, failed = serving_sections.measured(options.sections, made)
    return serving_sections.write("load", options, done, failed)


def _parser() -> Parser:
    parser = serving_sections.arguments(__doc__ or "", ["arrivals", "pause", "simulation"])
    add = parser.add_argument
    add("--quick", action="store_true", help="in seconds: figures say little")
    add("--clients", type=values.integer(1, 256), default=2, help="client processes (default 2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
