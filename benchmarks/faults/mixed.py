"""Load of many kinds at once, whose every answer is compared with attention in float64.

Kinds: requests in one message and in chunks, streams with several requests in flight, KV sessions
(prefill, steps, forks, some left to their lease), stored tensors, shared memory, and calls that are
given up: by their deadline, or by a cancellation at any moment.
"""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import grpc
import numpy as np
from attnserve_client import AttentionClient, AttnserveError, NotFoundError
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from numpy.typing import NDArray

HEADS, DIM = 4, 32
LENGTHS = (1, 17, 64, 200)
TOLERANCE = 1e-4
_SETS = 4  # of arrays of each length
_LEASE_SECONDS = 5.0
# A call that hangs is one that is lost.
_SECONDS = 60.0
# One that is given up is refused at once where it would come too late.
_GIVEN_UP = ("CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ANSWERED")

Array = NDArray[Any]


def attention(query: Array, key: Array, value: Array, *, causal: bool) -> Array:
    """Attention in float64; arrays are [1, heads, length, dim]."""
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if causal:
        length = scores.shape[-1]
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ value)


@dataclass(frozen=True)
class Case:
    """What is sent, [1, heads, length, dim] each, and what is to come by the mask."""

    query: Array
    key: Array
    value: Array
    causal: Array
    bidirectional: Array


def make_cases() -> list[Case]:
    """Some of each length."""
    generator = np.random.default_rng(0)
    cases = []
    for length in LENGTHS:
        for _ in range(_SETS):
            shape = (1, HEADS, length, DIM)
            arrays = [generator.standard_normal(shape, np.float32) for _ in range(3)]
            expected = [attention(*arrays, causal=causal) for causal in (True, False)]
            cases.append(Case(*arrays, *expected))
    return cases


@dataclass
class Tally:
    """What has come of all calls.

    Attributes:
        answered: right answers by kind of call.
        refused: other outcomes, by kind and status.
        wrong: what was answered wrongly, or went as it must not.
    """

    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, kind: str, output: Array | None, expected: Array) -> None:
        """Compare an answer."""
        error = np.inf
        if output is not None and output.shape == expected.shape:
            error = float(np.abs(output - expected).max())
        with self._lock:
            self.answered[kind] += 1
            if not error <= TOLERANCE:
                self.wrong.append(f"{kind}: off by {error}")

    def refuse(self, kind: str, code: str, allowed: Sequence[str]) -> None:
        """A call that was not answered, by its status."""
        with self._lock:
            self.refused[f"{kind} {code}"] += 1
            if code not in allowed:
                self.wrong.append(f"{kind}: {code}; allowed: {', '.join(allowed) or 'an answer'}")

    def fault(self, said: str) -> None:
        """Something that must not be."""
        with self._lock:
            self.wrong.append(said)

    def total(self) -> int:
        """Calls that were answered."""
        with self._lock:
            return sum(self.answered.values())


@dataclass(frozen=True)
class Model:
    """A model to call.

    Attributes:
        masks: by version, "causal" or "bidirectional".
        allowed: statuses that its calls may end with instead of an answer.
    """

    name: str
    masks: Mapping[str, str]
    allowed: tuple[str, ...] = ()


@dataclass
class Caller:
    """One that calls, in a thread of its own, until it is told to end."""

    client: AttentionClient
    stub: pb_grpc.AttentionServiceStub
    models: Sequence[Model]
    cases: Sequence[Case]
    tally: Tally
    random: random.Random

    def attend(self, model: Model) -> None:
        """One request."""
        case = self.random.choice(self.cases)
        try:
            result = self.client.attend(
                case.query, case.key, case.value, model=model.name, timeout=_SECONDS
            )
        except AttnserveError as error:
            self.tally.refuse(f"attend {model.name}", error.code.name, model.allowed)
            return
        expected = getattr(case, model.masks[result.version])
        self.tally.answer(f"attend {model.name}", result.output, expected)

    def stream(self, model: Model) -> None:
        """Several in flight; some streams are left before they are answered."""
        leaves = self.random.random() < 0.2
        with self.client.stream(timeout=_SECONDS) as stream:
            sent = []
            for case in self.random.choices(self.cases, k=6):
                try:
                    asked = stream.submit(case.query, case.key, case.value, model=model.name)
                except AttnserveError as error:
                    self.tally.refuse(f"stream {model.name}", error.code.name, model.allowed)
                    break
                sent.append((case, asked))
            for case, asked in sent[:2] if leaves else sent:
                try:
                    result = asked.result(_SECONDS)
                except AttnserveError as error:
                    self.tally.refuse(f"stream {model.name}", error.code.name, model.allowed)
                    continue
                expected = getattr(case, model.masks[result.version])
                self.tally.answer(f"stream {model.name}", result.output, expected)

    def session(self, model: Model) -> None:
        """Prefill, steps and a fork; some sessions are left to their lease."""
        case = self.random.choice(self.cases)
        # [length, heads, dim], as steps have them
        rows = [np.ascontiguousarray(array[0].swapaxes(0, 1))
                for array in (case.query, case.key, case.value)]  # fmt: skip
        length = len(rows[0])
        split = self.random.randint(0, length - 1)
        expected = case.causal[0].swapaxes(0, 1)
        session = self.client.session(
            model.name, num_layers=2, max_tokens=length, lease=_LEASE_SECONDS, timeout=_SECONDS
        )
        parts = [part for part in (slice(0, split), slice(split, length)) if part.stop > part.start]
        used = time.monotonic()
        try:
            for part in parts:
                for layer in range(2):
                    arrays = (array[part] for array in rows)
                    result = session.attend(layer, *arrays, timeout=_SECONDS)
                    used = time.monotonic()
                    self.tally.answer("session", result.output, expected[part])
            if self.random.random() < 0.3:
                session.fork(timeout=_SECONDS).close()
        except NotFoundError as error:
            # A machine that is busy may not let this thread run for as long as that.
            ran_out = time.monotonic() - used >= _LEASE_SECONDS
            allowed = [error.code.name] if ran_out else []
            self.tally.refuse("session, its lease over", error.code.name, allowed)
            return
        if self.random.random() < 0.8:
            session.close()

    def stored(self, model: Model) -> None:
        """Key and value stored, then named."""
        case = self.random.choice(self.cases)
        key, value = (self.client.put_tensor(each, lease=_LEASE_SECONDS, timeout=_SECONDS)
                      for each in (case.key, case.value))  # fmt: skip
        result = self.client.attend(case.query, key, value, model=model.name, timeout=_SECONDS)
        self.tally.answer("stored", result.output, getattr(case, model.masks[result.version]))
        for each in (key, value) if self.random.random() < 0.8 else ():
            self.client.drop_tensor(each, timeout=_SECONDS)

    def give_up(self, model: Model) -> None:
        """A call cancelled at any moment, or whose deadline is short."""
        case = self.random.choice(self.cases)
        query, key, value = (
            pb.Tensor(dtype=pb.FP32, shape=array.shape, data=array.tobytes())
            for array in (case.query, case.key, case.value)
        )
        request = pb.AttendRequest(model=model.name, query=query, key=key, value=value)
        timeout = self.random.choice((0.0005, 0.002, _SECONDS))
        call = self.stub.Attend.future(request, timeout=timeout)
        time.sleep(self.random.random() * 0.003)
        call.cancel()  # type: ignore[no-untyped-call]
        with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
            call.result()
        code = call.code().name
        if code == "OK":
            code = "ANSWERED"
        self.tally.refuse("given up", code, _GIVEN_UP)


Act = Callable[[Caller, Model], None]
STEADY: tuple[Act, ...] = (
    Caller.attend,
    Caller.stream,
    Caller.session,
    Caller.stored,
    Caller.give_up,
)


@contextlib.contextmanager
def load(
    address: str,
    tally: Tally,
    plan: Sequence[tuple[Model, Sequence[Act]]],
    *,
    callers: int,
    seed: int = 0,
) -> Iterator[None]:
    """Callers that call for the length of a `with` block.

    Args:
        address: of the server.
        tally: that they tell.
        plan: models, and what is done with each.
        callers: threads; of three, one sends in messages, one in chunks, one in shared memory.
        seed: of what they choose.
    """
    over = threading.Event()
    cases = make_cases()
    acts = [(model, act) for model, acts in plan for act in acts]

    def call(number: int) -> None:
        chosen = random.Random(f"{seed} {number}")
        options: list[dict[str, Any]] = [
            {},
            {"stream_threshold_bytes": 1},
            {"shared_memory": True, "shared_memory_bytes": 64 << 20},
        ]
        with (
            AttentionClient(address, **options[number % 3]) as client,
            grpc.insecure_channel(address) as channel,
        ):
            stub = pb_grpc.AttentionServiceStub(channel)
            models = [model for model, _ in plan]
            caller = Caller(client, stub, models, cases, tally, chosen)
            while not over.is_set():
                model, act = chosen.choice(acts)
                try:
                    act(caller, model)
                except AttnserveError as error:
                    tally.fault(f"{act.__name__} {model.name}: {error}")
                except Exception as error:
                    tally.fault(f"{act.__name__} {model.name}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(2 * _SECONDS)
            if thread.is_alive():
                tally.fault("a call that never ends")


class Server:
    """A real attnserve-server, which may be ended and started again at the same address.

    Args:
        repository: the folder of models.
        options: of its command line.
        port: where it listens; 0: a free one.
    """

    def __init__(self, repository: Path, *options: str, port: int = 0) -> None:
        port = port or common.free_port()
        self.address = f"127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "attnserve_server.cli", "--provider", "cpu"]
        self._command += ["--repository", str(repository), "--port", str(port)]
        self._command += ["--log-level", "error", *options]
        self.process = self._started()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def end(self, number: int) -> int:
        """Send a signal, and wait: the exit code."""
        self.process.send_signal(number)
        return self.process.wait(_SECONDS)

    def start(self) -> None:
        """Start it again; it is ready."""
        self.process = self._started()

    def _started(self) -> "subprocess.Popen[str]":
        started = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert started.stdout is not None
        if not started.stdout.readline():
            raise RuntimeError(f"{' '.join(self._command)}: ended at once with {started.wait()}")
        return started


def export(repository: Path, name: str, *, mask: str = "causal", version: int = 1) -> None:
    """Write a core model with the heads of the cases."""
    command = [sys.executable, "-m", "attnserve_export.cli", "core", "--out", str(repository)]
    command += ["--name", name, "--mask", mask, "--version", str(version)]
    command += ["--num-heads", str(HEADS), "--head-dim", str(DIM)]
    subprocess.run(command, check=True, capture_output=True)


def copy_as(version: Path, repository: Path, name: str, number: int) -> None:
    """Put a version that was exported into a repository, by another name or number."""
    place = repository / name / str(number)
    shutil.copytree(version, place)
    manifest = json.loads((place / "model.json").read_text())
    (place / "model.json").write_text(json.dumps(manifest | {"name": name, "version": number}))


def outcome(tally: Tally) -> dict[str, Any]:
    """What a tally says, for JSON."""
    return {
        "answered": sum(tally.answered.values()),
        "wrong": len(tally.wrong),
        "by_kind": dict(sorted(tally.answered.items())),
        "not_answered": dict(sorted(tally.refused.items())),
        "first_wrong": tally.wrong[:20],
    }
