"""A cache of transformers that holds no tensors: keys and values are in sessions of a server."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from attnserve_client._sessions import Session
from attnserve_client._transformers_sequences import Sequences
from attnserve_client._transformers_service import current

NAME = "attnserve"
_WINDOWED, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class NewKeys:
    """What a cache was given by a layer, whose attention is computed next."""

    sequences: Sequences
    layer: int
    shape: torch.Size


class _Given(threading.local):
    """Keys given to a cache by this thread, whose attention has not been asked for yet."""

    keys: NewKeys | None = None


_given = _Given()


def take_new_keys() -> NewKeys | None:
    """What this thread's layer gave to a `SessionCache` just before; None: it has no such cache."""
    keys, _given.keys = _given.keys, None
    return keys


class SessionCache(DynamicCache):
    """Lengths alone; each row's keys and values are in a KV session of the server named.

    A model with `attn_implementation="attnserve"` makes one wherever it would make a
    `DynamicCache`. Given to several calls, it carries a conversation on. `copy.deepcopy` forks the
    sessions. They are closed by `close`, or with the last reference to the cache.

    Args:
        config: of the model.
        ddp_cache_data, offloading, offload_only_non_sliding: those of `DynamicCache`, unused.

    Raises:
        ValueError: the model has other layers than of attention, full or with a window.
        RuntimeError: no server was named.
    """

    def __init__(
        self,
        ddp_cache_data: Any = None,
        config: PreTrainedConfig | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        if config is None:
            raise ValueError("config: None; allowed: the model's")
        if ddp_cache_data is not None:
            raise ValueError("ddp_cache_data: tensors; allowed: None, as the cache holds none")
        self._hold(Sequences(current.get(), _windows(config)))

    def _hold(self, sequences: Sequences) -> None:
        self._sequences = sequences
        # The list that it has now stays its own.
        weakref.finalize(self, sequences.service.close_when_idle, sequences.sessions).atexit = False
        Cache.__init__(self, layers=[_Layer(sequences) for _ in sequences.windows])

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take note of a layer's new keys; its attention sends them."""
        forgotten = take_new_keys()
        if forgotten is not None and layer_idx != 0:
            raise RuntimeError(
                f"layer {forgotten.layer}: its attention is not computed by "
                f"attn_implementation={NAME!r}, which holds its keys; allowed: models whose every "
                "layer is"
            )
        _given.keys = NewKeys(self._sequences, layer_idx, key_states.shape)
        return key_states, value_states

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] is: sessions are forked, not copied, and closed."""
        self._sequences.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        rows = torch.arange(len(self._sequences.sessions))
        self._sequences.select(rows[torch.as_tensor(indices).cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Fork each row."""
        rows = range(len(self._sequences.sessions))
        self._sequences.select([row for row in rows for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of each row.

        Args:
            tokens_to_remove: minus how many.

        Raises:
            FailedPreconditionError: a window would lack keys that were given back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: {tokens_to_remove}; allowed: at most 0")
        self._sequences.crop(-tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens."""
        self._sequences.close()

    def close(self) -> None:
        """Close the sessions."""
        self._sequences.close()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The session of each row, of its tokens without the padding; empty before the first."""
        return tuple(self._sequences.sessions)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = type(self).__new__(type(self))
        copy._hold(self._sequences.fork())
        return copy


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The length of a layer, for whoever asks it and not the cache."""

    is_sliding = False  # nothing is cut off: masks are of all tokens
    is_croppable = True
    supports_early_init = False

    def __init__(self, sequences: Sequences) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sequences = sequences

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to make."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer alone cannot say which one it is."""
        raise NotImplementedError("allowed: SessionCache.update")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask is of, and where they begin."""
        return self._sequences.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of a row, padding included."""
        return self._sequences.length

    def get_max_length(self) -> int:
        """None."""
        return -1


def _windows(config: PreTrainedConfig) -> list[int]:
    """Of each layer: keys up to its own that a query sees; 0: all."""
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"attn_implementation={NAME!r}: {config.model_type} with cross-attention; allowed: "
            "decoders alone"
        )
    windows = []
    types, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    for layer, (kind, given) in enumerate(zip(types, arguments, strict=True)):
        if kind not in (_FULL, _WINDOWED):
            raise ValueError(
                f"attn_implementation={NAME!r}: layer {layer} of {config.model_type} is "
                f"{kind}; allowed: {_FULL}, {_WINDOWED}"
            )
        windows.append(given["sliding_window"] if kind == _WINDOWED else 0)
    return windows


def make_caches_sessions() -> None:
    """Have `DynamicCache(config=...)` make a `SessionCache` for models that attend by attnserve.

    `generate` and the models themselves make that class by name, and ask nobody: there is no other
    place at which to hand them a cache of another class.
    """
    if "__new__" not in vars(DynamicCache):
        DynamicCache.__new__ = staticmethod(_new_cache)  # type: ignore[method-assign, assignment]


def _new_cache(cls: type[DynamicCache], *args: Any, **kwargs: Any) -> DynamicCache:
    config = kwargs.get("config") or (args[1] if len(args) > 1 else None)
    if cls is DynamicCache and config is not None:
        text: PreTrainedConfig = config.get_text_config(decoder=True)
        if text._attn_implementation == NAME:
            cls = SessionCache
    return object.__new__(cls)
