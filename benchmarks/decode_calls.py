"""What the benchmark of KV sessions shares: sessions, messages, the kernel in process."""

import io
import json
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common
import dataplane_native as native
import numpy as np
from attnserve_client import AttentionClient, Session
from attnserve_export.sessions import open_session
from attnserve_server.settings import usable_cores
from decode_messages import EMBED_DIM, HEAD_DIM, LAYER, MODEL, NUM_HEADS, Group, encoded, tensors
from numpy.typing import NDArray
from serving_servers import Server

PAGE_TOKENS = 16
TOKEN_BYTES = 2 * NUM_HEADS * HEAD_DIM * 4  # key and value in one layer, fp32

Array = NDArray[Any]

_CHUNK = 1024  # tokens of a step that fills sessions


def fill(session: Session, tokens: int) -> None:
    """Bring a session's layers to that many tokens."""
    while session.length < tokens:
        given = tensors(session.model, min(_CHUNK, tokens - session.length))
        for layer in range(session.num_layers):
            session.attend(layer, **given, return_output=False, return_log_sum_exp=True)


def copies(client: AttentionClient, count: int, tokens: int, model: str = MODEL) -> list[Session]:
    """Sessions of one layer, each of that many tokens in pages of its own, with room for more."""
    first = client.session(model, num_layers=1, max_tokens=tokens + 4 * PAGE_TOKENS)
    fill(first, tokens)
    saved = io.BytesIO()
    client.save(first, saved)
    sessions = [first]
    for _ in range(count - 1):
        saved.seek(0)
        sessions.append(client.load(saved))
    return sessions


def close(sessions: Sequence[Session]) -> None:
    """Close all."""
    for session in sessions:
        session.close()


class Paged:
    """A model's graph `paged` in this process: a token more for sequences of given lengths.

    Args:
        repository: where the model is.
        lengths: keys of each sequence, the new one included. Pages lie in random order.
        model: its name.
    """

    def __init__(self, repository: Path, lengths: Sequence[int], model: str = MODEL) -> None:
        path = common.graph_file(repository / model / "1", "paged")
        self._session = open_session(path, threads=usable_cores())
        pages = [-(-length // PAGE_TOKENS) for length in lengths]
        page_bytes = PAGE_TOKENS * TOKEN_BYTES
        cache = np.empty(sum(pages) * page_bytes + 64, np.uint8)
        at = -cache.ctypes.data % 64
        cache = cache[at : at + sum(pages) * page_bytes]
        numbers = np.random.default_rng(0).standard_normal(page_bytes // 4, np.float32)
        cache.reshape(-1, page_bytes)[:] = numbers.view(np.uint8)
        order = np.random.default_rng(1).permutation(sum(pages)).astype(np.int64)
        feeds = {
            **tensors(model, len(lengths)),
            "positions": np.array(lengths) - 1,
            "cache": cache,
            "starts": np.arange(len(lengths) + 1),
            "lengths": np.array(lengths),
            "table_starts": np.cumsum([0, *pages]),
            "table": order * page_bytes,
            "spec": np.array([PAGE_TOKENS, 0, -1, 0, 1, 0, 0]),
            "parents": np.empty(0, np.int64),
            "weights_of": np.empty(0, np.int64),
            "sinks": np.full(NUM_HEADS, -np.inf, np.float32),
        }
        taken = {port.name for port in self._session.get_inputs()}
        feeds = {name: array for name, array in feeds.items() if name in taken}
        row = (EMBED_DIM,) if model == LAYER else (NUM_HEADS, HEAD_DIM)
        outputs = {"output": np.empty((len(lengths), *row), np.float32)}
        self._binding = self._session.io_binding()
        for name, array in feeds.items():
            kind, place = array.dtype, array.ctypes.data
            self._binding.bind_input(name, "cpu", 0, kind, list(array.shape), place)
        for name, array in outputs.items():
            kind, place = array.dtype, array.ctypes.data
            self._binding.bind_output(name, "cpu", 0, kind, list(array.shape), place)
        self._held = (feeds, outputs)  # which the binding points to

    def __call__(self) -> None:
        """Run it once."""
        self._session.run_with_iobinding(self._binding)


def by_native(server: Server, groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """Rounds of these groups by the client in C++: milliseconds and bytes of the timed ones."""
    with tempfile.NamedTemporaryFile() as file:
        for group in groups:
            file.write(struct.pack("<II", group.timed, len(group.requests)))
            for request in group.requests:
                message = encoded(request)
                file.write(struct.pack("<I", len(message)) + message)
        file.flush()
        command = [str(native.program("decode")), server.address, file.name, str(seconds)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def p50_ms(call: Callable[[], object], seconds: float, undo: Callable[[], object]) -> float:
    """Median of calls, each followed by `undo`, which does not count."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end or len(times) < 3:
        call()
        times.append(time.perf_counter() - started)
        undo()
    return median(times[len(times) // 10 :]) * 1e3


@dataclass(frozen=True)
class Metrics:
    """The server's Prometheus page."""

    port: int

    def value(self, name: str) -> float:
        """A figure without labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as page:
            lines = page.read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


@contextmanager
def models(exported: Path | None, *, layer: bool) -> Iterator[Path]:
    """A repository with `causal`, whose queries are the last of the keys.

    Args:
        exported: a repository that has all already; None exports what is needed.
        layer: whether `layer` is needed too.
    """
    if exported is not None:
        yield exported
        return
    with tempfile.TemporaryDirectory() as folder:
        heads = ["--num-heads", str(NUM_HEADS), "--head-dim", str(HEAD_DIM), "--mask", "causal"]
        _export(folder, "core", "--name", MODEL, *heads, "--alignment", "bottom-right")
        if layer:
            inside = ["--embed-dim", str(EMBED_DIM), "--module", "attnserve", "--rotary", "half"]
            _export(folder, "layer", "--name", LAYER, *heads, *inside)
        yield Path(folder)


def _export(folder: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "attnserve_export.cli", *arguments, "--out", folder]
    subprocess.run(command, check=True, capture_output=True)
