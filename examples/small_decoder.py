"""What a caller of `Decode` keeps: a decoder of random weights in NumPy, all but its attention.

As Llama's: RMS norms, rotary embedding, a gated feed-forward layer. Letters: T tokens, of any
number of sequences one after another; E the width; H, Hkv, D as in the served model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from attnserve_client import AttentionClient
from numpy.typing import NDArray

Array = NDArray[np.float32]

VOCABULARY = 96
_ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Heads:
    """Of the attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, client: AttentionClient, model: str) -> "Heads":
        """Those of a served model."""
        served = client.get_model(model)
        if served.value_head_dim != served.head_dim or served.mask != "causal":
            raise SystemExit(f"{model}: this decoder needs a causal core of equal head dimensions")
        return cls(served.num_heads, served.num_kv_heads, served.head_dim)


class SmallDecoder:
    """A decoder without attention and cache; `attend` of `generate` in the examples is both."""

    def __init__(self, heads: Heads, num_layers: int, seed: int) -> None:
        self.heads = heads
        self.num_layers = num_layers
        generator = np.random.default_rng(seed)
        width = heads.num_heads * heads.head_dim
        kv_width = heads.num_kv_heads * heads.head_dim

        def matrix(rows: int, columns: int) -> Array:
            return generator.standard_normal((rows, columns), np.float32) / np.float32(rows**0.5)

        self._embedding = generator.standard_normal((VOCABULARY, width), np.float32)
        self._layers = [
            {
                "query": 2 * matrix(width, width),
                "key": 2 * matrix(width, kv_width),
                "value": matrix(width, kv_width),
                "output": matrix(width, width),
                "gate": matrix(width, 2 * width),
                "up": matrix(width, 2 * width),
                "down": matrix(2 * width, width),
            }
            for _ in range(num_layers)
        ]

    def embed(self, ids: Sequence[int]) -> Array:
        """[T, E] of token ids."""
        return self._embedding[list(ids)]

    def project(self, layer: int, hidden: Array, positions: Any) -> tuple[Array, Array, Array]:
        """Query [T, H, D], key and value [T, Hkv, D] of hidden states [T, E]."""
        weights, heads = self._layers[layer], self.heads
        normed = _normed(hidden)
        query, key, value = (
            (normed @ weights[name]).reshape(len(hidden), -1, heads.head_dim)
            for name in ("query", "key", "value")
        )
        return _turned(query, positions), _turned(key, positions), value

    def finish(self, layer: int, hidden: Array, attended: Array) -> Array:
        """[T, E] after a layer, given its attention's output [T, H, D]."""
        weights = self._layers[layer]
        hidden = hidden + attended.reshape(len(hidden), -1) @ weights["output"]
        normed = _normed(hidden)
        gate = normed @ weights["gate"]
        opened = gate / (1 + np.exp(-gate))
        fed: Array = hidden + (opened * (normed @ weights["up"])) @ weights["down"]
        return fed

    def next_ids(self, hidden: Array) -> list[int]:
        """The likeliest next token of each of [T, E]."""
        logits = _normed(hidden) @ self._embedding.T
        return [int(best) for best in logits.argmax(axis=-1)]

    def greedy(self, prompt: Sequence[int], new_tokens: int, scale: float) -> list[int]:
        """What must come out: everything here, all over again for each token, without a cache."""
        ids = list(prompt)
        for _ in range(new_tokens):
            hidden = self.embed(ids)
            for layer in range(self.num_layers):
                tensors = self.project(layer, hidden, np.arange(len(ids)))
                hidden = self.finish(layer, hidden, _attention(*tensors, scale))
            ids += self.next_ids(hidden[-1:])
        return ids[len(prompt) :]


def _normed(hidden: Array) -> Array:
    square = np.mean(hidden * hidden, axis=-1, keepdims=True)
    normed: Array = hidden / np.sqrt(square + np.float32(1e-6))
    return normed


def _turned(heads: Array, positions: Any) -> Array:
    """Rotary embedding of [T, heads, D], halves of D being the pairs."""
    half = heads.shape[-1] // 2
    angles = np.asarray(positions)[:, None] * _ROTARY_BASE ** (-np.arange(half) / half)
    cos, sin = (turn(angles)[:, None].astype(np.float32) for turn in (np.cos, np.sin))
    first, second = heads[..., :half], heads[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(query: Array, key: Array, value: Array, scale: float) -> Array:
    """Causal attention of one whole sequence."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (np.repeat(x, repeats, axis=1) for x in (key, value))
    scores = np.einsum("qhd,khd->hqk", query, key) * np.float32(scale)
    scores += np.triu(np.full(scores.shape[1:], -np.inf, np.float32), 1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    output: Array = np.einsum("hqk,khd->qhd", weights, value)
    return output
