"""A KV session in NumPy and float64: what the server's sessions are compared with."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from attnserve_export.reference import attention_reference
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class PlainLayer:
    """What a layer holds: keys [N, Hkv, D] and values [N, Hkv, Dv], of all tokens so far.

    `window` counts a query's own key; 0: none. `latent`: how many of a key's numbers are its value,
    where no values are given.
    """

    window: int = 0
    kept_first: int = 0
    cross: bool = False
    latent: int = 0
    key: Array | None = None
    value: Array | None = None

    def append(self, key: Array, value: Array) -> None:
        """Add rows of new tokens."""
        self.key = key if self.key is None else np.concatenate([self.key, key])
        self.value = value if self.value is None else np.concatenate([self.value, value])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows alone; of a cross layer, all."""
        if not self.cross and self.key is not None and self.value is not None:
            self.key, self.value = self.key[rows], self.value[rows]


@dataclass
class PlainSession:
    """Steps, trees, commits, forks and truncation, done in the plainest way."""

    layers: list[PlainLayer]
    length: int = 0
    tree_tokens: int = 0  # of the last step, while it waits for `commit`
    weights: Array | None = None  # [n, H, N] of the layer that was computed last
    _parents: list[int] = field(default_factory=list)
    _new: int = 0

    def begin(self, new_tokens: int, parents: Sequence[int] | None = None) -> None:
        """Begin a step; `parents` as in `SessionStep`."""
        self._new = new_tokens
        self._parents = list(range(-1, new_tokens - 1)) if parents is None else list(parents)
        self.tree_tokens = 0 if parents is None else new_tokens

    def attend(
        self, layer: int, query: Array, key: Array | None = None, value: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """Output [n, H, Dv], log-sum-exp and entropy [n, H], of the step's n tokens.

        Afterwards `weights` has their attention weights.
        """
        held = self.layers[layer]
        if key is not None:
            held.append(key, key[..., : held.latent] if value is None else value)
        assert held.key is not None
        assert held.value is not None
        seen = np.ones((len(query), len(held.key)), bool) if held.cross else self._seen(held)
        heads = [np.asarray(x, np.float64).swapaxes(0, 1)[None] for x in (query, held.key)]
        bias = np.where(seen, 0.0, -np.inf)[None, None]
        output, weights = attention_reference(
            *heads, np.asarray(held.value, np.float64).swapaxes(0, 1)[None], bias=bias
        )
        scores = _scores(*heads) + bias[0]
        top = scores.max(axis=-1, keepdims=True)
        log_sum_exp = (top + np.log(np.exp(scores - top).sum(-1, keepdims=True)))[..., 0]
        self.weights = weights[0].swapaxes(0, 1)
        logs = np.log(np.where(weights > 0, weights, 1.0))
        entropy = -(weights * logs).sum(-1)[0]
        return output[0].swapaxes(0, 1), log_sum_exp.T, entropy.T

    def end(self) -> None:
        """End the step."""
        if not self.tree_tokens:
            self.length += self._new

    def commit(self, accepted: Sequence[int]) -> None:
        """Keep these tokens of the last step's tree."""
        rows = [*range(self.length), *(self.length + index for index in accepted)]
        for layer in self.layers:
            layer.keep(rows)
        self.length += len(accepted)
        self.tree_tokens = 0

    def truncate(self, length: int) -> None:
        """Keep the first tokens."""
        for layer in self.layers:
            layer.keep(range(length))
        self.length = length

    def fork(self, length: int) -> Self:
        """Another session that begins with the first tokens."""
        other = copy.deepcopy(self)
        other.truncate(length)
        return other

    def _seen(self, held: PlainLayer) -> NDArray[np.bool_]:
        """Which keys each new token sees: [n, length + n]."""
        before, new = self.length, self._new
        depth = np.zeros(new, int)
        seen = np.zeros((new, before + new), bool)
        seen[:, :before] = True
        for index, parent in enumerate(self._parents):
            if parent >= 0:
                seen[index, before:] = seen[parent, before:]
                depth[index] = depth[parent] + 1
            seen[index, before + index] = True
        if held.window:
            at = np.concatenate([np.arange(before), before + depth])
            near = at[None, :] > at[before:, None] - held.window
            seen &= near | (at < held.kept_first)[None, :]
        return seen


def _scores(query: Array, key: Array) -> Array:
    """[H, n, N] of [1, H, n, D] and [1, Hkv, N, D]."""
    repeats = query.shape[1] // key.shape[1]
    every = np.repeat(key[0], repeats, axis=0)
    return query[0] @ every.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
