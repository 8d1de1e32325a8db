"""What attention weights say: how spread, on which keys, how much each key gets, how far away.

From the weights themselves, where they are there; a model's `diagnostics` variant says the same
without ever holding them all.
"""

import numpy as np

from attnserve_server.dtypes import Array


def entropy(weights: Array) -> Array:
    """Shannon entropy of each query's weights, in nats.

    Args:
        weights: [..., Sk]; rows sum to 1, or to 0 where a query sees no key.

    Returns:
        [...] FP32; 0 for a query that sees one key or none, ln(n) for n keys seen alike.
    """
    exact = weights.astype(np.float32, copy=False)
    logs = np.log(exact, out=np.zeros_like(exact), where=exact > 0)
    return np.asarray(-np.einsum("...k,...k->...", exact, logs), np.float32) + np.float32(0)


def top_k(weights: Array, count: int) -> tuple[Array, Array]:
    """The heaviest keys of each query, the earlier key first where weights are equal.

    Args:
        weights: [..., Sk].
        count: 1..Sk.

    Returns:
        Indices [..., count] INT64 and their weights [..., count] FP32, heaviest first.
    """
    indices = np.argsort(-weights, axis=-1, kind="stable")[..., :count].astype(np.int64)
    return indices, np.take_along_axis(weights, indices, axis=-1).astype(np.float32)


def mass_per_key(weights: Array) -> Array:
    """The weight that each key receives, summed over queries.

    Args:
        weights: [..., Sq, Sk].

    Returns:
        [..., Sk] FP32; sums to the number of queries that see any key.
    """
    return np.asarray(weights.sum(axis=-2, dtype=np.float32))


def mass_by_distance(
    weights: Array, key_lengths: Array, *, bottom_right: bool, count: int
) -> Array:
    """The weight given at each distance between query and key, summed over queries.

    Args:
        weights: [B, H, Sq, Sk].
        key_lengths: [B].
        bottom_right: whether query i is at position key_length - Sq + i instead of i.
        count: N, distances to tell apart; the last one gathers all from N - 1 on.

    Returns:
        [B, H, N] FP32; sums to the number of queries that see any key.
    """
    batch, num_heads, query_len, key_len = weights.shape
    masses = np.empty((batch, num_heads, count), np.float32)
    for row, length in enumerate(key_lengths):
        positions = np.arange(query_len) + (int(length) - query_len if bottom_right else 0)
        apart = np.abs(positions[:, None] - np.arange(key_len)[None, :])
        bins = np.minimum(apart, count - 1).ravel()
        for head in range(num_heads):
            masses[row, head] = np.bincount(bins, weights[row, head].ravel(), count)
    return masses
