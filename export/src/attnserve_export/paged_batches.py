"""Ragged batches over pages in NumPy: what the operator PagedAttention is verified with.

How pages are laid out is written down in docs/kernels.md; this reads and writes them independently
of the operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from attnserve_export.reference import paged_reference

Array = NDArray[Any]

# In the order of the operator's numbers.
CACHE_TYPES: dict[str, Any] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "fp8": ml_dtypes.float8_e4m3fn,
}

OUTPUTS = ("output", "log_sum_exp", "entropy", "weights")


@dataclass(frozen=True)
class PageLayout:
    """Where things lie in a page.

    Attributes:
        num_kv_heads, head_dim, value_head_dim: Hkv, D and Dv of the attention.
        page_size: tokens of a page.
        dtype: a key of `CACHE_TYPES`.
        latent: whether keys hold the values, as their first numbers.
    """

    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    page_size: int
    dtype: str
    latent: bool = False

    @property
    def scaled(self) -> bool:
        """Whether each row has a scale."""
        return self.dtype in ("int8", "fp8")

    @property
    def bytes(self) -> int:
        """Of a page."""
        rows = self.num_kv_heads * self.page_size
        element = int(np.dtype(CACHE_TYPES[self.dtype]).itemsize)
        parts = 1 if self.latent else 2
        width = self.head_dim if self.latent else self.head_dim + self.value_head_dim
        return -(-(rows * (width * element + (4 * parts if self.scaled else 0))) // 64) * 64

    def parts(self, page: Array) -> tuple[Array, Array, Array, Array]:
        """Views of a page's keys and values [Hkv, page_size, width] and scales [Hkv, page_size].

        Scales are 1, and no views, where there are none.
        """
        kind = np.dtype(CACHE_TYPES[self.dtype])
        rows = (self.num_kv_heads, self.page_size)
        keys_end = rows[0] * rows[1] * self.head_dim * kind.itemsize
        keys = page[:keys_end].view(kind).reshape(*rows, self.head_dim)
        if self.latent:
            scales = np.ndarray(rows, np.float32, page, keys_end) if self.scaled else np.ones(rows)
            return keys, keys[..., : self.value_head_dim], scales, scales
        values_end = keys_end + rows[0] * rows[1] * self.value_head_dim * kind.itemsize
        values = page[keys_end:values_end].view(kind).reshape(*rows, self.value_head_dim)
        if not self.scaled:
            return keys, values, np.ones(rows), np.ones(rows)
        scales_end = values_end + 4 * rows[0] * rows[1]
        # Of any alignment: NumPy reads them all the same.
        key_scales = np.ndarray(rows, np.float32, page, values_end)
        value_scales = np.ndarray(rows, np.float32, page, scales_end)
        return keys, values, key_scales, value_scales


def encode(rows: Array, dtype: str) -> tuple[Array, Array]:
    """Rows [..., width] in a cache's type, and their scales [...]."""
    exact = rows.astype(np.float32)
    if dtype not in ("int8", "fp8"):
        return exact.astype(CACHE_TYPES[dtype]), np.ones(rows.shape[:-1])
    scales = np.abs(exact).max(axis=-1) / np.float32(127 if dtype == "int8" else 448)
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.where(scales[..., None] > 0, exact / scales[..., None], 0)
    return (np.rint(units) if dtype == "int8" else units).astype(CACHE_TYPES[dtype]), scales


@dataclass
class PagedSequence:
    """One sequence of a batch.

    Attributes:
        before: keys that are there already.
        count: new tokens.
        parents: of each new token, among the new ones; -1: what is before. None: a chain.
        keys, values: of all tokens [before + count, Hkv, width]; filled in by the batch.
        pages: offsets in the cache; likewise.
    """

    before: int
    count: int
    parents: Sequence[int] | None = None
    keys: Array = field(default_factory=lambda: np.zeros(0))
    values: Array = field(default_factory=lambda: np.zeros(0))
    pages: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Keys, the new ones included."""
        return self.before + self.count


@dataclass
class PagedBatch:
    """Random queries, keys and values of some sequences, and a cache with what was before.

    Attributes:
        layout: of the pages.
        num_heads: H.
        dtype: of query, new keys and values, NumPy's.
        sequences: filled in here.
        generator: of all numbers.
        scale, softcap, slopes: of the attention.
        sinks: of each head; None: none.
        window: keys before its own that a query sees; -1: all.
        kept_first: keys that it sees in any case.
        causal: or every query sees every key.
        appends: whether the operator stores the new keys, or finds them stored.
        magnitude: queries are so much larger.
        weights_of: sequences whose weights are wanted.
    """

    layout: PageLayout
    num_heads: int
    dtype: Any
    sequences: list[PagedSequence]
    generator: np.random.Generator
    scale: float
    softcap: float = 0.0
    slopes: Array | None = None
    sinks: Array | None = None
    window: int = -1
    kept_first: int = 0
    causal: bool = True
    appends: bool = True
    magnitude: float = 1.0
    weights_of: Sequence[int] = ()

    def __post_init__(self) -> None:
        layout = self.layout
        tokens = sum(s.count for s in self.sequences)
        query = self._normal(tokens, self.num_heads, layout.head_dim)
        self.query = (query * self.magnitude).astype(self.dtype)
        needed = [-(-s.length // layout.page_size) for s in self.sequences]
        # Pages lie anywhere, in any order, with other things between them that must stay.
        places = self.generator.permutation(2 * sum(needed) + 1)
        stride = layout.bytes + 64
        self.cache = self.generator.integers(0, 256, stride * len(places), np.uint8)
        for s, count in zip(self.sequences, needed, strict=True):
            s.pages = [int(place) * stride for place in places[:count]]
            places = places[count:]
            s.keys = self._normal(s.length, layout.num_kv_heads, layout.head_dim)
            s.values = self._normal(s.length, layout.num_kv_heads, layout.value_head_dim)
            if layout.latent:
                s.values = s.keys[..., : layout.value_head_dim]
            self.store(s, 0, s.before if self.appends else s.length)

    def _normal(self, *shape: int) -> Array:
        return self.generator.standard_normal(shape).astype(self.dtype)

    def _page(self, s: PagedSequence, number: int) -> tuple[Array, Array, Array, Array]:
        at = s.pages[number]
        return self.layout.parts(self.cache[at : at + self.layout.bytes])

    def store(self, s: PagedSequence, begin: int, end: int) -> None:
        """Write a sequence's keys and values begin..end into its pages."""
        size = self.layout.page_size
        for number in range(begin // size, -(-end // size)):
            first, last = max(begin, number * size), min(end, (number + 1) * size)
            page = self._page(s, number)
            slots = slice(first - number * size, last - number * size)
            written = [(s.keys, *page[0::2]), (s.values, *page[1::2])]
            for rows, part, scales in written[: 1 if self.layout.latent else 2]:
                elements, scale = encode(rows[first:last], self.layout.dtype)
                part[:, slots] = elements.swapaxes(0, 1)
                if self.layout.scaled:
                    scales[:, slots] = scale.T

    def stored(self, s: PagedSequence) -> tuple[Array, Array]:
        """Keys and values of a sequence as its pages have them, in float64."""
        keys, values = np.zeros(s.keys.shape), np.zeros(s.values.shape)
        for i in range(s.length):
            page = self._page(s, i // self.layout.page_size)
            slot = i % self.layout.page_size
            keys[i] = page[0][:, slot].astype(np.float64) * page[2][:, slot, None]
            values[i] = page[1][:, slot].astype(np.float64) * page[3][:, slot, None]
        return keys, values

    def feeds(self) -> dict[str, Array]:
        """All inputs of the operator but slopes; those that are absent are empty."""
        layout, sequences = self.layout, self.sequences
        parents = [p for s in sequences for p in s.parents or range(-1, s.count - 1)]
        branches = any(s.parents is not None for s in sequences)
        new = [slice(s.before, None) if self.appends else slice(0, 0) for s in sequences]
        of_keys = [s.keys[n] for s, n in zip(sequences, new, strict=True)]
        of_values = [s.values[n] for s, n in zip(sequences, new, strict=True)]
        value = np.concatenate(of_values)
        return {
            "query": self.query,
            "key": np.concatenate(of_keys),
            "value": value[:0] if layout.latent else value,
            "cache": self.cache,
            "starts": np.cumsum([0] + [s.count for s in sequences]),
            "lengths": np.array([s.length for s in sequences], np.int64),
            "table_starts": np.cumsum([0] + [len(s.pages) for s in sequences]),
            "table": np.array([page for s in sequences for page in s.pages], np.int64),
            "spec": np.array(
                [
                    layout.page_size,
                    list(CACHE_TYPES).index(layout.dtype),
                    self.window,
                    self.kept_first,
                    int(self.causal),
                    int(layout.latent),
                    1,
                ]
            ),
            "parents": np.array(parents if branches else [], np.int64),
            "weights_of": np.array(self.weights_of, np.int64),
            "sinks": np.full(self.num_heads, -np.inf, np.float32)
            if self.sinks is None
            else self.sinks,
        }

    def expected(self, *, as_stored: bool) -> dict[str, Array]:
        """Output, log_sum_exp, entropy and weights in float64.

        Args:
            as_stored: from keys and values as the pages have them, not as they were given.
        """
        answers: dict[str, list[Array]] = {name: [] for name in OUTPUTS}
        at = 0
        for index, s in enumerate(self.sequences):
            keys, values = self.stored(s) if as_stored else (s.keys, s.values)
            visible, apart = self._sight(s)
            given = paged_reference(
                self.query[at : at + s.count],
                keys,
                values,
                visible,
                scale=self.scale,
                softcap=self.softcap,
                penalty=None if self.slopes is None else np.abs(apart),
                slopes=self.slopes,
                sinks=self.sinks,
            )
            for name, array in zip(OUTPUTS, given, strict=True):
                if name != "weights":
                    answers[name].append(array)
                elif index in self.weights_of:
                    answers[name].append(array.ravel())
            at += s.count
        return {name: np.concatenate(arrays or [np.zeros(0)]) for name, arrays in answers.items()}

    def positions(self, s: PagedSequence) -> Array:
        """Of all tokens of a sequence [length]: in a tree, one more than the parent's."""
        positions = np.arange(s.length)
        for i, parent in enumerate(s.parents or ()):
            before = s.before - 1 if parent < 0 else positions[s.before + parent]
            positions[s.before + i] = before + 1
        return positions

    def _sight(self, s: PagedSequence) -> tuple[Array, Array]:
        """Which keys each new token sees, and how far they are before it: [count, length]."""
        positions = self.positions(s)
        visible = np.zeros((s.count, s.length), bool)
        for i in range(s.count):
            parent = i - 1 if s.parents is None else s.parents[i]
            if parent >= 0:
                visible[i] = visible[parent]
            else:
                visible[i, : s.before] = True
            visible[i, s.before + i] = True
        apart = positions[s.before :, None] - positions
        if not self.causal:
            visible[:] = True
        elif self.window >= 0:
            visible &= (apart <= self.window) | (positions < self.kept_first)
        return visible, apart
