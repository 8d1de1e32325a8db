"""What masks, sinks and log-sum-exp cost `native`, and packed sequences against padded ones.

Contenders for kernels.py.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from attnserve_export import sessions
from attnserve_export.attention.core import DOMAIN
from numpy.typing import NDArray
from torch.nn import functional

Array = NDArray[Any]
Calls = dict[str, Callable[[], Array]]


def neutral(batch: int, num_heads: int) -> dict[str, Array]:
    """What `native` takes beside query, key, value and key_lengths where nothing is asked for."""
    return {
        "bias": np.zeros((1, 1, 1, 1), np.float32),
        "mask": np.ones((1, 1, 1, 1), bool),
        "prefix_lengths": np.zeros(batch, np.int64),
        "softcap": np.array([-1], np.float32),
        "sinks": np.full(num_heads, -np.inf, np.float32),
    }


def call(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> Callable[[], Array]:
    """A run of a graph that gives the output."""
    return lambda: sessions.run(session, feeds, {"output": feeds["query"].shape})["output"]


def boolean_masks(session: onnxruntime.InferenceSession, tensors: Mapping[str, Array]) -> Calls:
    """No mask, and masks of which none spares the kernel a tile but the last.

    Args:
        session: of a bidirectional model's `native`.
        tensors: query, key and value of one sequence of n tokens.
    """
    _, num_heads, length, _ = tensors["query"].shape
    generator = np.random.default_rng(0)
    documents = np.arange(length) // max(1, length // 8)
    masks = {
        "no mask": np.ones((1, 1, 1, 1), bool),
        "mask [1, 1, n, n]": generator.random((1, 1, length, length)) < 0.5,
        "mask [1, H, n, n]": generator.random((1, num_heads, length, length)) < 0.5,
        "mask [1, 1, 1, n]": generator.random((1, 1, 1, length)) < 0.5,
        "mask of 8 blocks": (documents[:, None] == documents)[None, None],
    }
    feeds = {**tensors, "key_lengths": np.array([length]), **neutral(1, num_heads)}
    return {name: call(session, feeds | {"mask": mask}) for name, mask in masks.items()}


def sinks_and_rows(session: onnxruntime.InferenceSession, tensors: Mapping[str, Array]) -> Calls:
    """Attention; with a sink for each head; its log-sum-exp brought back too; both.

    Args:
        session: of a model's `native`.
        tensors: as in `boolean_masks`.
    """
    num_heads, key_len = tensors["query"].shape[1], tensors["key"].shape[2]
    feeds = {**tensors, "key_lengths": np.array([key_len]), **neutral(1, num_heads)}
    sinks = {"sinks": np.linspace(-2, 2, num_heads, dtype=np.float32)}

    def with_rows(feeds: Mapping[str, Array]) -> Callable[[], Array]:
        shape = feeds["query"].shape
        shapes = {"output": shape, "log_sum_exp": shape[:3]}
        return lambda: sessions.run(session, feeds, shapes)["output"]

    return {
        "plain": call(session, feeds),
        "sinks": call(session, feeds | sinks),
        "log-sum-exp": with_rows(feeds),
        "sinks and log-sum-exp": with_rows(feeds | sinks),
    }


def with_chunks(native: Path, chunk: int) -> Path:
    """The same graph with chunks, written beside it: only an attribute of its node differs."""
    model = onnx.load(native)
    (node,) = (node for node in model.graph.node if node.domain == DOMAIN)
    for attribute in node.attribute:
        if attribute.name == "chunk":
            attribute.i = chunk
    path = native.with_name(f"chunks-of-{chunk}.onnx")
    onnx.save(model, path)
    return path


def prefixes_and_chunks(
    causal: onnxruntime.InferenceSession,
    chunked: Mapping[int, onnxruntime.InferenceSession],
    tensors: Mapping[str, Array],
) -> Calls:
    """Causal attention; with an eighth of the keys as prefix; in chunks.

    Args:
        causal: a causal model's `native`.
        chunked: the same with chunks, by their size.
        tensors: as in `boolean_masks`.
    """
    _, num_heads, length, _ = tensors["query"].shape
    feeds = {**tensors, "key_lengths": np.array([length]), **neutral(1, num_heads)}
    calls = {"causal": call(causal, feeds)}
    prefix = {"prefix_lengths": np.array([length // 8])}
    calls[f"prefix of {length // 8}"] = call(causal, feeds | prefix)
    for chunk, session in chunked.items():
        calls[f"chunks of {chunk}"] = call(session, feeds)
    return calls


def packed_and_padded(
    packed: onnxruntime.InferenceSession,
    native: onnxruntime.InferenceSession,
    lengths: Array,
    num_heads: int,
    head_dim: int,
    *,
    causal: bool,
) -> Calls:
    """Sequences of unlike lengths: packed, one run each, padded to the longest, and by PyTorch.

    Args:
        packed, native: variants of one model.
        lengths: tokens of each sequence.
        num_heads, head_dim: of the model, which has as many heads for keys.
        causal: the model's mask.

    Returns:
        Calls that all give what `packed` gives, [1, H, T, D].
    """
    generator = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shape = (1, num_heads, int(starts[-1]), head_dim)
    row = {n: generator.standard_normal(shape, np.float32) for n in ("query", "key", "value")}
    count, longest = len(lengths), int(lengths.max())
    padded = {n: np.zeros((count, num_heads, longest, head_dim), np.float32) for n in row}
    alone = []
    for n, (first, last) in enumerate(itertools.pairwise(starts)):
        own = {name: np.ascontiguousarray(array[:, :, first:last]) for name, array in row.items()}
        for name, array in own.items():
            padded[name][n, :, : last - first] = array[0]
        given = {"key_lengths": np.array([last - first]), **neutral(1, num_heads)}
        alone.append(call(native, own | given))
    valid = np.arange(longest) < lengths[:, None]

    def unpadded(output: Array) -> Array:
        return output.swapaxes(1, 2)[valid].swapaxes(0, 1)[None]

    in_rows = call(native, {**padded, "key_lengths": lengths, **neutral(count, num_heads)})
    q, k, v = (torch.from_numpy(array) for array in padded.values())
    mask = torch.from_numpy(valid)[:, None, None]
    if causal:
        mask = mask & torch.ones(longest, longest).tril().bool()

    def by_torch() -> Array:
        with torch.no_grad():
            output: Array = functional.scaled_dot_product_attention(q, k, v, mask).numpy()
        return output

    given = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, **neutral(count, num_heads)}
    return {
        "packed": call(packed, {**row, **given}),
        "one by one": lambda: np.concatenate([run() for run in alone], axis=2),
        "padded": lambda: unpadded(in_rows()),
        "torch, padded": lambda: unpadded(by_torch()),
    }


def scores_computed(lengths: Array, *, causal: bool) -> dict[str, int]:
    """Pairs of query and key that each way of `packed_and_padded` multiplies, of one head.

    What `native` skips are keys behind a sequence's end and, with the causal mask, after a query;
    it computes padded queries. PyTorch, given a mask, computes all.
    """
    longest = int(lengths.max())
    own = int((lengths * (lengths + 1) // 2 if causal else lengths**2).sum())
    of_padded_queries = int(((longest - lengths) * lengths).sum())
    return {
        "packed": own,
        "one by one": own,
        "padded": own + of_padded_queries,
        "torch, padded": len(lengths) * longest**2,
    }
