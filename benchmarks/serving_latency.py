"""One caller at a time: what the service adds to the kernel and to the transport.

Contenders take turns within each round, in an order drawn anew: each one finds the caches and the
threads as its predecessor left them, so none may always follow the same. Ratios and differences are
taken within rounds, and their medians count. Computation threads do not spin, neither in the server
(its default) nor in process: spinning threads of one contender would slow whichever runs next to
it.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import onnxruntime
from attnserve_client import AttentionClient
from attnserve_export.sessions import open_session
from attnserve_server.settings import usable_cores
from echo_server import EchoClient, request
from numpy.typing import NDArray
from serving_calls import Array, tensors
from serving_report import Bar, Row, Section
from serving_servers import attnserve, echo

FLOOR_BAR = 1.1
SHARED_SHORT_BAR_MS, SHARED_LONG_BAR = 0.6, 1.02
STORED_BAR = 10.0
STORED_QUERIES, STORED_KEYS = 64, 4096

Seconds = NDArray[np.float64]

_ALWAYS, _NEVER = 0, 1 << 62
_WARM_UP = 5


@dataclass(frozen=True)
class Lengths:
    """Sequence lengths, and how many rounds at each."""

    seq_lens: Sequence[int]
    rounds: int

    def each(self) -> Sequence[tuple[int, int]]:
        """(length, rounds): fewer where one takes longer."""
        least = min(30, self.rounds)
        return [(s, max(least, self.rounds // max(1, s // 128))) for s in self.seq_lens]


class InProcess:
    """The graph that the server picks, in a session of this process.

    Args:
        repository: where the graph is.
        client: of the server, which says which variant it picked.
        model: its name.
    """

    def __init__(self, repository: Path, client: AttentionClient, model: str = "causal") -> None:
        self._folder = repository / model / "1"
        self._client = client
        self._model = model
        self._session = functools.cache(self._open)

    def call(self, q: Array, k: Array, v: Array) -> Callable[[], object]:
        """A call of it; what is not given is given neutrally, as the server does."""
        session = self._session(self._client.attend(q, k, v, model=self._model).variant)
        known = {
            "query": q,
            "key": k,
            "value": v,
            "key_lengths": np.array([k.shape[2]]),
            "bias": np.zeros((1, 1, 1, 1), np.float32),
            "mask": np.ones((1, 1, 1, 1), bool),
            "prefix_lengths": np.zeros(1, np.int64),
            "softcap": np.array([-1], np.float32),
            "sinks": np.full(q.shape[1], -np.inf, np.float32),
        }
        feeds = {entry.name: known[entry.name] for entry in session.get_inputs()}
        return lambda: session.run(["output"], feeds)

    def _open(self, variant: str) -> onnxruntime.InferenceSession:
        return open_session(common.graph_file(self._folder, variant), threads=usable_cores())


def over_floor(times: Mapping[str, Seconds]) -> Row:
    """Unary and streamed calls against the best echo and in process, of seconds of each round."""
    echoes = [times["echo_unary"], times["echo_stream"]]
    least = min(echoes, key=lambda seconds: float(np.median(seconds))) + times["in_process"]
    return {
        "floor_ms": float(np.median(least)) * 1e3,
        "unary_ratio": float(np.median(times["unary"] / least)),
        "streamed_ratio": float(np.median(times["streamed"] / least)),
        "unary_p99_ms": float(np.quantile(times["unary"], 0.99)) * 1e3,
        "streamed_p99_ms": float(np.quantile(times["streamed"], 0.99)) * 1e3,
    }


def floor(repository: Path, lengths: Lengths) -> Section:
    """End to end, unary and streamed, against the echo of the same bytes plus in process."""
    with (
        attnserve(repository) as server,
        echo() as echo_server,
        AttentionClient(server.address, stream_threshold_bytes=_NEVER) as unary,
        AttentionClient(server.address, stream_threshold_bytes=_ALWAYS) as streamed,
    ):
        session, bare = InProcess(repository, unary), EchoClient(echo_server.address)

        def measure(seq_len: int, rounds: int) -> Row:
            q, k, v = tensors(seq_len)
            message = request(3 * q.nbytes, q.nbytes)
            times = in_turns(
                {
                    "unary": lambda: unary.attend(q, k, v, model="causal"),
                    "streamed": lambda: streamed.attend(q, k, v, model="causal"),
                    "in_process": session.call(q, k, v),
                    "echo_unary": lambda: bare.unary(message),
                    "echo_stream": lambda: bare.stream(message),
                    # For comparison only: bytes that are new each time, as real tensors' are.
                    "echo_new_bytes": lambda: bare.unary(
                        b"".join((message[:16], q.data, k.data, v.data))
                    ),
                },
                rounds,
            )
            return {
                "seq_len": seq_len,
                "rounds": rounds,
                "request_bytes": 3 * q.nbytes,
                **_medians(times),
                **over_floor(times),
            }

        rows = [measure(seq_len, rounds) for seq_len, rounds in lengths.each()]
    bars = [
        Bar(
            f"{name}, S={row['seq_len']}: end to end / (best echo + in process)",
            row[f"{name}_ratio"],
            FLOOR_BAR,
        )
        for row in rows
        for name in ("unary", "streamed")
    ]
    return Section("floor", rows, bars)


_SHARED = "shared: the tensors lie in the shared memory already; copied: the SDK copies them there."


def shared_memory(repository: Path, lengths: Lengths) -> Section:
    """Through shared memory against in process; the shortest and the longest have bars."""
    with (
        attnserve(repository) as server,
        AttentionClient(server.address, shared_memory=True) as client,
    ):
        session = InProcess(repository, client)

        def measure(seq_len: int, rounds: int) -> Row:
            q, k, v = tensors(seq_len)
            there = [client.shared(array) for array in (q, k, v)]
            times = in_turns(
                {
                    "shared": lambda: client.attend(*there, model="causal"),
                    "copied": lambda: client.attend(q, k, v, model="causal"),
                    "in_process": session.call(q, k, v),
                },
                rounds,
            )
            row = {"seq_len": seq_len, "rounds": rounds, **_medians(times)}
            for name in ("shared", "copied"):
                over, ratio = times[name] - times["in_process"], times[name] / times["in_process"]
                row |= {f"{name}_over_ms": float(np.median(over)) * 1e3}
                row |= {f"{name}_ratio": float(np.median(ratio))}
            return row

        rows = [measure(seq_len, rounds) for seq_len, rounds in lengths.each()]
    short, long = rows[0], rows[-1]
    bars = []
    for name in ("shared", "copied"):
        over, ratio = short[f"{name}_over_ms"], long[f"{name}_ratio"]
        bars += [
            Bar(f"{name}, S={short['seq_len']}: ms over in process", over, SHARED_SHORT_BAR_MS),
            Bar(f"{name}, S={long['seq_len']}: / in process", ratio, SHARED_LONG_BAR),
        ]
    return Section("shared-memory", rows, bars, [_SHARED])


def stored(repository: Path, query_len: int, key_len: int, rounds: int) -> Section:
    """New queries against keys and values that the server keeps, against sending it all."""
    q, k, v = tensors(key_len, query_len)
    with attnserve(repository) as server, AttentionClient(server.address) as client:
        stored_key, stored_value = client.put_tensor(k), client.put_tensor(v)
        times = in_turns(
            {
                "stored": lambda: client.attend(q, stored_key, stored_value, model="causal"),
                "sent": lambda: client.attend(q, k, v, model="causal"),
                "in_process": InProcess(repository, client).call(q, k, v),
            },
            rounds,
        )
    ratio = float(np.median(times["sent"] / times["stored"]))
    row = {"query_len": query_len, "key_len": key_len, "rounds": rounds, **_medians(times)}
    text = f"{query_len} queries, {key_len} keys: sending it all / stored"
    return Section(
        "stored", [row | {"ratio": ratio}], [Bar(text, ratio, STORED_BAR, at_least=True)]
    )


def in_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, Seconds]:
    """Seconds of each contender in each round."""
    names = list(contenders)
    times = {name: np.empty(rounds) for name in names}
    order = np.random.default_rng()
    for number in range(-_WARM_UP, rounds):
        for name in order.permutation(names):
            started = time.perf_counter()
            contenders[name]()
            if number >= 0:
                times[name][number] = time.perf_counter() - started
    return times


def _medians(times: dict[str, Seconds]) -> Row:
    return {f"{name}_ms": float(np.median(values)) * 1e3 for name, values in times.items()}
