"""Weights of single heads, from query and key or from a graph, and what they say.

Blocks of queries at a time: unless the weights themselves are wanted, nothing of size Sq x Sk is
ever held.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from attnserve_server.dtypes import Array
from attnserve_server.tokens.work import HeadsWanted

# Weights of one block, about: they should stay in a processor's cache.
_BLOCK_ELEMENTS = 1 << 18

# Scores of keys that a query does not see. Not -inf: exp() of it is 0 all the same.
_UNSEEN = np.float32(-1e30)
_TINY = np.float32(1e-37)


@dataclass(frozen=True, slots=True)
class Block:
    """Weights of some queries over some keys; over all others they are 0.

    Attributes:
        query, key: the first ones.
        weights: [H, queries, keys] FP32.
        entropy: [H, queries] FP32, nats, where it is known already.
    """

    query: int
    key: int
    weights: Array
    entropy: Array | None = None


@dataclass(frozen=True, slots=True)
class Reach:
    """Which keys a query sees, both counted from the same start.

    Attributes:
        causal: none after its own position.
        window: keys up to its own, its own included; None: all. Causal attention only.
    """

    causal: bool
    window: int | None


def blocks(
    query: Array,
    key: Array,
    scale: float,
    reach: Reach,
    bias: Array | None,
    sinks: Array | None = None,
    *,
    with_entropy: bool,
) -> Iterator[Block]:
    """The weights of one layer's heads on one sequence.

    Args:
        query: [H, Sq, D].
        key: [H, Sk, D]; heads that share keys have a copy each.
        scale: multiplies query x key.
        reach: who sees whom.
        bias: [H, Sq + Sk - 1], added to the scores by key - query + Sq - 1; None: nothing.
        sinks: [H], logits that take part in the softmax and are no keys; None: there are none.
        with_entropy: of the blocks.
    """
    num_heads, query_len, _ = query.shape
    key_len = key.shape[1]
    rows = max(1, _BLOCK_ELEMENTS // (num_heads * key_len))
    for start in range(0, query_len, rows):
        stop = min(start + rows, query_len)
        first = 0 if reach.window is None else max(0, start - reach.window + 1)
        end = min(key_len, stop) if reach.causal else key_len
        scores = (query[:, start:stop] * np.float32(scale)) @ key[:, first:end].swapaxes(1, 2)
        apart = np.arange(first, end)[None, :] - np.arange(start, stop)[:, None]
        if bias is not None:
            scores += bias[:, apart + (query_len - 1)]
        if reach.causal:
            unseen = apart > 0
            if reach.window is not None:
                unseen |= apart <= -reach.window
            np.copyto(scores, _UNSEEN, where=unseen)
        highest = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            np.maximum(highest, sinks[:, None, None], out=highest)
        scores -= highest
        weights = np.exp(scores, out=None if with_entropy else scores)
        seen = weights.sum(axis=-1, keepdims=True)
        total = seen if sinks is None else seen + np.exp(sinks[:, None, None] - highest)
        entropy = None
        if with_entropy:  # ln(total) less the mean score: no logarithm of each weight
            mean = np.einsum("hqk,hqk->hq", weights, scores) / total[..., 0]
            # Of what a sink takes there is no term.
            log_total = np.log(total) * (seen / total)
            entropy = np.maximum(log_total[..., 0] - mean, np.float32(0))
        weights /= total
        yield Block(start, first, weights, entropy)


def say(
    found: Iterable[Block], num_heads: int, query_len: int, key_len: int, wanted: HeadsWanted
) -> dict[str, Array]:
    """Put together what is wanted.

    Returns:
        By their names in `SequenceResult`, without its L axis.
    """
    shapes = {
        "weights": (num_heads, query_len, key_len),
        "entropy": (num_heads, query_len),
        "effective_context": (num_heads, query_len),
        "mass_by_distance": (num_heads, wanted.mass_by_distance),
        "mass_on_first": (num_heads, query_len),
    }
    said = {n: np.zeros(shapes[n], np.float32) for n in wanted.names}
    # In float64: a bin of thousands would lose what small weights are added to it.
    masses = np.zeros(shapes["mass_by_distance"])
    for block in found:
        rows = slice(block.query, block.query + block.weights.shape[1])
        if wanted.weights:
            keys = slice(block.key, block.key + block.weights.shape[2])
            said["weights"][:, rows, keys] = block.weights
        if wanted.entropy or wanted.effective_context:
            entropy = _entropy(block.weights) if block.entropy is None else block.entropy
            if wanted.entropy:
                said["entropy"][:, rows] = entropy
            if wanted.effective_context:
                said["effective_context"][:, rows] = np.exp(entropy)
        if wanted.mass_by_distance:
            _add_by_distance(masses, block)
        if wanted.mass_on_first:
            seen = max(0, wanted.mass_on_first - block.key)
            said["mass_on_first"][:, rows] = block.weights[:, :, :seen].sum(axis=-1)
    if wanted.mass_by_distance:
        said["mass_by_distance"] = masses.astype(np.float32)
    return said


def _entropy(weights: Array) -> Array:
    """Of each row, in nats."""
    logs = np.log(np.maximum(weights, _TINY))
    entropy: Array = np.maximum(-np.einsum("hqk,hqk->hq", weights, logs), np.float32(0))
    return entropy


def _add_by_distance(masses: Array, block: Block) -> None:
    """Add the sums of a block's diagonals to the bins of their distances, [H, N]."""
    num_heads, rows, keys = block.weights.shape
    # Rows one element longer than they are apart in memory: diagonals become columns.
    width = rows + keys - 1
    padded = np.zeros((num_heads, rows - 1 + rows * width + rows), np.float32)
    inner = padded[:, rows - 1 : rows - 1 + rows * width].reshape(num_heads, rows, width)
    inner[:, :, :keys] = block.weights
    skewed = np.lib.stride_tricks.as_strided(
        padded,
        (num_heads, rows, width),
        (padded.strides[0], (width + 1) * padded.itemsize, padded.itemsize),
    )
    sums = skewed.sum(axis=1)  # by key - query, from -(rows - 1) on
    apart = np.abs(np.arange(width) - (rows - 1) + block.key - block.query)
    np.add.at(masses.T, np.minimum(apart, masses.shape[1] - 1), sums.T)
