"""PagedAttention against attention in float64 over a cache that NumPy reads and writes."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import attnserve_kernels
import ml_dtypes
import numpy as np
import onnx.helper
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]

QUERY_TYPES = {"FP32": (np.float32, 1), "FP16": (np.float16, 10), "BF16": (ml_dtypes.bfloat16, 16)}
# In the order of the operator's numbers.
CACHE_TYPES: dict[str, Any] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "fp8": ml_dtypes.float8_e4m3fn,
}
INPUTS = (
    "query", "key", "value", "cache", "starts", "lengths", "table_starts", "table", "spec",
    "parents", "slopes",
)  # fmt: skip
OUTPUTS = ("output", "log_sum_exp", "entropy")

pytestmark = pytest.mark.needs_library


@dataclass(frozen=True)
class Layout:
    """Where things lie in a page, written once more, independently of the operator."""

    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    page_size: int
    dtype: str

    @property
    def numpy(self) -> Any:
        return np.dtype(CACHE_TYPES[self.dtype])

    @property
    def scaled(self) -> bool:
        return self.dtype in ("int8", "fp8")

    @property
    def bytes(self) -> int:
        rows = self.num_kv_heads * self.page_size
        used = rows * (self.head_dim + self.value_head_dim) * self.numpy.itemsize
        return -(-(used + (8 * rows if self.scaled else 0)) // 64) * 64

    def parts(self, page: Array) -> tuple[Array, Array, Array, Array]:
        """Views of keys, values and their scales; scales of 1 where there are none."""
        heads, size = self.num_kv_heads, self.page_size
        keys_end = heads * size * self.head_dim * self.numpy.itemsize
        values_end = keys_end + heads * size * self.value_head_dim * self.numpy.itemsize
        keys = page[:keys_end].view(self.numpy).reshape(heads, size, self.head_dim)
        values = page[keys_end:values_end].view(self.numpy)
        values = values.reshape(heads, size, self.value_head_dim)
        if not self.scaled:
            return keys, values, np.ones((heads, size)), np.ones((heads, size))
        scales_end = values_end + 4 * heads * size
        # Of any alignment: NumPy reads them all the same.
        key_scales = np.ndarray((heads, size), np.float32, page, values_end)
        value_scales = np.ndarray((heads, size), np.float32, page, scales_end)
        return keys, values, key_scales, value_scales


def encode(rows: Array, dtype: str) -> tuple[Array, Array]:
    """Rows [..., D] in a cache's type, and their scales [...]."""
    exact = rows.astype(np.float32)
    if dtype not in ("int8", "fp8"):
        return exact.astype(CACHE_TYPES[dtype]), np.ones(rows.shape[:-1])
    scales = np.abs(exact).max(axis=-1) / np.float32(127 if dtype == "int8" else 448)
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.where(scales[..., None] > 0, exact / scales[..., None], 0)
    return (np.rint(units) if dtype == "int8" else units).astype(CACHE_TYPES[dtype]), scales


@dataclass
class Sequence:
    """One sequence of a batch: keys and values that are there already, and new tokens."""

    keys: Array  # [before, Hkv, D]
    values: Array  # [before, Hkv, Dv]
    count: int
    parents: list[int] | None = None
    pages: list[int] = field(default_factory=list)

    @property
    def before(self) -> int:
        return len(self.keys)

    @property
    def length(self) -> int:
        return self.before + self.count


@dataclass
class Batch:
    """A batch with its cache."""

    layout: Layout
    num_heads: int
    query_dtype: str
    sequences: list[Sequence]
    generator: np.random.Generator
    window: int = -1
    kept_first: int = 0
    causal: bool = True
    slopes: Array | None = None
    softcap: float = 0.0
    appends: bool = True
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        layout, size = self.layout, self.layout.page_size
        tokens = sum(s.count for s in self.sequences)
        self.query = self.normal(tokens, self.num_heads, layout.head_dim) * self.magnitude
        self.query = self.query.astype(QUERY_TYPES[self.query_dtype][0])
        self.key = self.normal(tokens, layout.num_kv_heads, layout.head_dim)
        self.value = self.normal(tokens, layout.num_kv_heads, layout.value_head_dim)
        needed = [-(-s.length // size) for s in self.sequences]
        # Pages lie anywhere, in any order, with other things between them that must stay.
        places = self.generator.permutation(2 * sum(needed) + 1)
        stride = layout.bytes + 64
        memory = self.generator.integers(0, 256, stride * len(places) + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self.cache = memory[start : start + stride * len(places)]
        for s, count in zip(self.sequences, needed, strict=True):
            s.pages = [int(place) * stride for place in places[:count]]
            places = places[count:]
            self.store(s, 0, s.keys, s.values)
        if not self.appends:
            at = 0
            for s in self.sequences:
                self.store(s, s.before, self.key[at : at + s.count], self.value[at : at + s.count])
                at += s.count

    def normal(self, *shape: int) -> Array:
        return self.generator.standard_normal(shape).astype(QUERY_TYPES[self.query_dtype][0])

    def page(self, s: Sequence, number: int) -> tuple[Array, Array, Array, Array]:
        at = s.pages[number]
        return self.layout.parts(self.cache[at : at + self.layout.bytes])

    def store(self, s: Sequence, start: int, keys: Array, values: Array) -> None:
        for i, (key, value) in enumerate(zip(keys, values, strict=True), start):
            stored = self.page(s, i // self.layout.page_size)
            slot = i % self.layout.page_size
            for rows, part, scales in ((key, *stored[0::2]), (value, *stored[1::2])):
                part[:, slot], scale = encode(rows, self.layout.dtype)
                if self.layout.scaled:
                    scales[:, slot] = scale

    def load(self, s: Sequence) -> tuple[Array, Array]:
        """Keys and values of a sequence as its pages have them, [length, Hkv, D or Dv]."""
        keys, values = [], []
        for i in range(s.length):
            stored = self.page(s, i // self.layout.page_size)
            slot = i % self.layout.page_size
            keys.append(stored[0][:, slot].astype(np.float64) * stored[2][:, slot, None])
            values.append(stored[1][:, slot].astype(np.float64) * stored[3][:, slot, None])
        shape = (s.length, self.layout.num_kv_heads, -1)
        if not s.length:
            return (np.zeros((0, self.layout.num_kv_heads, width)) for width in self.widths)
        return np.array(keys).reshape(shape), np.array(values).reshape(shape)

    @property
    def widths(self) -> tuple[int, int]:
        return self.layout.head_dim, self.layout.value_head_dim

    def feeds(self) -> dict[str, Array]:
        layout = self.layout
        feeds = {
            "query": self.query,
            "cache": self.cache,
            "starts": np.cumsum([0] + [s.count for s in self.sequences]),
            "lengths": np.array([s.length for s in self.sequences], np.int64),
            "table_starts": np.cumsum([0] + [len(s.pages) for s in self.sequences]),
            "table": np.array([page for s in self.sequences for page in s.pages], np.int64),
            "spec": np.array(
                [
                    layout.page_size,
                    list(CACHE_TYPES).index(layout.dtype),
                    self.window,
                    self.kept_first,
                    int(self.causal),
                ]
            ),
        }
        if self.appends:
            feeds |= {"key": self.key, "value": self.value}
        if any(s.parents is not None for s in self.sequences):
            feeds["parents"] = np.array(
                [p for s in self.sequences for p in s.parents or range(-1, s.count - 1)], np.int64
            )
        if self.slopes is not None:
            feeds["slopes"] = self.slopes
        return feeds

    def run(self, feeds: dict[str, Array] | None = None) -> dict[str, Array]:
        feeds = self.feeds() if feeds is None else feeds
        layout = self.layout
        attributes = (
            ("num_kv_heads", layout.num_kv_heads),
            ("head_dim", layout.head_dim),
            ("value_head_dim", layout.value_head_dim),
            ("scale", layout.head_dim**-0.5),
            ("softcap", self.softcap),
        )
        return run(self.query_dtype, feeds, layout.value_head_dim, attributes)

    def expected(self) -> dict[str, Array]:
        """What the operator should give for the cache as it is now."""
        answers: dict[str, list[Array]] = {name: [] for name in OUTPUTS}
        at = 0
        for s in self.sequences:
            keys, values = self.load(s)
            query = self.query[at : at + s.count].astype(np.float64)
            for name, array in zip(OUTPUTS, self.attend(s, query, keys, values), strict=True):
                answers[name].append(array)
            at += s.count
        return {name: np.concatenate(arrays) for name, arrays in answers.items()}

    def attend(
        self, s: Sequence, query: Array, keys: Array, values: Array
    ) -> tuple[Array, Array, Array]:
        group = self.num_heads // self.layout.num_kv_heads
        positions = np.arange(s.length)
        visible = np.zeros((s.count, s.length), bool)
        for i in range(s.count):
            parent = i - 1 if s.parents is None else s.parents[i]
            if parent >= 0:
                visible[i] = visible[parent]
                positions[s.before + i] = positions[s.before + parent] + 1
            else:
                visible[i, : s.before] = True
                positions[s.before + i] = s.before
            visible[i, s.before + i] = True
        own = positions[s.before :, None]
        apart = own - positions
        if not self.causal:
            visible[:] = True
        elif self.window >= 0:
            visible &= (apart <= self.window) | (positions < self.kept_first)
        scores = np.einsum("qhd,khd->hqk", query, np.repeat(keys, group, axis=1))
        scores *= self.layout.head_dim**-0.5
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        if self.slopes is not None:
            scores -= self.slopes[:, None, None].astype(np.float64) * np.abs(apart)
        scores = np.where(visible, scores, -np.inf)
        if not s.length:
            none = np.zeros((s.count, self.num_heads))
            return np.zeros((*none.shape, self.layout.value_head_dim)), none - np.inf, none
        highest = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        weights /= total
        output = np.einsum("hqk,khd->qhd", weights, np.repeat(values, group, axis=1))
        logs = np.log(np.where(weights > 0, weights, 1))
        return output, (highest + np.log(total))[..., 0].T, -(weights * logs).sum(axis=-1).T

    def tolerance(self, keys: int) -> float:
        """Of FP32: rounding errors of sums, relative to the largest score."""
        score = 8.0 * self.magnitude
        if self.slopes is not None:
            score += float(self.slopes.max()) * keys
        return 2e-6 * max(1.0, keys) ** 0.5 * max(1.0, score / 8)


@cache
def session(query_dtype: str, present: frozenset[str], attributes: tuple) -> Any:
    """One node with some of its optional inputs."""

    def value(name: str) -> Any:
        kind = {"query": 0, "key": 0, "value": 0, "output": 0, "cache": 2}.get(name, 7)
        kind = 1 if name in ("slopes", "log_sum_exp", "entropy") else kind
        rank = {"query": 3, "key": 3, "value": 3, "output": 3, "log_sum_exp": 2, "entropy": 2}
        return onnx.helper.make_tensor_value_info(
            name, kind or QUERY_TYPES[query_dtype][1], [None] * rank.get(name, 1)
        )

    names = [name if name in present else "" for name in INPUTS]
    outputs = [name for name in OUTPUTS if name != "entropy" or "entropy" in present]
    node = onnx.helper.make_node(
        "PagedAttention", names, outputs, domain="attnserve", **dict(attributes)
    )
    graph = onnx.helper.make_graph(
        [node], "one", [value(n) for n in names if n], [value(n) for n in outputs]
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("attnserve", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(attnserve_kernels.library_path()))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(
    query_dtype: str,
    feeds: dict[str, Array],
    width: int,
    attributes: tuple,
    *,
    entropy: bool = True,
) -> dict[str, Array]:
    """Run the operator, which writes into `feeds["cache"]`."""
    present = frozenset(feeds) | ({"entropy"} if entropy else frozenset())
    opened = session(query_dtype, present, attributes)
    binding = opened.io_binding()
    kinds = {np.dtype(dtype): kind for dtype, kind in QUERY_TYPES.values()}
    feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    for name, array in feeds.items():
        kind = kinds.get(array.dtype, array.dtype)
        binding.bind_input(name, "cpu", 0, kind, list(array.shape), array.ctypes.data)
    rows = feeds["query"].shape[:2]
    dtype, kind = QUERY_TYPES[query_dtype]
    answers = {
        "output": np.empty((*rows, width), dtype),
        "log_sum_exp": np.empty(rows, np.float32),
        "entropy": np.empty(rows, np.float32),
    }
    for entry in opened.get_outputs():
        array = answers[entry.name]
        given = kind if entry.name == "output" else np.float32
        binding.bind_output(entry.name, "cpu", 0, given, list(array.shape), array.ctypes.data)
    opened.run_with_iobinding(binding)
    return answers


def check(batch: Batch, answers: dict[str, Array]) -> None:
    expected = batch.expected()
    tolerance = batch.tolerance(max((s.length for s in batch.sequences), default=0))
    by_dtype = {"FP32": tolerance, "FP16": max(2e-3, tolerance), "BF16": max(1.6e-2, tolerance)}
    output = answers["output"].astype(np.float64)
    # Values are of about unit size, a few are larger: BF16 and FP16 round relative to them.
    scale = np.maximum(1, np.abs(expected["output"]) / 2)
    assert output.shape == expected["output"].shape
    error = np.abs(output - expected["output"]) / scale
    assert not error.size or error.max() <= by_dtype[batch.query_dtype]
    for name in ("log_sum_exp", "entropy"):
        np.testing.assert_allclose(answers[name], expected[name], atol=10 * tolerance, rtol=1e-6)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Sizes on both sides of every boundary: pages, 128 keys, 512 keys, 12 and 192 rows."""
    layout = Layout(
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 3, 8, 16, 31, 64, 80])),
        draw(st.sampled_from([1, 5, 8, 33, 64, 144])),
        draw(st.sampled_from([1, 3, 8, 16, 16, 16, 40])),
        draw(st.sampled_from(list(CACHE_TYPES))),
    )
    group = draw(st.sampled_from([1, 1, 2, 3, 4, 7]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    causal = draw(st.sampled_from([True, True, True, False]))
    before = st.integers(0, 40) | st.sampled_from([0, 15, 16, 17, 127, 128, 129, 511, 513, 700])
    count = st.sampled_from([0, 1, 1, 1, 1, 2, 3]) | st.integers(1, 40) | st.just(200)
    trees = causal and draw(st.booleans())
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        old, new = draw(before), draw(count)
        parents = None
        if trees and draw(st.booleans()):
            parents = [int(generator.integers(-1, i)) for i in range(new)]
        sequences.append(
            Sequence(
                generator.standard_normal((old, layout.num_kv_heads, layout.head_dim)),
                generator.standard_normal((old, layout.num_kv_heads, layout.value_head_dim)),
                new,
                parents,
            )
        )
    heads = layout.num_kv_heads * group
    windowed = causal and draw(st.booleans())
    return Batch(
        layout,
        heads,
        draw(st.sampled_from(list(QUERY_TYPES))),
        sequences,
        generator,
        window=draw(st.integers(0, 20) | st.sampled_from([127, 300])) if windowed else -1,
        kept_first=draw(st.sampled_from([0, 0, 1, 4, 20])),
        causal=causal,
        slopes=generator.random(heads).astype(np.float32) if draw(st.booleans()) else None,
        softcap=draw(st.sampled_from([0.0, 0.0, 2.5, 30.0])),
        appends=draw(st.sampled_from([True, True, False])),
    )


@settings(deadline=None, max_examples=200)
@given(batch=batches())
def test_any_batch_is_within_tolerance(batch: Batch) -> None:
    check(batch, batch.run())


@settings(deadline=None, max_examples=100)
@given(batch=batches())
def test_any_new_keys_are_stored_and_nothing_else_is_touched(batch: Batch) -> None:
    wanted = batch.cache.copy()
    batch.run()
    if batch.appends:
        stored, batch.cache = batch.cache, wanted
        at = 0
        for s in batch.sequences:
            new = slice(at, at + s.count)
            batch.store(s, s.before, batch.key[new], batch.value[new])
            at += s.count
        batch.cache = stored
    np.testing.assert_array_equal(batch.cache, wanted)
