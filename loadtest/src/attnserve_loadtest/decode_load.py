"""KV sessions that arrive, prefill, generate, pause and end; what their callers wait for."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from attnserve_client import AttentionClient, AttnserveError
from attnserve_proto.commands import PLAIN, Access
from numpy.typing import NDArray

from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.payloads import DTYPES


@dataclass(frozen=True)
class DecodeSettings:
    """What is offered.

    Attributes:
        rate: sessions that arrive each second, Poisson.
        seconds: for so long; those that have arrived then are ended.
        prompt, tokens: the least and the most tokens that a session prefills and generates.
        pause: seconds that a session rests half-way, as a user does who reads.
        num_layers: of the callers' model.
        bound_ms: the most between two tokens that is good.
        seed: of arrivals and lengths.
    """

    rate: float
    seconds: float
    prompt: tuple[int, int]
    tokens: tuple[int, int]
    pause: float
    num_layers: int
    bound_ms: float
    seed: int


@dataclass
class SessionRun:
    """One session.

    Attributes:
        arrived: seconds from the start.
        first_ms: from its arrival until its prompt's output was there; None: it never was.
        token_ms: of each further token; pauses are not in it.
        token_at: seconds from the start when each was there.
        error: status of the error that ended it; empty: none.
    """

    arrived: float
    first_ms: float | None = None
    token_ms: list[float] = field(default_factory=list)
    token_at: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class DecodeReport:
    """What came out; times are of the callers, with the wire in them."""

    model: str
    settings: DecodeSettings
    sessions: list[SessionRun]
    seconds: float  # until the last one ended
    complete: bool = True  # False: interrupted

    @property
    def token_ms(self) -> list[float]:
        """Between tokens, of all sessions."""
        return [one for run in self.sessions for one in run.token_ms]

    @property
    def first_ms(self) -> list[float]:
        """From arrival to the prompt's output."""
        return [run.first_ms for run in self.sessions if run.first_ms is not None]

    def figures(self) -> dict[str, float]:
        """In short. Percentiles of nothing are NaN."""
        found: dict[str, float] = {
            "sessions": len(self.sessions),
            "failed": sum(bool(run.error) for run in self.sessions),
            "tokens_per_second": len(self.token_ms) / self.seconds,
            "goodput_per_second": sum(one <= self.settings.bound_ms for one in self.token_ms)
            / self.seconds,
        }
        for name, values in (("first", self.first_ms), ("between", self.token_ms)):
            for share in (50, 90, 99):
                value = float(np.percentile(values, share)) if values else float("nan")
                found[f"{name}_p{share}_ms"] = value
        return found


def run_decode(
    target: str,
    model: str,
    settings: DecodeSettings,
    access: Access = PLAIN,
    *,
    timeout: float,
    progress: Callable[[int, float], None],
) -> DecodeReport:
    """Offer sessions for a while, each by a thread of its own.

    Args:
        target: host:port.
        model: a causal core with the variant `paged`.
        settings: what to offer.
        access: how the server is reached.
        timeout: seconds that a request may take.
        progress: called with the number of sessions and the seconds left at each arrival.

    An interruption (Ctrl-C) ends the measuring: the report is of what was measured until then.

    Raises:
        LoadTestError: there is no such model or server.
        KeyboardInterrupt: before any token came.
    """
    generator = np.random.default_rng(settings.seed)
    with AttentionClient(target, **access.of_client()) as client:
        try:
            served = client.get_model(model, timeout=timeout)
        except AttnserveError as error:
            raise LoadTestError(f"{target}: {error}") from None
        rows = max(settings.prompt[1], 1)
        tensors = [
            generator.standard_normal((rows, heads, dim), np.float32).astype(DTYPES[served.dtype])
            for heads, dim in (
                (served.num_heads, served.head_dim),
                (served.num_kv_heads, served.head_dim),
                (served.num_kv_heads, served.value_head_dim),
            )
        ]
        runs: list[SessionRun] = []
        threads: list[threading.Thread] = []
        start = time.monotonic()
        life = _Life(client, model, settings, tensors, timeout, start)
        due = generator.exponential(1 / settings.rate)
        complete = True
        try:
            while due < settings.seconds:
                time.sleep(max(0.0, start + due - time.monotonic()))
                run = SessionRun(arrived=due)
                prompt, tokens = (
                    int(generator.integers(low, high + 1))
                    for low, high in (settings.prompt, settings.tokens)
                )
                threads.append(
                    threading.Thread(target=life, args=(run, prompt, tokens), daemon=True)
                )
                threads[-1].start()
                runs.append(run)
                progress(len(runs), settings.seconds - due)
                due += generator.exponential(1 / settings.rate)
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            complete = False
            runs = [_so_far(run) for run in runs]
            if not any(run.token_ms for run in runs):
                raise
        return DecodeReport(model, settings, runs, time.monotonic() - start, complete)


def _so_far(run: SessionRun) -> SessionRun:
    """A copy that its thread, which goes on until the client is closed, adds nothing to."""
    at = list(run.token_at)  # the last thing that is added of a token
    return replace(run, token_ms=run.token_ms[: len(at)], token_at=at)


@dataclass(frozen=True)
class _Life:
    """Of one session."""

    client: AttentionClient
    model: str
    settings: DecodeSettings
    tensors: list[NDArray[Any]]
    timeout: float
    start: float

    def __call__(self, run: SessionRun, prompt: int, tokens: int) -> None:
        """Live it."""
        layers = self.settings.num_layers
        try:
            with self.client.session(
                self.model, num_layers=layers, max_tokens=prompt + tokens, timeout=self.timeout
            ) as session:
                for token in range(tokens + 1):
                    if token == tokens // 2 + 1:
                        time.sleep(self.settings.pause)
                    count = prompt if token == 0 else 1
                    begun = time.monotonic()
                    for layer in range(layers):
                        arrays = (tensor[:count] for tensor in self.tensors)
                        session.attend(layer, *arrays, timeout=self.timeout)
                    now = time.monotonic()
                    if token == 0:
                        run.first_ms = (now - self.start - run.arrived) * 1e3
                    else:
                        run.token_ms.append((now - begun) * 1e3)
                        run.token_at.append(now - self.start)
        except AttnserveError as error:
            run.error = error.code.name
