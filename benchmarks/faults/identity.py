"""What identity costs, and what a flood of callers without one costs those who have it.

    python benchmarks/faults/identity.py --json reports/identity.json

`cost`: Attend at S=32 by h2load, on a server that asks nobody and on one that wants a token, in
turns. `flood`: a caller with a token sends requests at a steady rate, while h2load sends calls with
bodies of 1 MB and a wrong token, 10,000 a second; and how many of their bytes the server has read
(`ss`).
"""

import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_proto.commands import Parser, values

HEADS, DIM, LENGTH = 8, 64, 32
ATTEND = "/attnserve.v1.AttentionService/Attend"


def request() -> pb.AttendRequest:
    """One of 196 KB."""
    shape = [1, HEADS, LENGTH, DIM]
    elements = np.random.default_rng(0).standard_normal(shape, np.float32).tobytes()
    tensor = pb.Tensor(dtype=pb.FP32, shape=shape, data=elements)
    return pb.AttendRequest(model="causal", query=tensor, key=tensor, value=tensor)


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it."""
    return b"\0" + len(message).to_bytes(4, "big") + message


@contextmanager
def guarded(repository: Path) -> Iterator[tuple[str, str]]:
    """A server that wants a token: its address, and a token."""
    with tempfile.TemporaryDirectory() as folder:
        book = Path(folder) / "callers"
        command = [sys.executable, "-m", "attnserve_server.cli", "make-token", "bench"]
        made = subprocess.run(
            [*command, "--callers", book], check=True, capture_output=True, text=True
        )
        with common.attnserve(repository, "--callers", str(book)) as address:
            yield address, made.stdout.strip()


def h2load(address: str, body: Path, token: str, *options: str) -> list[str]:
    """The command that sends calls to Attend."""
    headers = ["content-type: application/grpc", "te: trailers", f"authorization: Bearer {token}"]
    words = [word for header in headers for word in ("-H", header)]
    return ["h2load", "-t", "1", "-d", str(body), *words, *options, f"http://{address}{ATTEND}"]


def rate(address: str, body: Path, token: str, calls: int) -> float:
    """Calls answered a second."""
    command = h2load(address, body, token, "-n", str(calls), "-c", "4", "-m", "4")
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    done = re.search(r"(\d+) succeeded", said)
    found = re.search(r"finished in [^,]*, ([\d.]+) req/s", said)
    assert done, said
    assert found, said
    assert int(done[1]) == calls, said
    return float(found[1])


def cost(repository: Path, body: Path, rounds: int, calls: int) -> dict[str, float]:
    """Calls a second without and with a token, medians of rounds in turns."""
    rates: dict[str, list[float]] = {"open": [], "token": []}
    with common.attnserve(repository) as open_address, guarded(repository) as (address, token):
        for number in range(rounds + 1):
            order = [("open", open_address), ("token", address)]
            for name, where in order if number % 2 else order[::-1]:
                measured = rate(where, body, token, calls)
                if number:  # the first one warms up
                    rates[name].append(measured)
    ratios = [known / nobody for nobody, known in zip(*rates.values(), strict=True)]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "open_per_second": medians["open"],
        "token_per_second": medians["token"],
        "lost": 1 - statistics.median(ratios),
    }


def latencies(address: str, token: str, seconds: float, per_second: float) -> list[float]:
    """Of calls that were due at a steady rate, from when they were due."""
    found = []
    message = request()
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        metadata = (("authorization", f"Bearer {token}"),)
        stub.Attend(message, metadata=metadata)
        start = time.monotonic()
        for number in range(int(seconds * per_second)):
            due = start + number / per_second
            time.sleep(max(0.0, due - time.monotonic()))
            stub.Attend(message, metadata=metadata, timeout=30)
            found.append(time.monotonic() - due)
    return found


class BytesRead:
    """Counts what a port has received by TCP, of connections seen by `ss` while it runs."""

    def __init__(self, port: str) -> None:
        self._port, self._seen, self._over = port, dict[str, int](), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "BytesRead":
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def total(self) -> int:
        """Bytes, so far."""
        return sum(self._seen.values())

    def _watch(self) -> None:
        command = ["ss", "-tinHO", "state", "established", f"( sport = :{self._port} )"]
        while not self._over.wait(0.1):
            for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
                read = re.search(r"bytes_received:(\d+)", line)
                if read:
                    self._seen[line.split()[3]] = int(read[1])


def flood(repository: Path, seconds: float) -> dict[str, float]:
    """A caller's latency alone and beside a flood, in milliseconds."""
    with tempfile.TemporaryDirectory() as folder, guarded(repository) as (address, token):
        body = Path(folder) / "body"
        body.write_bytes(framed(bytes(1_000_000)))
        alone = latencies(address, token, seconds, 50)
        command = h2load(
            address,
            body,
            "wrong",
            "-c",
            "10",
            "-m",
            "10",
            "-D",
            str(int(seconds) + 2),
            "--rps=1000",
        )
        with (
            BytesRead(address.rpartition(":")[2]) as read,
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flooding,
        ):
            time.sleep(1)
            beside = latencies(address, token, seconds, 50)
            said = flooding.communicate()[0]
            total = read.total() - sum(
                map(len, [framed(request().SerializeToString())] * len(beside))
            )
    refused = re.search(r"requests: \d+ total, \d+ started, (\d+) done", said)
    per_second = re.search(r"finished in [^,]*, ([\d.]+) req/s", said)
    assert refused, said
    assert per_second, said
    return {
        "refused_per_second": float(per_second[1]),
        "p99_alone_ms": 1e3 * common.percentile(alone, 0.99),
        "p99_beside_ms": 1e3 * common.percentile(beside, 0.99),
        "p99_ratio": common.percentile(beside, 0.99) / common.percentile(alone, 0.99),
        "p50_ratio": statistics.median(beside) / statistics.median(alone),
        "body_bytes_read": max(0, total) / (int(refused[1]) * 1_000_000),
    }


def main() -> None:
    """Measure, print, and write the figures."""
    parsed = _parser().parse_args()
    with common.causal_core(HEADS, DIM) as repository, tempfile.TemporaryDirectory() as folder:
        body = Path(folder) / "body"
        body.write_bytes(framed(request().SerializeToString()))
        figures = {
            "cost": cost(repository, body, parsed.rounds, parsed.calls),
            "flood": flood(repository, parsed.seconds),
        }
    for name, row in figures.items():
        print(name)
        print(common.table([row]))
    common.write_json(parsed.json, figures)


def _parser() -> Parser:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=values.integer(1), default=7)
    parser.add_argument("--calls", type=values.integer(1), default=10_000)
    parser.add_argument("--seconds", type=values.number(1, 1e5), default=10)
    return parser


if __name__ == "__main__":
    main()
