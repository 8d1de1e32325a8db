"""PagedAttention against attention in float64 over a cache that NumPy reads and writes."""

import ctypes
import os
import subprocess
import sys
from functools import cache
from typing import Any

import attnserve_kernels
import ml_dtypes
import numpy as np
import onnx.helper
import onnxruntime
import pytest
from attnserve_export.paged_batches import (
    CACHE_TYPES,
    OUTPUTS,
    PagedBatch,
    PagedSequence,
    PageLayout,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]

QUERY_TYPES = {"FP32": (np.float32, 1), "FP16": (np.float16, 10), "BF16": (ml_dtypes.bfloat16, 16)}
INPUTS = (
    "query", "key", "value", "cache", "starts", "lengths", "table_starts", "table", "spec",
    "parents", "slopes", "weights_of", "sinks",
)  # fmt: skip

pytestmark = pytest.mark.needs_library

# Of the examples that are drawn, one in so many is.
SHARE = int(os.environ.get("ATTNSERVE_TEST_SHARE", "1"))


@cache
def session(kind: int, present: frozenset[str], attributes: tuple[Any, ...], threads: int) -> Any:
    """One node with some of its optional inputs."""

    def value(name: str) -> Any:
        own = {"query": kind, "key": kind, "value": kind, "output": kind, "cache": 2}
        own |= dict.fromkeys(("slopes", "sinks", "log_sum_exp", "entropy", "weights"), 1)
        rank = {"query": 3, "key": 3, "value": 3, "output": 3, "log_sum_exp": 2, "entropy": 2}
        return onnx.helper.make_tensor_value_info(
            name, own.get(name, 7), [None] * rank.get(name, 1)
        )

    names = [name if name in present else "" for name in INPUTS]
    outputs = [name if name in present else "" for name in OUTPUTS]
    node = onnx.helper.make_node(
        "PagedAttention", names, outputs, domain="attnserve", **dict(attributes)
    )
    graph = onnx.helper.make_graph(
        [node], "one", [value(n) for n in names if n], [value(n) for n in outputs if n]
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("attnserve", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(attnserve_kernels.library_path()))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(
    batch: PagedBatch,
    changes: dict[str, Array] | None = None,
    *,
    absent: tuple[str, ...] = (),
    threads: int = 0,
) -> dict[str, Array]:
    """Run the operator on a batch; it writes into the batch's cache.

    Args:
        batch: as it is.
        changes: other inputs.
        absent: optional inputs and outputs to leave out of the graph.
        threads: of the run; 0: ONNX Runtime's choice.
    """
    feeds = batch.feeds() | (changes or {})
    if batch.slopes is not None:
        feeds["slopes"] = batch.slopes
    feeds = {name: np.ascontiguousarray(a) for name, a in feeds.items() if name not in absent}
    layout, kinds = batch.layout, {np.dtype(dtype): kind for dtype, kind in QUERY_TYPES.values()}
    attributes = (
        ("num_kv_heads", layout.num_kv_heads),
        ("head_dim", layout.head_dim),
        ("value_head_dim", layout.value_head_dim),
        ("scale", batch.scale),
        ("softcap", batch.softcap),
    )
    given = [name for name in OUTPUTS if name not in absent]
    kind = kinds[np.dtype(batch.dtype)]
    opened = session(kind, frozenset([*feeds, *given]), attributes, threads)
    binding = opened.io_binding()
    for name, array in feeds.items():
        element = kinds.get(array.dtype, array.dtype)
        # Of an empty array the address is not looked at, but it must not be null.
        address = array.ctypes.data or batch.cache.ctypes.data
        binding.bind_input(name, "cpu", 0, element, list(array.shape), address)
    rows = feeds["query"].shape[:2]
    answers = {
        "output": np.full((*rows, layout.value_head_dim), np.nan, batch.dtype),
        "log_sum_exp": np.full(rows, np.nan, np.float32),
        "entropy": np.full(rows, np.nan, np.float32),
        "weights": np.full(weights_size(batch, feeds), np.nan, np.float32),
    }
    for name in given:
        array = answers[name]
        element = kind if name == "output" else np.dtype(np.float32)
        address = array.ctypes.data or batch.cache.ctypes.data
        binding.bind_output(name, "cpu", 0, element, list(array.shape), address)
    opened.run_with_iobinding(binding)
    return {name: answers[name] for name in given}


def weights_size(batch: PagedBatch, feeds: dict[str, Array]) -> int:
    """Elements of the output `weights`."""
    sizes = np.diff(feeds["starts"])[: len(feeds["lengths"])] * feeds["lengths"] * batch.num_heads
    return int(sum(sizes[i] for i in feeds.get("weights_of", ()) if i < len(sizes)))


def tolerance(batch: PagedBatch) -> float:
    """Of FP32: rounding errors of sums, relative to the largest score."""
    keys = max(1, *(s.length for s in batch.sequences), 1)
    score = 8.0 * batch.magnitude
    if batch.slopes is not None:
        score += float(batch.slopes.max()) * keys
    return float(2e-6 * keys**0.5 * max(1.0, score / 8))


def check(batch: PagedBatch, answers: dict[str, Array]) -> None:
    """The answers are those for the cache as it is now."""
    expected = batch.expected(as_stored=True)
    exact = tolerance(batch)
    allowed = {4: exact, 2: max(2e-3 if batch.dtype is np.float16 else 1.6e-2, exact)}
    # Values are of about unit size, a few are larger: FP16 and BF16 round relative to them.
    scale = np.maximum(1, np.abs(expected["output"]) / 2)
    assert answers["output"].shape == expected["output"].shape
    error = np.abs(answers["output"].astype(np.float64) - expected["output"]) / scale
    assert not error.size or error.max() <= allowed[np.dtype(batch.dtype).itemsize]
    for name in ("log_sum_exp", "entropy"):
        np.testing.assert_allclose(answers[name], expected[name], atol=10 * exact, rtol=1e-6)
    assert answers["weights"].shape == expected["weights"].shape
    np.testing.assert_allclose(answers["weights"], expected["weights"], atol=exact, rtol=10 * exact)
    assert (answers["weights"][expected["weights"] == 0] == 0).all()


@st.composite
def batches(draw: st.DrawFn) -> PagedBatch:
    """Sizes on both sides of every boundary: pages, 128 and 1024 keys, 12, 48 and 192 rows."""
    head_dim = draw(st.sampled_from([1, 3, 8, 16, 31, 64, 64, 80, 128]))
    value_head_dim = draw(st.sampled_from([1, 5, 8, 33, 64, 64, 144]))
    layout = PageLayout(
        draw(st.integers(1, 3)),
        head_dim,
        value_head_dim,
        draw(st.sampled_from([1, 3, 8, 16, 16, 16, 40])),
        draw(st.sampled_from(list(CACHE_TYPES))),
        latent=value_head_dim <= head_dim and draw(st.booleans()),
    )
    heads = layout.num_kv_heads * draw(st.sampled_from([1, 1, 2, 3, 4, 7]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    causal = draw(st.sampled_from([True, True, True, False]))
    before = st.integers(0, 40) | st.sampled_from([0, 15, 16, 17, 127, 128, 129, 1023, 1025, 1400])
    count = st.sampled_from([0, 1, 1, 1, 1, 2, 3]) | st.integers(1, 40) | st.just(200)
    trees = causal and draw(st.booleans())
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        new = draw(count)
        parents = None
        if trees and draw(st.booleans()):
            parents = [int(generator.integers(-1, i)) for i in range(new)]
        sequences.append(PagedSequence(draw(before), new, parents))
    windowed = causal and draw(st.booleans())
    sinks = None
    if draw(st.booleans()):
        # Far from the scores too, and some heads without.
        sinks = generator.choice(np.array([-np.inf, -50, -1, 0, 2, 50], np.float32), heads)
    return PagedBatch(
        layout,
        heads,
        QUERY_TYPES[draw(st.sampled_from(list(QUERY_TYPES)))][0],
        sequences,
        generator,
        scale=layout.head_dim**-0.5,
        softcap=draw(st.sampled_from([0.0, 0.0, 2.5, 30.0])),
        slopes=generator.random(heads).astype(np.float32) if draw(st.booleans()) else None,
        sinks=sinks,
        window=draw(st.integers(0, 20) | st.sampled_from([127, 300])) if windowed else -1,
        kept_first=draw(st.sampled_from([0, 0, 1, 4, 20])),
        causal=causal,
        appends=draw(st.sampled_from([True, True, False])),
        weights_of=sorted(draw(st.sets(st.integers(0, len(sequences) - 1)))),
    )


def plain(*sequences: PagedSequence, seed: int = 0, **others: Any) -> PagedBatch:
    """A batch of two key heads of 64 for four query heads, FP32, pages of 16."""
    width, latent = others.pop("value_head_dim", 64), others.pop("latent", False)
    layout = PageLayout(2, 64, width, 16, others.pop("cache", "fp32"), latent)
    return PagedBatch(
        layout, 4, np.float32, list(sequences), np.random.default_rng(seed), scale=0.125, **others
    )


@settings(deadline=None, max_examples=100 // SHARE)
@given(batch=batches())
def test_any_batch_is_within_tolerance(batch: PagedBatch) -> None:
    check(batch, run(batch))


@settings(deadline=None, max_examples=100 // SHARE)
@given(batch=batches())
def test_any_new_keys_are_stored_and_nothing_else_is_touched(batch: PagedBatch) -> None:
    given = batch.cache.copy()
    run(batch)
    stored, batch.cache = batch.cache, given
    for s in batch.sequences:
        batch.store(s, s.before, s.length)
    np.testing.assert_array_equal(stored, batch.cache)


@pytest.mark.parametrize("cache", CACHE_TYPES)
def test_one_long_sequence_is_cut_and_merged(cache: str) -> None:
    batch = plain(PagedSequence(9_000, 1), PagedSequence(5_000, 30), cache=cache, weights_of=[0])
    check(batch, run(batch))


@pytest.mark.parametrize("cache", CACHE_TYPES)
def test_a_latent_page_holds_one_row_for_key_and_value(cache: str) -> None:
    sequences = (PagedSequence(2_100, 1), PagedSequence(21, 30), PagedSequence(0, 1))
    batch = plain(*sequences, cache=cache, latent=True, value_head_dim=40)
    bytes_of_key = np.dtype(CACHE_TYPES[cache]).itemsize * 64 + (4 if batch.layout.scaled else 0)
    assert batch.layout.bytes == 2 * 16 * bytes_of_key
    check(batch, run(batch))
    check(batch, run(batch, absent=("value",)) | {"weights": np.zeros(0, np.float32)})


@pytest.mark.parametrize("count", [1, 3, 60])
def test_what_comes_out_does_not_depend_on_the_batch_or_on_threads(count: int) -> None:
    whole = plain(PagedSequence(70, 5), PagedSequence(3_000, count), PagedSequence(0, 1))
    answers = run(whole)
    alone = plain(PagedSequence(3_000, count))
    (alone.sequences[0], of_whole) = (whole.sequences[1], slice(5, 5 + count))
    alone.query, alone.cache = whole.query[of_whole], whole.cache
    for threads in (1, 2):
        again = run(alone, threads=threads)
        for name, array in again.items():
            np.testing.assert_array_equal(array, answers[name][of_whole])


def test_pages_that_were_given_back_are_not_read() -> None:
    batch = plain(PagedSequence(400, 2), window=40, kept_first=20)
    wanted = run(batch)
    expected = batch.expected(as_stored=True)
    pages = np.array(batch.sequences[0].pages)
    # Kept: keys 0..19, pages 0 and 1. Seen by the first new token: from 360 on, page 22.
    pages[2:22] = -1
    answers = run(batch, {"table": pages})
    for name, array in answers.items():
        np.testing.assert_array_equal(array, wanted[name])
        np.testing.assert_allclose(array, expected[name], atol=1e-4)
    for gone in (1, 22):
        with pytest.raises(Exception, match=rf"table\[{gone}\]: given -1; .* page {gone} of"):
            run(batch, {"table": np.where(np.arange(len(pages)) == gone, -1, pages)})


def test_weights_are_of_the_sequences_named_and_0_where_nothing_is_seen() -> None:
    sequences = (PagedSequence(400, 2), PagedSequence(0, 1), PagedSequence(7, 5, [-1, 0, 0, 2, 1]))
    batch = plain(*sequences, window=40, kept_first=20, weights_of=[0, 2])
    wanted = run(batch)
    check(batch, wanted)
    pages = np.array([page for s in sequences for page in s.pages])
    pages[2:22] = -1  # of the first sequence: no query sees them
    np.testing.assert_array_equal(run(batch, {"table": pages})["weights"], wanted["weights"])
    first = wanted["weights"][: 2 * 4 * 402].reshape(2, 4, 402)
    assert (first[:, :, 20:360] == 0).all()
    np.testing.assert_allclose(first.sum(axis=2), 1, atol=1e-5)
    alone = run(batch, {"weights_of": np.array([2])})
    np.testing.assert_array_equal(alone["weights"], wanted["weights"][first.size :])
    for name in ("output", "log_sum_exp", "entropy"):
        np.testing.assert_array_equal(alone[name], wanted[name])
    without = run(batch, absent=("entropy",))
    np.testing.assert_array_equal(without["weights"], wanted["weights"])


def test_a_sequence_without_keys_gives_nothing() -> None:
    batch = plain(PagedSequence(0, 3), PagedSequence(20, 2), causal=False, appends=False)
    batch.sequences[0].count = 0
    feeds = {"starts": np.array([0, 3, 5]), "lengths": np.array([0, 22])}
    feeds["weights_of"] = np.array([0])
    answers = run(batch, feeds)
    assert (answers["output"][:3] == 0).all()
    assert (answers["log_sum_exp"][:3] == -np.inf).all()
    assert (answers["entropy"][:3] == 0).all()
    assert (answers["output"][3:] != 0).all()


def test_more_queries_than_keys_of_another_sequence() -> None:
    """Cross-attention to one key; causal, those before the first key see nothing."""
    batch = plain(PagedSequence(1, 0), causal=False)
    batch.query = batch.generator.standard_normal((5, 4, 64)).astype(np.float32)
    feeds = {"starts": np.array([0, 5]), "lengths": np.array([1])}
    answers = run(batch, feeds, absent=("key", "value", "parents"))
    _, values = batch.stored(batch.sequences[0])
    np.testing.assert_allclose(answers["output"], np.repeat(values, 2, 1).repeat(5, 0), atol=1e-6)
    batch.causal = True
    answers = run(batch, feeds, absent=("key", "value", "parents"))
    assert (answers["output"][:4] == 0).all()
    np.testing.assert_allclose(answers["output"][4], np.repeat(values[0], 2, 0), atol=1e-6)


def test_keys_alone_are_stored_without_queries() -> None:
    batch = plain(PagedSequence(3, 40), PagedSequence(0, 7), causal=False)
    answers = run(batch, {"query": batch.query[:0]})
    assert answers["output"].shape == (0, 4, 64)
    given = batch.cache.copy()
    for s in batch.sequences:
        batch.store(s, s.before, s.length)
    np.testing.assert_array_equal(given, batch.cache)


def test_outputs_that_are_not_in_the_graph_are_not_computed() -> None:
    batch = plain(PagedSequence(40, 3))
    whole, less = run(batch), run(batch, absent=("entropy", "parents"))
    assert set(less) == {"output", "log_sum_exp", "weights"}
    for name, array in less.items():
        np.testing.assert_array_equal(array, whole[name])


def test_large_scores_keep_their_softmax() -> None:
    batch = plain(PagedSequence(2_500, 1), PagedSequence(90, 20), magnitude=100.0)
    check(batch, run(batch))


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("cache", CACHE_TYPES)
def test_no_number_stays_no_number_where_it_is_seen(count: int, cache: str) -> None:
    batch = plain(PagedSequence(30, count), PagedSequence(30, count), cache=cache)
    keys = batch.feeds()["key"].copy()
    keys[count - 1, 0, 5] = np.nan  # the last token of the first sequence, the first key head
    output = run(batch, {"key": keys})["output"]
    assert np.isnan(output[count - 1, :2]).all()
    assert np.isfinite(output[: count - 1]).all()
    assert np.isfinite(output[count - 1, 2:]).all()
    assert np.isfinite(output[count:]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": np.zeros((3, 3, 64), np.float32)}, "query: given 3 heads; allowed: multiples"),
        ({"query": np.zeros((3, 4, 63), np.float32)}, "query: its shape is"),
        ({"key": np.zeros((2, 2, 64), np.float32)}, r"key: its shape is \[2, 2, 64\]; allowed"),
        ({"key": np.zeros((0, 2, 64), np.float32)}, "key, value: one of them is absent"),
        ({"starts": np.array([0, 4])}, r"starts\[1\]: given 4; allowed: 0\.\.3"),
        ({"starts": np.array([1, 3])}, r"starts\[0\]: given 1; allowed: 0"),
        ({"starts": np.array([0, 2])}, r"starts\[1\]: given 2; allowed: 3"),
        ({"lengths": np.array([2])}, r"lengths\[0\]: given 2; allowed: 3\.\.32"),
        ({"lengths": np.array([33])}, r"lengths\[0\]: given 33; allowed: 3\.\.32"),
        ({"table_starts": np.array([0, 3])}, r"table_starts\[1\]: given 3; allowed: 0\.\.2"),
        ({"table": np.array([0, 1 << 40])}, r"table\[1\]: given 1099511627776; allowed: multi"),
        ({"table": np.array([0, 8])}, r"table\[1\]: given 8; allowed: multiples of 64"),
        ({"spec": np.array([0, 0, -1, 0, 1, 0])}, "spec: page_size: given 0; allowed: 1"),
        ({"spec": np.array([16, 5, -1, 0, 1, 0])}, r"spec: cache_dtype: given 5; allowed: 0\.\.4"),
        ({"spec": np.array([16, 0, 3, 0, 0, 0])}, "spec: window without causal: given 3"),
        ({"spec": np.array([16, 0, -1, -1, 1, 0])}, "spec: kept_first: given -1"),
        ({"spec": np.array([16, 0, -1, 0, 1, 2])}, r"spec: latent: given 2; allowed: 0\.\.1"),
        ({"spec": np.array([16, 0, -1, 0])}, r"spec: its shape is \[4\]; allowed: \[7\]"),
        ({"spec": np.array([16, 0, -1, 0, 1, 0, 2])}, r"spec: entropy: given 2; allowed: 0\.\.1"),
        ({"spec": np.array([16, 0, -1, 0, 1, 1])}, "value: given where spec: latent is 1"),
        ({"weights_of": np.array([1])}, r"weights_of\[0\]: given 1; allowed: 0\.\.0, ascending"),
        ({"weights_of": np.array([0, 0])}, r"weights_of\[1\]: given 0; allowed: 1\.\.0"),
        ({"parents": np.array([-1, 1, 0])}, "parents: given 1 for new token 1 of its sequence"),
        ({"parents": np.array([-1, 0])}, "parents: its shape is"),
    ],
)
def test_wrong_inputs_are_refused_by_name(changes: dict[str, Array], message: str) -> None:
    batch = plain(PagedSequence(20, 3))
    before = batch.cache.copy()
    with pytest.raises(Exception, match=message):
        run(batch, changes)
    np.testing.assert_array_equal(batch.cache, before)


def test_values_wider_than_keys_are_not_latent() -> None:
    batch = plain(PagedSequence(3, 2), value_head_dim=80)
    with pytest.raises(Exception, match="latent: given 1 where value_head_dim is 80; allowed: 0"):
        run(batch, {"spec": np.array([16, 0, -1, 0, 1, 1])})


@pytest.mark.parametrize("numbers", [5, 6])
def test_specs_of_graphs_exported_earlier_have_no_latent_and_want_entropy(numbers: int) -> None:
    batch = plain(PagedSequence(30, 2))
    check(batch, run(batch, {"spec": batch.feeds()["spec"][:numbers]}))


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_without_entropy_all_else_is_the_same_to_the_bit(dtype: str, count: int) -> None:
    batch = plain(PagedSequence(700, count), PagedSequence(9, count), cache=dtype, weights_of=[1])
    wanted = run(batch)
    spec = batch.feeds()["spec"]
    spec[6] = 0
    without = run(batch, {"spec": spec}, absent=("entropy",))
    assert without.keys() == wanted.keys() - {"entropy"}
    for name, array in without.items():
        assert np.array_equal(array, wanted[name])


def test_a_stop_flag_ends_what_begins_on_its_thread() -> None:
    library = ctypes.CDLL(str(attnserve_kernels.library_path()))
    library.attnserve_set_stop_flag.argtypes = [ctypes.c_void_p]
    batch = plain(PagedSequence(200, 1), PagedSequence(20, 40))
    flag = ctypes.c_bool(False)
    library.attnserve_set_stop_flag(ctypes.addressof(flag))
    try:
        before = run(batch)
        flag.value = True
        with pytest.raises(Exception, match="attnserve: stopped"):
            run(batch)
    finally:
        library.attnserve_set_stop_flag(None)
    for name, array in run(batch).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("share", [10, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("instruction_set", ["generic", "avx2"])
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
    again = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "any or long or number"]
    result = subprocess.run(again, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
