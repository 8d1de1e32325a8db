"""What attention weights say: how spread, on which keys, how much each key gets."""

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
