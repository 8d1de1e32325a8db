"""Where query, key and value of a ragged batch come from, if not from the caller as they are.

Graphs that turn heads by position, or project hidden states, have inputs of their own: these are
made here, and what the operator gets of them, in float64.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnserve_export.attention.core import AttentionConfig
from attnserve_export.attention.layer import AttentionLayer
from attnserve_export.attention.positions import Rotary
from attnserve_export.paged_batches import PagedBatch
from attnserve_export.reference import Scheme, turned

Array = NDArray[Any]


def turn(batch: PagedBatch, config: AttentionConfig, first: int) -> dict[str, Array]:
    """Turn query and keys of a batch by their positions, and store the keys so.

    Args:
        batch: its query, keys and pages are changed.
        config: with a rotary embedding.
        first: the position of each sequence's first token.

    Returns:
        Query, key and value of the new tokens as they were, and their positions.
    """
    query, at = batch.query, 0
    raw = [(s.keys[s.before :], s.values[s.before :]) for s in batch.sequences]
    of_new, turned_queries = [], []
    for s in batch.sequences:
        positions = first + batch.positions(s)
        of_new.append(positions[s.before :])
        turned_queries.append(_turned(config.rotary, query[at : at + s.count], of_new[-1]))
        s.keys = _turned(config.rotary, s.keys, positions)
        batch.store(s, 0, s.before)
        at += s.count
    batch.query = np.concatenate(turned_queries)
    key, value = (np.concatenate(arrays) for arrays in zip(*raw, strict=True))
    return {"query": query, "key": key, "value": value, "positions": np.concatenate(of_new)}


def project(batch: PagedBatch, layer: AttentionLayer) -> dict[str, Array]:
    """Let the heads of a batch be those of a layer for random hidden states.

    Args:
        batch: its query, keys, values and pages are changed.
        layer: in float64.

    Returns:
        The hidden states of the new tokens [T, E].
    """
    of_new, queries = [], []
    for s in batch.sequences:
        shape = (s.length, layer.config.embed_dim)
        hidden = batch.generator.standard_normal(shape).astype(batch.dtype)
        given = torch.from_numpy(hidden.astype(np.float64))[None]
        with torch.no_grad():
            query, s.keys, s.values = (
                heads[0].transpose(0, 1).numpy() for heads in layer.heads(given, given)
            )
        of_new.append(hidden[s.before :])
        queries.append(query[s.before :])
        batch.store(s, 0, s.before)
    batch.query = np.concatenate(queries)
    return {"hidden_states": np.concatenate(of_new)}


def merge(output: Array, layer: AttentionLayer) -> Array:
    """[T, H, Dv] to [T, E] by a layer in float64."""
    with torch.no_grad():
        return layer.merge(torch.from_numpy(output)[None].transpose(1, 2))[0].numpy()


def _turned(rotary: Rotary | None, heads: Array, positions: Array) -> Array:
    """[n, heads, D]."""
    assert rotary is not None
    scheme = Scheme(rotary_style=rotary.style, rotary_dims=rotary.dims, rotary_base=rotary.base)
    exact = heads.astype(np.float64)
    each = [turned(exact[:, head], positions, scheme) for head in range(heads.shape[1])]
    return np.stack(each, axis=1)
