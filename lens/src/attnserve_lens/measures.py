"""What the views say in numbers; all from the exact weights, before anything is packed."""

from dataclasses import dataclass

import numpy as np
from attnserve_client import token_texts as texts
from numpy.typing import NDArray

from attnserve_lens.attention import AttentionMap

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Measures:
    """How spread the weights of a map are, and where they go.

    Attributes:
        effective: [L, H, Sq], exp of the entropy: as many keys of equal weight would be as spread.
        visible: [L, Sq], keys that a query may see: those to which any head gives weight.
        received: [L, H, Sk], mean weight that a key gets from the queries that may see it.
        first: [L, H], mean weight on the first key, of its document where there are several.
        special: [L, H], mean weight on tokens that the model added, like [CLS] and [SEP].
        own, previous, following: [L, H], mean weight of a token on itself and on its neighbours;
            None where queries and keys are not the same tokens.
    """

    effective: Floats
    visible: Floats
    received: Floats
    first: Floats
    special: Floats
    own: Floats | None
    previous: Floats | None
    following: Floats | None


def measure(attention: AttentionMap) -> Measures:
    """Measure a map, one layer at a time so that memory stays at a few of them."""
    layers, heads, num_queries, num_keys = attention.weights.shape
    effective = np.empty((layers, heads, num_queries), np.float32)
    visible = np.empty((layers, num_queries), np.float32)
    received = np.empty((layers, heads, num_keys), np.float32)
    for layer, weights in enumerate(attention.weights):
        exact = weights.astype(np.float32, copy=False)
        seen = (exact > 0).any(axis=0)  # (Sq, Sk)
        effective[layer] = effective_keys(exact)
        visible[layer] = seen.sum(axis=-1)
        received[layer] = exact.sum(axis=1) / np.maximum(seen.sum(axis=0), 1)
    special = [index for index, key in enumerate(attention.keys) if texts.is_special(key)]

    def diagonal(offset: int) -> Floats | None:
        if not attention.square or num_queries <= abs(offset):
            return None
        tokens = attention.weights[..., :num_queries]  # without a sink
        found = np.diagonal(tokens, offset, axis1=-2, axis2=-1)
        # Of two neighbours, the first of a document has none before it.
        between = [first[0] - 1 for first in attention.documents[1:]] if offset else []
        found = np.delete(found, between, axis=-1)
        return np.asarray(found.mean(axis=-1, dtype=np.float32)) if found.size else None

    first = sum(
        attention.weights[..., queries, keys.start].sum(axis=-1, dtype=np.float32)
        for queries, keys in attention.blocks
        if keys.start < keys.stop
    )

    return Measures(
        effective=effective,
        visible=visible,
        received=received,
        first=np.asarray(first / num_queries, np.float32),
        special=attention.weights[..., special].sum(axis=-1).mean(axis=-1, dtype=np.float32),
        own=diagonal(0),
        previous=diagonal(-1),
        following=diagonal(1),
    )


def per_head(measures: Measures) -> dict[str, Floats | None]:
    """The measures that are one number for each layer and head, [L, H]; see `Measures`."""
    return {
        "effective": measures.effective.mean(axis=-1),
        "first": measures.first,
        "special": measures.special,
        "own": measures.own,
        "previous": measures.previous,
        "following": measures.following,
    }


def effective_keys(weights: Floats) -> Floats:
    """exp of the Shannon entropy of each row: n where n keys share the weight equally.

    Args:
        weights: [..., Sk].

    Returns:
        [...] from 1 on; 0 for a row without weight.
    """
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    entropy = -np.einsum("...k,...k->...", weights, logs)
    return np.where(weights.any(axis=-1), np.exp(entropy), 0).astype(np.float32)
