"""What it costs to be watched: identity, traces and metrics together, against none of them.

    python benchmarks/faults/overhead.py --json reports/overhead.json

Two servers, Attend at S=32 by h2load, in short rounds that take turns. One asks nobody, records
nothing and is not scraped; of the other callers show a token, 1 % of the calls are traced to a real
collector (a process of its own), and /metrics is scraped, as Prometheus does, every second of its
rounds. `--only` leaves but one of the three. Ends with 1 if more than 5 % of the calls a second are
lost, in the median of the rounds. What else runs on the machine moves single rounds by more than
that; the processor time that each server took for a call says the same with less noise.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import identity
import psutil
from attnserve_proto.commands import Parser, values

BAR = 0.05
PARTS = ("identity", "traces", "metrics")
COLLECTOR = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

class Collector(pb_grpc.TraceServiceServicer):
    spans = 0
    def Export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                Collector.spans += len(scope.spans)
        return pb.ExportTraceServiceResponse()

server = grpc.server(ThreadPoolExecutor(1))
pb_grpc.add_TraceServiceServicer_to_server(Collector(), server)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
sys.stdin.read()
print(Collector.spans, flush=True)
"""


class Scrapes:
    """Asks for /metrics, as Prometheus does, every second of those in which it is wanted."""

    def __init__(self, port: int) -> None:
        self._port, self._over = port, threading.Event()
        self.wanted = False
        self._thread = threading.Thread(target=self._run)
        self.seconds: list[float] = []

    def __enter__(self) -> "Scrapes":
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        accept = {"Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3"}
        asked = urllib.request.Request(f"http://127.0.0.1:{self._port}/metrics", headers=accept)
        waited = 0
        while not self._over.wait(0.1):
            waited += self.wanted
            if waited < 10:
                continue
            waited = 0
            began = time.monotonic()
            with urllib.request.urlopen(asked, timeout=10) as page:
                page.read()
            self.seconds.append(time.monotonic() - began)


@contextmanager
def token_options() -> Iterator[tuple[str, list[str]]]:
    """A token, and the options of a server that wants it."""
    with tempfile.TemporaryDirectory() as folder:
        book = str(Path(folder) / "callers")
        command = [sys.executable, "-m", "attnserve_server.cli", "make-token", "bench"]
        made = subprocess.run(
            [*command, "--callers", book], check=True, capture_output=True, text=True
        )
        yield made.stdout.strip(), ["--callers", book]


@contextmanager
def collector(figures: dict[str, Any]) -> Iterator[list[str]]:
    """A collector; the options of a server that traces to it. Notes how many spans came."""
    with subprocess.Popen(
        [sys.executable, "-c", COLLECTOR],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        port = running.stdout.readline().strip()
        try:
            yield [
                *("--trace-endpoint", f"127.0.0.1:{port}", "--trace-sample", "0.01"),
                *("--max-traces-per-second", "1000"),
            ]
        finally:
            figures["spans"] = int(running.communicate("")[0])


@dataclass
class Server:
    """One that is measured.

    Attributes:
        token: to show.
        scrapes: of its metrics, if there are any.
        rates: calls answered a second, of each round.
    """

    address: str
    token: str
    scrapes: Scrapes | None
    rates: list[float] = field(default_factory=list)

    def round(self, body: Path, calls: int) -> None:
        """Measure one."""
        if self.scrapes is not None:
            self.scrapes.wanted = True
        self.rates.append(identity.rate(self.address, body, self.token, calls))
        if self.scrapes is not None:
            self.scrapes.wanted = False

    def processor(self) -> float:
        """Seconds of the processor that it has taken so far."""
        port = int(self.address.rpartition(":")[2])
        (pid,) = {
            each.pid
            for each in psutil.net_connections("tcp")
            if each.laddr.port == port and each.status == psutil.CONN_LISTEN
        }
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def watched(repository: Path, parts: frozenset[str], figures: dict[str, Any]) -> Iterator[Server]:
    """A server that is watched so."""
    with ExitStack() as stack:
        # Those that nobody asks show one too: the headers are alike.
        token, options, port = "none", list[str](), common.free_port()
        if "identity" in parts:
            token, options = stack.enter_context(token_options())
        if "traces" in parts:
            options = options + stack.enter_context(collector(figures))
        if "metrics" in parts:
            options = [*options, "--metrics-port", str(port)]
        address = stack.enter_context(common.attnserve(repository, *options))
        scrapes = stack.enter_context(Scrapes(port)) if "metrics" in parts else None
        yield Server(address, token, scrapes)
    if scrapes is not None:
        figures["scrapes"] = len(scrapes.seconds)
        figures["scrape_ms"] = 1e3 * statistics.median(scrapes.seconds)


def measure(
    repository: Path, body: Path, parts: frozenset[str], rounds: int, calls: int
) -> dict[str, Any]:
    """Calls a second without and with them, medians of rounds in turns; the part that is lost."""
    figures: dict[str, Any] = {"parts": "+".join(sorted(parts)), "rounds": rounds, "calls": calls}
    with (
        watched(repository, frozenset(), {}) as plain,
        watched(repository, parts, figures) as other,
    ):
        for server in (plain, other):  # warms up
            identity.rate(server.address, body, server.token, calls)
        before = plain.processor(), other.processor()
        for number in range(rounds):
            for server in (plain, other) if number % 2 else (other, plain):
                server.round(body, calls)
        # All of it: what is traced is sent in the rounds of the other one, too.
        plain_seconds, other_seconds = plain.processor() - before[0], other.processor() - before[1]
    ratios = [rate / nothing for nothing, rate in zip(plain.rates, other.rates, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return figures | {
        "plain_per_second": statistics.median(plain.rates),
        "watched_per_second": statistics.median(other.rates),
        "plain_us": 1e6 * plain_seconds / rounds / calls,
        "watched_us": 1e6 * other_seconds / rounds / calls,
        "lost": 1 - middle,
        "lost_least": 1 - high,
        "lost_most": 1 - low,
        "load_average": os.getloadavg()[0],
    }


def main() -> int:
    """Measure, print, and write the figures; the exit code."""
    parsed = _parser().parse_args()
    parts = frozenset(PARTS if parsed.only is None else [parsed.only])
    with common.causal_core(identity.HEADS, identity.DIM) as repository:
        body = repository / "body"
        body.write_bytes(identity.framed(identity.request().SerializeToString()))
        figures = measure(repository, body, parts, parsed.rounds, parsed.calls)
    print(common.table([figures]))
    print(
        "lost_least, lost_most: quartiles of the rounds; us: of the servers' processor time a call"
    )
    common.write_json(parsed.json, {"overhead": figures})
    return int(figures["lost"] > BAR)


def _parser() -> Parser:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=values.integer(2), default=31)
    parser.add_argument("--calls", type=values.integer(100), default=8_000)
    parser.add_argument("--only", choices=PARTS, help="one of the three, to see what it costs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
