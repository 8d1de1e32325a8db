"""Requests per second of one server process, and of two that share a port.

Several client processes, each with a connection of its own, call `Attend` one request after the
other for a while. The contenders, in turn, several times; connections are made anew each time, as
the kernel's choice of a worker per connection is part of what is measured:

- one: a single process, the default;
- shared: `--workers 2`, one port, connections spread by the kernel (SO_REUSEPORT);
- apart: two single processes on ports of their own, connections dealt out evenly by hand, each
  with the threads of a worker. What `shared` could be at best, were its connections always even.

The cores serve clients and servers alike, so the figures are those of one host doing both.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
from multiprocessing.pool import Pool
from multiprocessing.synchronize import Barrier
from typing import Any

import common
import numpy as np
from attnserve_client import AttentionClient
from attnserve_server.settings import usable_cores

NUM_HEADS, HEAD_DIM = 8, 64

_barrier: Barrier


def call(address: str, seq_len: int, seconds: float) -> list[float]:
    """In a client process: the milliseconds of each request, for so many seconds."""
    generator = np.random.default_rng(0)
    shape = (1, NUM_HEADS, seq_len, HEAD_DIM)
    q, k, v = (generator.standard_normal(shape).astype(np.float32) for _ in range(3))
    times = []
    with AttentionClient(address) as client:
        for _ in range(3):
            client.attend(q, k, v, model="causal")
        _barrier.wait()
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            client.attend(q, k, v, model="causal")
            times.append((time.perf_counter() - started) * 1e3)
    return times


def measure(
    clients: Pool, contenders: dict[str, list[str]], seq_len: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All contenders at one length, in turn: medians over the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, addresses in contenders.items():
            # The barrier holds each process to one of these calls.
            tasks = [
                (addresses[number % len(addresses)], seq_len, options.seconds)
                for number in range(options.clients)
            ]
            results = clients.starmap(call, tasks, chunksize=1)
            rates[name].append(sum(map(len, results)) / options.seconds)
            times[name] += [milliseconds for result in results for milliseconds in result]
    return [
        {
            "seq_len": seq_len,
            "servers": name,
            "requests_per_s": statistics.median(rates[name]),
            "lowest": min(rates[name]),
            "highest": max(rates[name]),
            "over_one": statistics.median(rates[name]) / statistics.median(rates["one"]),
            "p50_ms": statistics.median(times[name]),
            "p99_ms": common.percentile(times[name], 0.99),
        }
        for name in contenders
    ]


def main() -> int:
    """Run the benchmark."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--seq-lens", default="32,256")
    parser.add_argument("--clients", type=int, default=4, help="processes")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    half = ("--intra-op-threads", str(max(1, usable_cores() // 2)))
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with contextlib.ExitStack() as stack:
        repository = stack.enter_context(common.causal_core(NUM_HEADS, HEAD_DIM))

        def server(*arguments: str) -> str:
            return stack.enter_context(common.attnserve(repository, *arguments))

        contenders = {
            "one": [server()],
            "shared": [server("--workers", "2")],
            "apart": [server(*half), server(*half)],
        }
        clients = stack.enter_context(
            spawn.Pool(options.clients, _client, (spawn.Barrier(options.clients, timeout=60),))
        )
        for seq_len in (int(text) for text in options.seq_lens.split(",")):
            print(f"seq_len {seq_len}: {options.rounds} rounds", file=sys.stderr, flush=True)
            rows += measure(clients, contenders, seq_len, options)
    print(common.table(rows))
    figures = {"benchmark": "workers", "clients": options.clients, "rows": rows}
    common.write_json(options.json, figures)
    return 0


def _client(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


if __name__ == "__main__":
    sys.exit(main())
