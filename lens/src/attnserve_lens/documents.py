"""Several texts as one: side by side in one map, as packed sequences are, none seeing another."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attnserve_lens.attention import SINK, AttentionMap, Axes


def joined(axes: Sequence[Axes], *, sink: bool = False) -> Axes:
    """The axes of documents side by side; of one, its own.

    Args:
        axes: of each, without a sink.
        sink: whether a learned sink is to stand behind all their keys.
    """
    documents, queries, keys = [], list[str](), list[str]()
    for each in axes:
        documents.append((len(queries), len(keys)))
        queries += each.queries
        keys += each.keys
    several = len(axes) > 1
    return replace(
        axes[0],
        queries=tuple(queries),
        keys=(*keys, SINK) if sink else tuple(keys),
        split=None if several else axes[0].split,
        sink=sink,
        documents=tuple(documents) if several else (),
    )


def packed(maps: Sequence[AttentionMap]) -> AttentionMap:
    """The maps of documents, of one kind, as one whose weights outside of each document are 0."""
    bare = [
        replace(each.axes, keys=each.keys[: len(each.keys) - each.sink], sink=False)
        for each in maps
    ]
    axes = joined(bare, sink=any(each.sink for each in maps))
    shape = (len(axes.layers), len(axes.heads), len(axes.queries), len(axes.keys))
    weights = np.zeros(shape, maps[0].weights.dtype)
    query = key = 0
    for own, each in zip(bare, maps, strict=True):
        rows = slice(query, query + len(own.queries))
        weights[:, :, rows, key : key + len(own.keys)] = each.weights[..., : len(own.keys)]
        if each.sink:
            weights[:, :, rows, -1] = each.weights[..., -1]
        query, key = rows.stop, key + len(own.keys)
    return AttentionMap.of(axes, weights)
