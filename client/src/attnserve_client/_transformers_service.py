"""The server that computes attention of transformers' models, and which of its models does."""

import math
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import grpc

from attnserve_client._client import AttentionClient
from attnserve_client._results import Model, SessionLayer
from attnserve_client._sessions import Session

TARGET_VARIABLE = "ATTNSERVE_TARGET"

# The most that a session may grow to. Room is promised for less, so this costs nothing.
_MOST_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a served model must have to compute some attention; `dtype` as in `Model`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: str
    softcap: float = 0.0

    def fits(self, model: Model) -> bool:
        """Whether a model computes this, whatever its scale and window."""
        has = Geometry(
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            model.value_head_dim,
            model.dtype,
            # It went through FP32.
            self.softcap if _close(model.softcap, self.softcap) else model.softcap,
        )
        return (
            has == self
            and model.kind == "core"
            and model.mask == "causal"
            and not model.alibi
            and not model.rotary
            and not model.sinks
            and any(variant.name == "paged" for variant in model.variants)
        )

    def __str__(self) -> str:
        softcap = f", softcap {self.softcap:g}" if self.softcap else ""
        return (
            f"num_heads {self.num_heads}, num_kv_heads {self.num_kv_heads}, head_dim "
            f"{self.head_dim}, value_head_dim {self.value_head_dim}, {self.dtype}{softcap}"
        )

    def export_command(self, scale: float) -> str:
        """What makes such a model."""
        options = [
            f"--num-heads {self.num_heads}",
            f"--num-kv-heads {self.num_kv_heads}",
            f"--head-dim {self.head_dim}",
        ]
        if self.value_head_dim != self.head_dim:
            options.append(f"--value-head-dim {self.value_head_dim}")
        if not _close(scale, self.head_dim**-0.5):
            options.append(f"--scale {scale!r}")
        if self.softcap:
            options.append(f"--softcap {self.softcap!r}")
        options.append(f"--mask causal --dtype {self.dtype.lower()}")
        return f"attnserve-export core --out models --name NAME {' '.join(options)}"


class Service:
    """A server, and how sessions are opened there. Safe to share between threads.

    Args:
        target: `host:port`, or any target that grpc understands.
        model: a served core model; empty: whichever fits.
        cache_dtype, lease: of the sessions, as `AttentionClient.session` has them.
        reserved_tokens: tokens that each session is promised room for; those of its first step
            besides, if they are more.
        credentials: for TLS.
    """

    def __init__(
        self,
        target: str,
        *,
        model: str = "",
        cache_dtype: str | None = None,
        reserved_tokens: int = 1024,
        lease: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if not 1 <= reserved_tokens <= _MOST_TOKENS:
            raise ValueError(f"reserved_tokens: {reserved_tokens}; allowed: 1..{_MOST_TOKENS}")
        self.client = AttentionClient(target, credentials=credentials)
        self._target = target
        self._model = model
        self._cache_dtype = cache_dtype
        self._reserved_tokens = reserved_tokens
        self._lease = lease
        # Sessions of caches that are gone. Python collects those at any moment, even while a
        # request is being sent: a thread of its own closes them.
        self._abandoned: SimpleQueue[list[Session] | None] = SimpleQueue()
        threading.Thread(
            target=_close_all, args=(self._abandoned,), name="attnserve-closer", daemon=True
        ).start()
        weakref.finalize(self, self._abandoned.put, None).atexit = False

    def find(self, geometry: Geometry, scale: float) -> Model:
        """A served model that fits, of this scale if there is one.

        Raises:
            ValueError: none fits; says what to export.
        """
        models = [model for model in self.client.list_models() if self._model in ("", model.name)]
        if self._model and not models:
            raise ValueError(f"model: {self._model!r} is not served at {self._target}")
        fitting = [model for model in models if geometry.fits(model)]
        if not fitting:
            whose = f"the model {self._model!r}" if self._model else "none"
            raise ValueError(
                f"attention with {geometry}: {whose} at {self._target} computes it; allowed: a "
                "causal core model of these, with the variant 'paged', without ALiBi, rotary and "
                f"sinks. To make one: {geometry.export_command(scale)}"
            )
        return min(fitting, key=lambda model: not _close(model.scale, scale))

    def open(self, model: Model, windows: Sequence[int], count: int, tokens: int) -> list[Session]:
        """Sessions of one length.

        Args:
            windows: of each layer: keys that a query sees; 0: all.
            count: of sessions.
            tokens: of the longest one's first step.
        """
        return self.client.sessions(
            count,
            model.name,
            version=model.version,
            num_layers=len(windows),
            layers=[SessionLayer(window=window) for window in windows],
            max_tokens=_MOST_TOKENS,
            reserved_tokens=max(tokens, self._reserved_tokens),
            cache_dtype=self._cache_dtype,
            lease=self._lease,
        )

    def close_when_idle(self, sessions: list[Session]) -> None:
        """Let a thread close them. Can be called anywhere, even by a destructor."""
        self._abandoned.put(list(sessions))


def _close_all(abandoned: "SimpleQueue[list[Session] | None]") -> None:
    while (sessions := abandoned.get()) is not None:
        for session in sessions:
            session.close()


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6)


class _Current:
    """The server that was named."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._service: Service | None = None

    def set(self, service: Service) -> None:
        """Caches that there are stay where they are."""
        with self._lock:
            self._service = service

    def get(self) -> Service:
        """The one named last, or that the environment names.

        Raises:
            RuntimeError: none was named.
        """
        with self._lock:
            if self._service is None:
                target = os.environ.get(TARGET_VARIABLE)
                if not target:
                    raise RuntimeError(
                        "attn_implementation='attnserve': no server was named; call "
                        "attnserve_client.transformers.connect('host:port'), or set "
                        f"{TARGET_VARIABLE}"
                    )
                self._service = Service(target)
            return self._service


current = _Current()
