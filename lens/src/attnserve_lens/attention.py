"""What there is to see in a result: one map for each kind of attention of one sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
from attnserve_client import AttendResult, TokensResult
from attnserve_client import token_texts as texts
from numpy.typing import NDArray

Array = NDArray[Any]

# What the column of a learned sink is called. Rows that add up to less than 1 by more than rounding
# can explain, by the size of their numbers in bytes, left the rest to one.
SINK = "(sink)"
_ROUNDING = {2: 0.02, 4: 1e-3, 8: 1e-6}


# Of each document, its first query and its first key.
Documents = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Axes:
    """What the axes of a map's weights stand for; attributes as in `AttentionMap`."""

    kind: str
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    split: int | None = None
    sink: bool = False
    documents: Documents = ()

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same tokens, the sink aside."""
        return self.queries == (self.keys[:-1] if self.sink else self.keys)


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """The weights of one sequence, of some layers and heads of one kind of attention.

    Attributes:
        kind: "encoder", "decoder" or, from an encoder-decoder's decoder to its encoder, "cross";
            "self" where the result does not say.
        weights: [L, H, Sq, Sk]; rows sum to 1, or to 0 where a query sees no key.
        queries, keys: the tokens, as the vocabulary writes them; the same for self-attention.
        layers, heads: what the L and H axes hold, 0-based.
        split: where the second of two texts begins, in queries and in keys; None of one text.
        sink: whether the last key is no token but the model's learned sink.
        documents: packed one after another, none of which sees another; empty of one alone.
    """

    kind: str
    weights: Array
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    split: int | None = None
    sink: bool = False
    documents: Documents = ()

    def __post_init__(self) -> None:
        allowed = (len(self.layers), len(self.heads), len(self.queries), len(self.keys))
        if self.weights.shape != allowed:
            raise ValueError(
                f"weights: shape {list(self.weights.shape)}; allowed: {list(allowed)}, by the "
                "layers, heads, queries and keys"
            )

    @classmethod
    def of(cls, axes: Axes, weights: Array) -> Self:
        """The map of weights whose axes are these."""
        return cls(
            axes.kind,
            weights,
            axes.queries,
            axes.keys,
            axes.layers,
            axes.heads,
            axes.split,
            axes.sink,
            axes.documents,
        )

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same tokens, the sink aside."""
        return self.axes.square

    @property
    def axes(self) -> Axes:
        """What the axes of the weights stand for."""
        return Axes(
            self.kind,
            self.queries,
            self.keys,
            self.layers,
            self.heads,
            self.split,
            self.sink,
            self.documents,
        )

    @property
    def blocks(self) -> list[tuple[slice, slice]]:
        """Queries and keys of each document, the sink aside; of one alone, all."""
        ends = (len(self.queries), len(self.keys) - self.sink)
        firsts = self.documents or ((0, 0),)
        return [
            (slice(first[0], after[0]), slice(first[1], after[1]))
            for first, after in zip(firsts, (*firsts[1:], ends), strict=True)
        ]

    def layer_index(self, layer: int | None) -> int:
        """Where a layer is on the L axis; None is the first there.

        Raises:
            ValueError: it is not among the layers of the result.
        """
        return _index("layer", layer, self.layers)

    def head_index(self, head: int | None) -> int:
        """Where a head is on the H axis; None is the first there.

        Raises:
            ValueError: it is not among the heads of the result.
        """
        return _index("head", head, self.heads)


def maps_of(result: TokensResult | AttendResult, sequence: int = 0) -> tuple[AttentionMap, ...]:
    """The maps of one sequence of a result.

    Args:
        result: with weights.
        sequence: which one of the batch.

    Raises:
        ValueError: the result has no weights, or no such sequence.
    """
    weights = result.weights
    if weights is None:
        raise ValueError("the result has no weights; call with return_weights=True")
    if not 0 <= sequence < len(weights):
        raise ValueError(f"sequence: {sequence}; allowed: 0..{len(weights) - 1}")
    array = np.asarray(weights[sequence])
    if isinstance(result, AttendResult):
        # One layer, positions for tokens; a window's rows keep their own numbers.
        num_heads, num_queries, num_keys = array.shape
        documents = _documents_of(result)
        firsts = list(zip(*documents, strict=True)) or [(), ()]
        queries, keys = _numbers(num_queries, firsts[0]), _numbers(num_keys, firsts[1])
        heads = tuple(range(num_heads))
        axes, array = Axes("self", queries, keys, (0,), heads, documents=documents), array[None]
    else:
        layers, heads = tuple(result.layers), tuple(result.heads)
        axes = axes_of(result, result.attention, layers, heads, sequence)
    left = left_to_sink(array)
    if left.max(initial=0) > _ROUNDING[array.dtype.itemsize]:
        axes = replace(axes, keys=(*axes.keys, SINK), sink=True)
        array = np.concatenate([array, left.astype(array.dtype)[..., None]], axis=-1)
    return (AttentionMap.of(axes, array),)


def left_to_sink(weights: Array) -> Array:
    """What rows leave to a learned sink, [...], float32; of weights [..., Sk].

    A row without any weight sees no key: it leaves nothing.
    """
    sums = weights.sum(axis=-1, dtype=np.float32)
    return np.where(sums > 0, np.maximum(1 - sums, 0), np.float32(0))


def axes_of(
    result: TokensResult,
    attention: str,
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    sequence: int = 0,
) -> Axes:
    """What the axes of an attention of a sequence stand for, whether it has weights or not.

    Args:
        result: with the tokens.
        attention: which of the model's; empty of one.
        layers, heads: 0-based.
        sequence: which one of the batch.
    """
    queries, keys = texts.axes_of(result, sequence, attention)
    split = None
    if queries == keys:
        types = [*result.token_type_ids[sequence : sequence + 1], []][0]
        split = types.index(1) if 1 in types else texts.second_segment(queries)
    return Axes(attention or "self", queries, keys, layers, heads, split)


def _documents_of(result: AttendResult) -> Documents:
    """Of packed sequences, where each begins that has a query or a key."""
    if result.cu_seqlens_q is None or result.cu_seqlens_k is None:
        return ()
    starts = list(zip(result.cu_seqlens_q.tolist(), result.cu_seqlens_k.tolist(), strict=True))
    return tuple(first for first, after in pairwise(starts) if first != after)


def _numbers(count: int, firsts: Sequence[int]) -> tuple[str, ...]:
    """Positions; of packed sequences which one it is and where in it: "2:17"."""
    if len(firsts) < 2:
        return tuple(map(str, range(count)))
    return tuple(
        f"{number}:{position - first}"
        for number, (first, after) in enumerate(pairwise((*firsts, count)))
        for position in range(first, after)
    )


def _index(name: str, number: int | None, held: tuple[int, ...]) -> int:
    if number is None:
        return 0
    if number not in held:
        raise ValueError(
            f"{name}: {number}; allowed: {', '.join(map(str, held))}, as was asked for"
        )
    return held.index(number)
