"""What the service adds to the kernel and to the transport.

Per length, interleaved in one run: `Attend` end to end through the SDK, the same ONNX session in
process, and a bare grpcio echo server that moves the same bytes both ways, by unary messages and
by chunks (the better of the two counts; it sends one constant message, never built anew).
The bar: end to end <= 1.25 x (echo + in process).

Computation threads do not spin here, neither in the server (its default) nor in process, since
spinning threads of one contender would slow whichever runs next to it.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
from attnserve_client import AttentionClient
from attnserve_client._channel import STREAM_THRESHOLD_BYTES
from attnserve_server.engine.providers import choose
from attnserve_server.engine.session import GraphSession
from attnserve_server.settings import usable_cores
from echo_server import EchoClient, request

NUM_HEADS, HEAD_DIM = 8, 64
BAR = 1.25


def measure(
    client: AttentionClient, echo: EchoClient, session: GraphSession, seq_len: int, rounds: int
) -> dict[str, Any]:
    """All contenders at one length, in turn, `rounds` times."""
    generator = np.random.default_rng(0)
    shape = (1, NUM_HEADS, seq_len, HEAD_DIM)
    q, k, v = (generator.standard_normal(shape).astype(np.float32) for _ in range(3))
    feeds = {"query": q, "key": k, "value": v, "key_lengths": np.array([seq_len])}
    message = request(3 * q.nbytes, q.nbytes)
    contenders: dict[str, Callable[[], object]] = {
        "attend": lambda: client.attend(q, k, v, model="causal", variant="fused"),
        "in_process": lambda: session.run(feeds, ["output"]),
        "echo_unary": lambda: echo.unary(message),
        "echo_stream": lambda: echo.stream(message),
        # For comparison only: the bytes are new each time, as those of real tensors are.
        "echo_new_bytes": lambda: echo.unary(b"".join((message[:16], q.data, k.data, v.data))),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 5):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            if number >= 5:
                times[name].append((time.perf_counter() - started) * 1e3)
    p50 = {name: statistics.median(values) for name, values in times.items()}
    floor = min(p50["echo_unary"], p50["echo_stream"]) + p50["in_process"]
    return {
        "seq_len": seq_len,
        "request_bytes": 3 * q.nbytes,
        **{f"{name}_ms": value for name, value in p50.items()},
        "floor_ms": floor,
        "ratio": p50["attend"] / floor,
        "attend_p99_ms": common.percentile(times["attend"], 0.99),
    }


def main() -> int:
    """Run the benchmark."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--seq-lens", default="64,512,2048")
    parser.add_argument("--rounds", type=int, default=200, help="at the shortest length")
    parser.add_argument(
        "--stream-threshold-bytes",
        type=int,
        default=STREAM_THRESHOLD_BYTES,
        help="tensors above this go in chunks (default: the SDK's own)",
    )
    options = parser.parse_args()
    echo_command = [sys.executable, str(Path(__file__).with_name("echo_server.py"))]
    rows = []
    with (
        common.causal_core(NUM_HEADS, HEAD_DIM) as repository,
        common.attnserve(repository) as address,
        common.process(echo_command, str.strip) as echo_address,
        AttentionClient(address, stream_threshold_bytes=options.stream_threshold_bytes) as client,
    ):
        session = GraphSession(
            repository / "causal" / "1" / "model.onnx",
            choose("cpu"),
            intra_op_threads=usable_cores(),
            spinning=False,
        )
        echo = EchoClient(echo_address)
        for seq_len in (int(text) for text in options.seq_lens.split(",")):
            rounds = max(30, options.rounds // max(1, seq_len // 128))
            print(f"seq_len {seq_len}: {rounds} rounds", file=sys.stderr, flush=True)
            rows.append(measure(client, echo, session, seq_len, rounds))
    print(common.table(rows))
    print(f"bar: ratio <= {BAR}")
    common.write_json(options.json, {"benchmark": "overhead", "bar": BAR, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
