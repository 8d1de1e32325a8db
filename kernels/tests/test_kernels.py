"""The operators against the float64 reference: every mask, dtype and instruction set."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import attnserve_kernels
import ml_dtypes
import numpy as np
import onnx.helper
import onnxruntime
import pytest
import torch
from attnserve_export.reference import (
    Scheme,
    attention_reference,
    attention_with_log_sum_exp,
    diagnostics_reference,
    packed_reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

# Of the examples that are drawn, one in so many is.
SHARE = int(os.environ.get("ATTNSERVE_TEST_SHARE", "1"))

TYPES = {"FP32": (np.float32, 1), "FP16": (np.float16, 10), "BF16": (ml_dtypes.bfloat16, 16)}
INPUTS = {
    "Attention": (
        "query", "key", "value", "key_lengths", "bias", "slopes", "softcap", "mask",
        "prefix_lengths", "query_starts", "key_starts", "sinks",
    ),
    "AttentionDiagnostics": (
        "query", "key", "key_lengths", "top_k", "distances", "bias", "slopes", "softcap", "mask",
        "prefix_lengths", "query_starts", "key_starts", "sinks",
    ),
}  # fmt: skip
OUTPUTS = {
    "Attention": ("output", "log_sum_exp"),
    "AttentionDiagnostics": (
        "entropy", "mass_per_key", "mass_by_distance", "top_k_indices", "top_k_weights",
    ),
}  # fmt: skip
INTEGERS = (
    "key_lengths", "prefix_lengths", "query_starts", "key_starts", "top_k", "distances",
    "top_k_indices",
)  # fmt: skip
RANKS = dict.fromkeys((*INTEGERS[:-1], "slopes", "softcap", "sinks"), 1) | {"log_sum_exp": 3}


@cache
def session(operator: str, dtype: str, present: frozenset, attributes: tuple, outputs: tuple = ()):
    """One node of an operator, with some of its optional inputs."""
    outputs = outputs or OUTPUTS[operator]
    exact = (
        "entropy", "mass_per_key", "mass_by_distance", "top_k_weights", "slopes", "softcap",
        "sinks", "log_sum_exp",
    )  # fmt: skip

    def value(name: str):
        kind = 7 if name in INTEGERS else 1 if name in exact else TYPES[dtype][1]
        kind = 9 if name == "mask" else kind
        return onnx.helper.make_tensor_value_info(name, kind, [None] * RANKS.get(name, 4))

    names = [name if name in present else "" for name in INPUTS[operator]]
    while not names[-1]:
        names.pop()
    node = onnx.helper.make_node(operator, names, outputs, domain="attnserve", **dict(attributes))
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


def run(operator: str, dtype: str, feeds: dict, shape: tuple, **attributes):
    defaults = {"scale": 1.0, "softcap": 0.0, "left": -1, "right": -1, "bottom_right": 0}
    present = frozenset(feeds)
    opened = session(operator, dtype, present, tuple(sorted({**defaults, **attributes}.items())))
    if dtype != "BF16":
        return opened.run(None, feeds)
    binding = opened.io_binding()
    for name, array in feeds.items():
        if array.dtype == ml_dtypes.bfloat16:
            bits = np.ascontiguousarray(array).view(np.uint16)
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
            binding.bind_ortvalue_input(name, value)
        else:
            binding.bind_cpu_input(name, array)
    if operator != "Attention":
        for name in OUTPUTS[operator]:
            binding.bind_output(name, "cpu")
        opened.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()
    output = np.empty(shape, ml_dtypes.bfloat16)
    binding.bind_output("output", "cpu", 0, 16, list(shape), output.ctypes.data)
    binding.bind_output("log_sum_exp", "cpu")
    opened.run_with_iobinding(binding)
    return [output, binding.get_outputs()[1].numpy()]


@st.composite
def problems(draw: st.DrawFn) -> dict:
    """Sizes on both sides of every tile's: 16 and 48 rows, 128 keys, 192 queries of a task."""
    edges = st.sampled_from([47, 48, 49, 127, 128, 129, 191, 193, 260])
    length = st.sampled_from([1, 1, 2, 3]) | st.integers(1, 20) | edges
    some = st.none() | st.integers(0, 40)
    return {
        "dtype": draw(st.sampled_from(list(TYPES))),
        "batch": draw(st.integers(1, 3)),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.sampled_from([1, 1, 2, 3, 5])),
        "sq": draw(length),
        "sk": draw(length),
        "d": draw(st.sampled_from([1, 3, 8, 16, 31, 64, 80])),
        "dv": draw(st.sampled_from([1, 5, 8, 33, 64])),
        "left": draw(some),
        "right": draw(some),
        "bottom_right": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 0.0, 2.5, 30.0])),
        "slopes": draw(st.booleans()),
        "bias": draw(st.none() | st.sets(st.sampled_from("bhqk"))),
        "mask": draw(st.none() | st.sets(st.sampled_from("bhqk"))),
        "prefix": draw(st.booleans()),
        "chunk": draw(st.none() | st.integers(1, 60)),
        "sinks": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def prepare(p: dict) -> tuple[dict, dict, Scheme, float]:
    generator = np.random.default_rng(p["seed"])
    dtype = TYPES[p["dtype"]][0]
    heads = p["kv_heads"] * p["group"]

    def normal(*shape: int):
        return generator.standard_normal(shape).astype(dtype)

    feeds = {
        "query": normal(p["batch"], heads, p["sq"], p["d"]),
        "key": normal(p["batch"], p["kv_heads"], p["sk"], p["d"]),
        "value": normal(p["batch"], p["kv_heads"], p["sk"], p["dv"]),
        "key_lengths": generator.integers(0, p["sk"] + 1, p["batch"]),
    }
    if p["bias"] is not None:
        full = {"b": p["batch"], "h": heads, "q": p["sq"], "k": p["sk"]}
        shape = tuple(size if axis in p["bias"] else 1 for axis, size in full.items())
        feeds["bias"] = normal(*shape)
        feeds["bias"][generator.random(shape) < 0.2] = -np.inf
    if p["mask"] is not None:
        full = {"b": p["batch"], "h": heads, "q": p["sq"], "k": p["sk"]}
        shape = tuple(size if axis in p["mask"] else 1 for axis, size in full.items())
        # Some rows see all, some nothing, and some blocks of keys nobody.
        feeds["mask"] = (
            generator.random(shape) < generator.choice([0, 0.5, 1], shape[:3])[..., None]
        )
        feeds["mask"][..., 128:256] &= generator.random() < 0.5
    if p["prefix"]:
        feeds["prefix_lengths"] = generator.integers(0, p["sk"] + 1, p["batch"])
    slopes = None
    if p["slopes"]:
        slopes = generator.random(heads).astype(np.float32)
        feeds["slopes"] = slopes
    if p["sinks"]:
        feeds["sinks"] = (3 * generator.standard_normal(heads)).astype(np.float32)
        feeds["sinks"][generator.random(heads) < 0.3] = -np.inf
    if p["softcap"] is not None:
        feeds["softcap"] = np.array([p["softcap"]], np.float32)
    attributes = {
        "scale": p["d"] ** -0.5,
        "left": -1 if p["left"] is None else p["left"],
        "right": -1 if p["right"] is None else p["right"],
        "bottom_right": int(p["bottom_right"]),
        "chunk": p["chunk"] or 0,
    }
    scheme = Scheme(p["left"], p["right"], p["bottom_right"], slopes, chunk=p["chunk"])
    return feeds, attributes, scheme, p["softcap"] or 0.0


def reference(feeds: dict, scheme: Scheme, scale: float, softcap: float):
    return attention_with_log_sum_exp(
        feeds["query"], feeds["key"], feeds["value"], key_lengths=feeds["key_lengths"],
        bias=feeds.get("bias"), mask=feeds.get("mask"), prefix_lengths=feeds.get("prefix_lengths"),
        sinks=feeds.get("sinks"), scheme=scheme, scale=scale, softcap=softcap,
    )  # fmt: skip


def starts(generator: np.random.Generator, count: int, tokens: int) -> np.ndarray:
    """Where `count` sequences of `tokens` tokens begin, and the last one ends; some are empty."""
    return np.concatenate([[0], np.sort(generator.integers(0, tokens + 1, count - 1)), [tokens]])


def pack(feeds: dict, p: dict, count: int, *, cross: bool) -> None:
    """Make one row of a problem so many sequences."""
    generator = np.random.default_rng(p["seed"])
    for name in ("query", "key", "value", "bias", "mask"):
        if name in feeds:
            feeds[name] = feeds[name][:1]
    del feeds["key_lengths"]
    if not cross:
        feeds["key"], feeds["value"] = feeds["key"][:, :, :1], feeds["value"][:, :, :1]
        for name in ("key", "value"):
            feeds[name] = np.repeat(feeds[name], p["sq"], axis=2)
            noise = generator.standard_normal(feeds[name].shape)
            feeds[name] = (feeds[name] + noise).astype(feeds[name].dtype)
        for name in ("bias", "mask"):
            if name in feeds and feeds[name].shape[3] > 1:
                feeds[name] = np.resize(feeds[name], (*feeds[name].shape[:3], p["sq"]))
    feeds["query_starts"] = starts(generator, count, p["sq"])
    if cross:
        feeds["key_starts"] = starts(generator, count, p["sk"])
    if "prefix_lengths" in feeds:
        feeds["prefix_lengths"] = generator.integers(0, p["sk"] + 1, count)


def packed(feeds: dict, scheme: Scheme, scale: float, softcap: float):
    return packed_reference(
        feeds["query"], feeds["key"], feeds["value"], feeds["query_starts"],
        feeds.get("key_starts", feeds["query_starts"]),
        bias=feeds.get("bias"), mask=feeds.get("mask"), prefix_lengths=feeds.get("prefix_lengths"),
        sinks=feeds.get("sinks"), scheme=scheme, scale=scale, softcap=softcap,
    )  # fmt: skip


def growth(p: dict, scheme: Scheme) -> float:
    """How much larger than 8 scores get by ALiBi: FP32 rounds them relative to their size."""
    if scheme.slopes is None:
        return 1.0
    return max(1.0, max(p["sq"], p["sk"]) * float(np.max(scheme.slopes)) / 8)


@settings(deadline=None, max_examples=150 // SHARE)
@given(p=problems())
@pytest.mark.needs_library
def test_any_attention_is_within_tolerance(p: dict) -> None:
    feeds, attributes, scheme, softcap = prepare(p)
    expected, _, rows = reference(feeds, scheme, attributes["scale"], softcap)
    output, log_sum_exp = run("Attention", p["dtype"], feeds, expected.shape, **attributes)
    exact = 2e-6 * np.sqrt(p["sk"]) * growth(p, scheme)
    tolerance = {"FP32": exact, "FP16": max(2e-3, exact), "BF16": 1.6e-2}[p["dtype"]]
    assert output.dtype == TYPES[p["dtype"]][0]
    np.testing.assert_allclose(output.astype(np.float64), expected, atol=tolerance, rtol=0)
    np.testing.assert_allclose(log_sum_exp, rows, atol=2 * exact, rtol=1e-6)


@settings(deadline=None, max_examples=100 // SHARE)
@given(p=problems(), count=st.integers(1, 9), cross=st.booleans())
@pytest.mark.needs_library
def test_any_packed_attention_is_within_tolerance(p: dict, count: int, cross: bool) -> None:
    feeds, attributes, scheme, softcap = prepare(p)
    pack(feeds, p, count, cross=cross)
    expected, _, rows = packed(feeds, scheme, attributes["scale"], softcap)
    output, log_sum_exp = run("Attention", p["dtype"], feeds, expected.shape, **attributes)
    exact = 2e-6 * np.sqrt(p["sk"]) * growth(p, scheme)
    tolerance = {"FP32": exact, "FP16": max(2e-3, exact), "BF16": 1.6e-2}[p["dtype"]]
    np.testing.assert_allclose(output.astype(np.float64), expected, atol=tolerance, rtol=0)
    np.testing.assert_allclose(log_sum_exp, rows, atol=2 * exact, rtol=1e-6)


@settings(deadline=None, max_examples=60 // SHARE)
@given(p=problems(), count=st.integers(1, 9), cross=st.booleans())
@pytest.mark.needs_library
def test_any_packed_diagnosis_says_what_its_sequences_do(p: dict, count: int, cross: bool) -> None:
    feeds, attributes, scheme, softcap = prepare(p)
    pack(feeds, p, count, cross=cross)
    _, weights, _ = packed(feeds, scheme, attributes["scale"], softcap)
    del feeds["value"]
    top_k, distances = min(3, weights.shape[3]), 6
    feeds |= {"top_k": np.array([top_k]), "distances": np.array([distances])}
    answers = run("AttentionDiagnostics", p["dtype"], feeds, (), **attributes)
    entropy, per_key, by_distance, indices, heaviest = answers
    tolerance = 1e-5 * np.sqrt(max(p["sq"], p["sk"])) * growth(p, scheme)
    logs = np.log(np.where(weights > 0, weights, 1))
    np.testing.assert_allclose(entropy, -(weights * logs).sum(axis=-1), atol=tolerance, rtol=0)
    np.testing.assert_allclose(per_key, weights.sum(axis=2), atol=tolerance, rtol=1e-5)
    picked = np.take_along_axis(weights, indices, -1)
    np.testing.assert_allclose(picked, heaviest, atol=tolerance, rtol=0)
    expected = -np.sort(-weights, axis=-1)[..., :top_k]
    np.testing.assert_allclose(heaviest, expected, atol=tolerance, rtol=0)
    queries, keys = feeds["query_starts"], feeds.get("key_starts", feeds["query_starts"])
    for n in range(count):
        own = weights[:, :, slice(*queries[n : n + 2]), slice(*keys[n : n + 2])]
        if own.size == 0:
            assert (by_distance[n] == 0).all()
            continue
        said = diagnostics_reference(
            own, [own.shape[3]], bottom_right=p["bottom_right"], top_k=1, distances=distances
        )["mass_by_distance"]
        np.testing.assert_allclose(by_distance[n], said[0], atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_starts": [0, 5, 3, 9]}, "query_starts: must rise from 0 to 9"),
        ({"query_starts": [1, 9]}, "query_starts: must rise from 0 to 9"),
        ({"query_starts": [0, 8]}, "query_starts: must rise from 0 to 9"),
        ({"query_starts": [-1, 9]}, "query_starts: must rise from 0 to 9"),
        ({"query_starts": [0]}, "query_starts: must rise from 0 to 9"),
        ({"key_starts": [0, 4, 9]}, "key_starts: its shape"),
        ({"prefix_lengths": [1, 2]}, "prefix_lengths: its shape"),
        ({"batch": 2}, "query: packed sequences lie in a batch of 1"),
    ],
)
@pytest.mark.needs_library
def test_wrong_starts_are_refused(changes: dict, message: str) -> None:
    rows = np.ones((changes.pop("batch", 1), 2, 9, 8), np.float32)
    feeds = {"query": rows, "key": rows, "value": rows, "query_starts": np.array([0, 9])}
    feeds |= {name: np.array(given) for name, given in changes.items()}
    with pytest.raises(Exception, match=message):
        run("Attention", "FP32", feeds, ())


@settings(deadline=None, max_examples=40 // SHARE)
@given(p=problems())
@pytest.mark.needs_library
def test_any_mask_is_what_pytorch_takes_as_a_boolean_one(p: dict) -> None:
    p |= {"dtype": "FP32", "bias": None, "slopes": False, "softcap": None, "sinks": False}
    feeds, attributes, _, _ = prepare(p)
    if p["bottom_right"]:
        feeds["key_lengths"][:] = p["sk"]
    query, key = np.arange(p["sq"])[:, None], np.arange(p["sk"])
    query = query + (p["sk"] - p["sq"] if p["bottom_right"] else 0)
    visible = np.ones((p["batch"], p["kv_heads"] * p["group"], p["sq"], p["sk"]), bool)
    if p["left"] is not None:
        visible &= key >= query - p["left"]
    if p["right"] is not None:
        visible &= key <= query + p["right"]
    if p["chunk"] is not None:
        visible &= key // p["chunk"] == query // p["chunk"]
    if p["prefix"]:
        visible |= key < feeds["prefix_lengths"][:, None, None, None]
    visible &= key < feeds["key_lengths"][:, None, None, None]
    visible &= feeds.get("mask", True)
    q, k, v = (torch.from_numpy(feeds[name]).double() for name in ("query", "key", "value"))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, torch.from_numpy(visible), scale=attributes["scale"], enable_gqa=True
    )
    some = torch.from_numpy(visible.any(axis=-1, keepdims=True))
    expected = torch.where(some, expected, 0).numpy()
    output, _ = run("Attention", "FP32", feeds, expected.shape, **attributes)
    np.testing.assert_allclose(output, expected, atol=2e-6 * np.sqrt(p["sk"]), rtol=0)


@settings(deadline=None, max_examples=40 // SHARE)
@given(p=problems(), highest=st.sampled_from([0.0, -100.0, 100.0]))
@pytest.mark.needs_library
def test_any_sink_is_one_more_key_without_a_value(p: dict, highest: float) -> None:
    """By PyTorch, in float64; sinks far from the scores too."""
    p |= {"dtype": "FP32", "bias": None, "slopes": False, "softcap": None, "mask": None}
    p |= {"prefix": False, "chunk": None, "left": None, "right": None, "sinks": True}
    feeds, attributes, _, _ = prepare(p)
    feeds["sinks"] += np.float32(highest)
    q, k, v = (torch.from_numpy(feeds[name]).double() for name in ("query", "key", "value"))
    k, v = (heads.repeat_interleave(p["group"], 1) for heads in (k, v))
    scores = attributes["scale"] * q @ k.transpose(2, 3)
    padded = np.arange(p["sk"]) >= feeds["key_lengths"][:, None, None, None]
    scores = scores.masked_fill(torch.from_numpy(padded), -torch.inf)
    sinks = torch.from_numpy(feeds["sinks"]).double()[None, :, None, None]
    scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))[..., :-1]
    output, log_sum_exp = run("Attention", "FP32", feeds, (), **attributes)
    tolerance = 2e-6 * np.sqrt(p["sk"])
    np.testing.assert_allclose(output, (weights @ v).numpy(), atol=tolerance, rtol=0)
    rows = torch.logsumexp(scores, dim=-1).numpy()
    np.testing.assert_allclose(log_sum_exp, rows, atol=2 * tolerance, rtol=1e-6)
    del feeds["value"]
    feeds |= {"top_k": np.array([1]), "distances": np.array([3])}
    entropy, per_key, by_distance, _, heaviest = run(
        "AttentionDiagnostics", "FP32", feeds, (), **attributes
    )
    tolerance = 1e-5 * np.sqrt(max(p["sk"], p["sq"]))
    np.testing.assert_allclose(
        entropy, torch.special.entr(weights).sum(-1).numpy(), atol=tolerance, rtol=0
    )
    np.testing.assert_allclose(per_key, weights.sum(2).numpy(), atol=tolerance, rtol=1e-5)
    seen = weights.sum((2, 3)).numpy()
    np.testing.assert_allclose(by_distance.sum(-1), seen, atol=tolerance, rtol=1e-5)
    np.testing.assert_allclose(heaviest[..., 0], weights.amax(-1).numpy(), atol=tolerance)


@pytest.mark.needs_library
def test_what_is_returned_besides_never_changes_the_output() -> None:
    generator = np.random.default_rng(7)
    for length in (1, 20, 200):
        shape = (1, 2, length, 16)
        rows = {n: generator.standard_normal(shape).astype(np.float32) for n in ("query", "key")}
        feeds = rows | {"value": rows["key"], "key_lengths": np.array([length])}
        attributes = {"scale": 1.0, "softcap": 0.0, "left": -1, "right": 0, "bottom_right": 0}
        both, _ = run("Attention", "FP32", feeds, shape, **attributes)
        # As graphs have it that were exported earlier.
        names, attributes = frozenset(feeds), tuple(sorted(attributes.items()))
        alone = session("Attention", "FP32", names, attributes, ("output",))
        np.testing.assert_array_equal(alone.run(None, feeds)[0], both)
        without = feeds | {"sinks": np.full(2, -np.inf, np.float32)}
        np.testing.assert_array_equal(
            run("Attention", "FP32", without, shape, **dict(attributes))[0], both
        )


@settings(deadline=None, max_examples=100 // SHARE)
@given(p=problems(), data=st.data())
@pytest.mark.needs_library
def test_any_diagnosis_is_within_tolerance(p: dict, data: st.DataObject) -> None:
    feeds, attributes, scheme, softcap = prepare(p)
    _, weights, _ = reference(feeds, scheme, attributes["scale"], softcap)
    del feeds["value"]
    top_k = data.draw(st.integers(0, min(p["sk"], 7)))
    distances = data.draw(st.integers(0, 12))
    feeds |= {"top_k": np.array([top_k]), "distances": np.array([distances])}
    answers = run("AttentionDiagnostics", p["dtype"], feeds, (), **attributes)
    said = dict(zip(OUTPUTS["AttentionDiagnostics"], answers, strict=True))
    expected = diagnostics_reference(
        weights,
        feeds["key_lengths"],
        bottom_right=p["bottom_right"],
        top_k=top_k,
        distances=distances,
    )
    tolerance = 1e-5 * np.sqrt(p["sk"]) * growth(p, scheme)
    for name in ("entropy", "top_k_weights"):
        np.testing.assert_allclose(said[name], expected[name], atol=tolerance, rtol=0)
    for name in ("mass_per_key", "mass_by_distance"):
        np.testing.assert_allclose(said[name], expected[name], atol=tolerance, rtol=1e-5)
    picked = np.take_along_axis(weights, said["top_k_indices"], -1)
    np.testing.assert_allclose(picked, expected["top_k_weights"], atol=tolerance, rtol=0)
    ordered = np.sort(said["top_k_indices"], axis=-1)
    assert (np.diff(ordered, axis=-1) > 0).all(), "a key is named twice"


@pytest.mark.needs_library
def test_large_scores_keep_their_softmax() -> None:
    generator = np.random.default_rng(1)
    q, k, v = (generator.standard_normal((1, 2, 50, 16)).astype(np.float32) for _ in range(3))
    q *= 200
    feeds = {"query": q, "key": k, "value": v, "key_lengths": np.array([50])}
    expected, _ = attention_reference(q, k, v, scale=1.0)
    output, _ = run("Attention", "FP32", feeds, expected.shape, scale=1.0)
    largest = np.abs(q @ k.swapaxes(2, 3)).max()
    np.testing.assert_allclose(output, expected, atol=2e-6 * 50**0.5 * largest / 8)


@pytest.mark.needs_library
def test_a_bias_of_the_lowest_number_is_no_mask() -> None:
    """torch.finfo(...).min as a mask, as transformers has it: a row of them weighs all alike."""
    generator = np.random.default_rng(2)
    q, k, v = (generator.standard_normal((1, 1, 5, 8)).astype(np.float32) for _ in range(3))
    bias = np.full((1, 1, 5, 5), np.finfo(np.float32).min, np.float32)
    bias[:, :, 1:, 0] = 0
    feeds = {"query": q, "key": k, "value": v, "key_lengths": np.array([5]), "bias": bias}
    output, _ = run("Attention", "FP32", feeds, q.shape)
    np.testing.assert_allclose(output[0, 0, 0], v[0, 0].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(output[0, 0, 1:], np.repeat(v[0, 0, :1], 4, axis=0), atol=1e-6)


@pytest.mark.needs_library
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", [1, 20, 150])
def test_no_number_stays_no_number_where_it_is_seen(dtype: str, length: int) -> None:
    generator = np.random.default_rng(3)
    shape = (1, 2, length, 8)
    q, k, v = (generator.standard_normal(shape).astype(TYPES[dtype][0]) for _ in range(3))
    lengths, last = np.array([length]), length - 1
    for name, wrong in (("query", q), ("key", k)):
        spoilt = wrong.copy()
        spoilt[0, 0, last, 3] = np.nan
        feeds = {"query": q, "key": k, "value": v, "key_lengths": lengths} | {name: spoilt}
        output, _ = run("Attention", dtype, feeds, shape, scale=1.0, right=0)
        # The last query alone sees the last key, and the other head has neither.
        assert np.isnan(output[0, 0, last].astype(np.float32)).all()
        assert np.isfinite(output[0, 0, :last].astype(np.float32)).all()
        assert np.isfinite(output[0, 1].astype(np.float32)).all()
        diagnosed = {n: a for n, a in feeds.items() if n != "value"}
        diagnosed |= {"top_k": np.array([1]), "distances": np.array([2])}
        entropy, per_key, *_ = run("AttentionDiagnostics", dtype, diagnosed, (), scale=1.0, right=0)
        assert np.isnan(entropy[0, 0, last])
        assert np.isfinite(entropy[0, 0, :last]).all()
        assert np.isnan(per_key[0, 0]).any()
        assert np.isfinite(per_key[0, 1]).all()


@pytest.mark.needs_library
def test_a_softcap_too_small_to_invert() -> None:
    q = np.zeros((1, 1, 4, 8), np.float32)
    v = np.random.default_rng(4).standard_normal(q.shape).astype(np.float32)
    feeds = {"query": q, "key": q, "value": v, "key_lengths": np.array([4])}
    output, _ = run("Attention", "FP32", feeds, q.shape, softcap=1e-40)
    np.testing.assert_allclose(output, np.repeat(v.mean(axis=2, keepdims=True), 4, 2), atol=1e-6)


@pytest.mark.needs_library
def test_of_keys_that_weigh_nothing_the_earliest_are_named() -> None:
    generator = np.random.default_rng(5)
    q, k = (generator.standard_normal((1, 1, 200, 8)).astype(np.float32) for _ in range(2))
    feeds = {"query": q, "key": k, "key_lengths": np.array([200])}
    feeds |= {"top_k": np.array([6]), "distances": np.array([0])}
    *_, indices, weights = run("AttentionDiagnostics", "FP32", feeds, (), left=1, right=0)
    for row in (0, 1, 60, 199):
        named = indices[0, 0, row].tolist()
        seen = {row, max(0, row - 1)}
        assert set(named[: len(seen)]) == seen
        rest = [key for key in range(8) if key not in seen]
        assert named[len(seen) :] == rest[: 6 - len(seen)]
        assert (weights[0, 0, row, len(seen) :] == 0).all()


@pytest.mark.needs_library
def test_a_reach_to_the_right_without_end() -> None:
    generator = np.random.default_rng(6)
    q, k, v = (generator.standard_normal((1, 1, 9, 8)).astype(np.float32) for _ in range(3))
    feeds = {"query": q, "key": k, "value": v, "key_lengths": np.array([9])}
    expected, _ = attention_reference(q, k, v, scale=1.0)
    output, _ = run("Attention", "FP32", feeds, q.shape, right=2**63 - 1, left=2**63 - 1)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.needs_library
def test_half_precision_conversions_are_exact() -> None:
    """Every finite FP16 and BF16 value comes through an attention with one key unchanged."""
    for dtype in ("FP16", "BF16"):
        bits = np.arange(1 << 16, dtype=np.uint16)
        values = bits.view(TYPES[dtype][0])
        values = values[np.isfinite(values.astype(np.float32))]
        # As inputs, FP16 denormals too; BF16's would be FP32 denormals, which sums may flush.
        if dtype == "BF16":
            values = values[np.abs(values.astype(np.float32)) >= 2.0**-125]
        v = values.reshape(1, 1, 1, -1)
        one = np.ones((1, 1, 1, 1), TYPES[dtype][0])
        feeds = {"query": one, "key": one, "value": v, "key_lengths": np.array([1])}
        output, _ = run("Attention", dtype, feeds, v.shape)
        np.testing.assert_array_equal(output, v)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": (1, 2, 4, 9)}, "key: batch and head_dim"),
        ({"key": (1, 3, 4, 8)}, "key: its heads"),
        ({"value": (1, 2, 5, 8)}, "value: batch, heads and length"),
        ({"bias": (1, 1, 3, 1)}, "bias: each dimension"),
        ({"sinks": (3,)}, "sinks: its shape"),
    ],
)
@pytest.mark.needs_library
def test_wrong_shapes_are_refused(changes: dict, message: str) -> None:
    shapes = {"query": (1, 2, 4, 8), "key": (1, 2, 4, 8), "value": (1, 2, 4, 8)} | changes
    feeds = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    feeds["key_lengths"] = np.array([4])
    with pytest.raises(Exception, match=message):
        run("Attention", "FP32", feeds, ())


@pytest.mark.parametrize("share", [10, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("instruction_set", ["generic", "avx2"])
@pytest.mark.needs_library
def test_other_instruction_sets_compute_the_same(instruction_set: str, share: int) -> None:
    """The tests above, once more, in a process told to use another implementation."""
    environment = os.environ | {
        "ATTNSERVE_KERNELS_ISA": instruction_set,
        "ATTNSERVE_TEST_SHARE": str(share),
    }
    used = subprocess.run(
        [sys.executable, "-c", "import attnserve_kernels as k; print(k.instruction_set())"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if used != instruction_set:
        pytest.skip(f"this processor runs {used}")
    again = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "any or conversions or large"]
    result = subprocess.run(again, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]


def test_without_a_compiler_it_installs_without_operators(tmp_path: Path) -> None:
    source = Path(__file__).parents[1]
    copy = shutil.copytree(source, tmp_path / "kernels", ignore=shutil.ignore_patterns("*.so"))
    environment = os.environ | {"CC": "false", "CXX": "false"}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "built")],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "installed without operators" in result.stderr
    assert (tmp_path / "built/attnserve_kernels/__init__.py").is_file()
    assert not list((tmp_path / "built").rglob("*.so"))


@pytest.mark.parametrize("operator", ["Attention", "AttentionDiagnostics"])
def test_a_stop_flag_ends_what_begins_on_its_thread(operator: str):
    set_stop_flag = ctypes.CDLL(str(attnserve_kernels.library_path())).attnserve_set_stop_flag
    set_stop_flag.argtypes = [ctypes.c_void_p]
    rows = np.ones((1, 2, 50, 8), np.float32)
    feeds = {"query": rows, "key": rows, "key_lengths": np.array([50])}
    if operator == "Attention":
        feeds["value"] = rows
    else:
        feeds |= {"top_k": np.array([1]), "distances": np.array([1])}
    flag = ctypes.c_bool(False)
    set_stop_flag(ctypes.addressof(flag))
    try:
        before = run(operator, "FP32", feeds, rows.shape)
        flag.value = True
        with pytest.raises(Exception, match="attnserve: stopped"):
            run(operator, "FP32", feeds, rows.shape)
        with ThreadPoolExecutor(1) as other:
            other.submit(run, operator, "FP32", feeds, rows.shape).result()
    finally:
        set_stop_flag(None)
    for one, another in zip(before, run(operator, "FP32", feeds, rows.shape), strict=True):
        np.testing.assert_array_equal(one, another)
