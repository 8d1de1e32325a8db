"""What every kernel and model is compared with: attention in float64, written plainly.

It shares no code with the exported modules.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Scheme:
    """What a reference computes besides softmax(scale * query x key) x value.

    Attributes:
        left, right: keys before and after its own position that a query sees; None: all.
        bottom_right: positions count back from the last valid key.
        slopes: of each head, by which scores fall with distance (ALiBi); None: not at all.
        rotary_style: "half" or "interleaved": query and key are turned first; None: not.
        rotary_dims, rotary_base: of the rotary embedding.
        chunk: a query sees keys of its own chunk of so many positions; None: of all.
    """

    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    slopes: Sequence[float] | None = None
    rotary_style: str | None = None
    rotary_dims: int = 0
    rotary_base: float = 10_000.0
    chunk: int | None = None


BIDIRECTIONAL = Scheme()
CAUSAL = Scheme(right=0)


def attention_reference(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    key_lengths: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    prefix_lengths: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scheme: Scheme = BIDIRECTIONAL,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Float64, Float64]:
    """Scaled dot-product attention (Vaswani et al., https://arxiv.org/abs/1706.03762).

    Args:
        query: [B, H, Sq, D].
        key: [B, Hkv, Sk, D]; query head h uses key head h // (H / Hkv).
        value: [B, Hkv, Sk, Dv].
        key_lengths: [B]; keys from that position on are masked.
        bias: added to the scores, broadcast to [B, H, Sq, Sk]; -inf masks.
        mask: bool, broadcast likewise; true where a key may be seen.
        prefix_lengths: [B]; valid keys before that position are seen by all queries.
        sinks: [H]; a logit of each head that takes part in the softmax and has no value (gpt-oss,
            https://arxiv.org/abs/2508.10925); -inf or None: none.
        scheme: who sees whom, and what positions do.
        scale: multiplies query x key; None is 1/sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap); 0 is off.

    Returns:
        Output [B, H, Sq, Dv] and weights [B, H, Sq, Sk], float64; rows without any visible key
        are 0.
    """
    output, weights, _ = attention_with_log_sum_exp(
        query,
        key,
        value,
        key_lengths=key_lengths,
        bias=bias,
        mask=mask,
        prefix_lengths=prefix_lengths,
        sinks=sinks,
        scheme=scheme,
        scale=scale,
        softcap=softcap,
    )
    return output, weights


def attention_with_log_sum_exp(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    key_lengths: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    prefix_lengths: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scheme: Scheme = BIDIRECTIONAL,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Float64, Float64, Float64]:
    """As `attention_reference`, and what the softmax was divided by.

    Returns:
        Output, weights, and the logarithm of the sum of exponentials of each query's scores, its
        sink among them, [B, H, Sq]; -inf where nothing is seen and there is no sink.
    """
    q, k, v = (np.asarray(array, np.float64) for array in (query, key, value))
    batch, num_heads, query_len, head_dim = q.shape
    num_kv_heads, key_len = k.shape[1:3]
    used_scale = 1 / math.sqrt(head_dim) if scale is None else scale
    weights = np.zeros((batch, num_heads, query_len, key_len))
    output = np.zeros((batch, num_heads, query_len, v.shape[3]))
    log_sum_exp = np.zeros((batch, num_heads, query_len))
    sink = np.asarray([-np.inf] * num_heads if sinks is None else sinks, np.float64)
    lengths = (
        [key_len] * batch if key_lengths is None else [int(n) for n in np.asarray(key_lengths)]
    )
    full_bias: NDArray[Any] | None = None
    if bias is not None:
        full_bias = np.broadcast_to(np.asarray(bias, np.float64), weights.shape)
    full_mask = np.broadcast_to(np.asarray(True if mask is None else mask, bool), weights.shape)
    prefixes = (
        [0] * batch if prefix_lengths is None else [int(n) for n in np.asarray(prefix_lengths)]
    )
    k, v = k.copy(), v.copy()
    for row, length in enumerate(lengths):
        # What is padding never reaches a result, though 0 * NaN would.
        k[row, :, length:] = v[row, :, length:] = 0
        positions = np.arange(query_len) + (length - query_len if scheme.bottom_right else 0)
        distance = np.arange(key_len)[None, :] - positions[:, None]  # key minus query
        hidden = np.zeros(distance.shape, bool)
        if scheme.left is not None:
            hidden |= distance < -scheme.left
        if scheme.right is not None:
            hidden |= distance > scheme.right
        if scheme.chunk is not None:
            hidden |= np.arange(key_len) // scheme.chunk != (positions // scheme.chunk)[:, None]
        hidden[:, : prefixes[row]] = False
        hidden[:, length:] = True
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            left = turned(q[row, head], positions, scheme)
            right = turned(k[row, kv_head], np.arange(key_len), scheme)
            scores = used_scale * (left @ right.T)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            if scheme.slopes is not None:
                scores = scores - scheme.slopes[head] * np.abs(distance)
            if full_bias is not None:
                scores = scores + full_bias[row, head]
            scores[hidden | ~full_mask[row, head]] = -np.inf
            highest = np.maximum(scores.max(axis=1, keepdims=True), sink[head])
            highest[highest == -np.inf] = 0
            exponentials = np.exp(scores - highest)
            total = exponentials.sum(axis=1, keepdims=True) + np.exp(sink[head] - highest)
            weights[row, head] = exponentials / np.where(total > 0, total, 1)
            output[row, head] = weights[row, head] @ v[row, kv_head]
            with np.errstate(divide="ignore"):
                log_sum_exp[row, head] = (highest + np.log(total))[:, 0]
    return output, weights, log_sum_exp


def packed_reference(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    query_starts: ArrayLike,
    key_starts: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    prefix_lengths: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    scheme: Scheme = BIDIRECTIONAL,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Float64, Float64, Float64]:
    """Attention of N sequences that lie one after another: each computed by itself.

    Args:
        query: [1, H, Tq, D].
        key: [1, Hkv, Tk, D].
        value: [1, Hkv, Tk, Dv].
        query_starts, key_starts: [N + 1]; sequence n has tokens [n] to [n + 1].
        prefix_lengths: [N].
        bias, mask: broadcast to [1, H, Tq, Tk].
        sinks, scheme, scale, softcap: as in `attention_reference`.

    Returns:
        Output [1, H, Tq, Dv], weights [1, H, Tq, Tk], 0 between sequences, and the log-sum-exp
        [1, H, Tq].
    """
    q, k, v = (np.asarray(array, np.float64) for array in (query, key, value))
    shape = (1, q.shape[1], q.shape[2], k.shape[2])
    added = np.broadcast_to(np.asarray(0 if bias is None else bias, np.float64), shape)
    seen = np.broadcast_to(np.asarray(True if mask is None else mask, bool), shape)
    starts, keys_from = np.asarray(query_starts), np.asarray(key_starts)
    output, weights = np.zeros((*q.shape[:3], v.shape[3])), np.zeros(shape)
    log_sum_exp = np.full(shape[:3], -np.inf)
    if sinks is not None:
        # Of what sees no key at all.
        log_sum_exp[:] = np.asarray(sinks, np.float64)[:, None]
    for n in range(len(starts) - 1):
        rows, columns = slice(*starts[n : n + 2]), slice(*keys_from[n : n + 2])
        if rows.start == rows.stop or columns.start == columns.stop:
            continue
        found = attention_with_log_sum_exp(
            q[:, :, rows],
            k[:, :, columns],
            v[:, :, columns],
            bias=added[:, :, rows, columns],
            mask=seen[:, :, rows, columns],
            prefix_lengths=None
            if prefix_lengths is None
            else np.asarray(prefix_lengths)[n : n + 1],
            sinks=sinks,
            scheme=scheme,
            scale=scale,
            softcap=softcap,
        )
        output[:, :, rows], weights[:, :, rows, columns], log_sum_exp[:, :, rows] = found
    return output, weights, log_sum_exp


def paged_reference(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    visible: NDArray[np.bool_],
    *,
    scale: float,
    softcap: float = 0.0,
    penalty: ArrayLike | None = None,
    slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64, Float64]:
    """Attention of one sequence's new tokens, in the layout of sessions.

    Args:
        query: [n, H, D].
        key: [L, Hkv, D].
        value: [L, Hkv, Dv].
        visible: [n, L], which keys each query sees.
        scale, softcap: as in `attention_reference`.
        penalty: [n, L], distances; with slopes [H], what they are multiplied by and scores lose.
        slopes: see there.
        sinks: [H]; as in `attention_reference`.

    Returns:
        Output [n, H, Dv]; log of the sum of exponentials of the scores and the sink [n, H]; entropy
        of the weights [n, H] in nats; the weights [n, H, L]. Queries that see no key, and have no
        sink, have 0, -inf, 0, 0.
    """
    q, k, v = (np.asarray(array, np.float64) for array in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    scores = scale * np.einsum("qhd,khd->hqk", q, np.repeat(k, groups, axis=1))
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if penalty is not None:
        scores -= np.asarray(slopes, np.float64)[:, None, None] * np.asarray(penalty, np.float64)
    scores = np.where(visible, scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    sink = np.full(q.shape[1], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    highest = np.maximum(highest, sink[:, None, None])
    finite = np.where(highest == -np.inf, 0, highest)
    exponentials = np.exp(scores - finite)
    total = exponentials.sum(axis=-1, keepdims=True) + np.exp(sink[:, None, None] - finite)
    weights = exponentials / np.where(total > 0, total, 1)
    output = np.einsum("hqk,khd->qhd", weights, np.repeat(v, groups, axis=1))
    with np.errstate(divide="ignore"):
        log_sum_exp = (highest + np.log(total))[..., 0].T
    logs = np.log(np.where(weights > 0, weights, 1))
    return output, log_sum_exp, -(weights * logs).sum(axis=-1).T, weights.swapaxes(0, 1)


def diagnostics_reference(
    weights: Float64, key_lengths: ArrayLike, *, bottom_right: bool, top_k: int, distances: int
) -> dict[str, NDArray[Any]]:
    """What weights say.

    Args:
        weights: [B, H, Sq, Sk].
        key_lengths: [B].
        bottom_right: as in `Scheme`.
        top_k: keys to name per query.
        distances: to tell apart; the last one gathers all beyond.

    Returns:
        `entropy` [B, H, Sq] in nats, `mass_per_key` [B, H, Sk], `mass_by_distance`
        [B, H, distances], `top_k_indices` and `top_k_weights` [B, H, Sq, top_k], of equal weights
        the earlier key first.
    """
    batch, num_heads, query_len, key_len = weights.shape
    by_distance = np.zeros((batch, num_heads, distances))
    for row, length in enumerate(np.asarray(key_lengths)):
        positions = np.arange(query_len) + (int(length) - query_len if bottom_right else 0)
        apart = np.abs(np.arange(key_len)[None, :] - positions[:, None])
        for distance in range(distances):
            chosen = apart >= distance if distance == distances - 1 else apart == distance
            by_distance[row, :, distance] = (weights[row] * chosen).sum(axis=(1, 2))
    logs = np.log(np.where(weights > 0, weights, 1))
    indices = np.argsort(-weights, axis=-1, kind="stable")[..., :top_k]
    return {
        "entropy": -(weights * logs).sum(axis=-1),
        "mass_per_key": weights.sum(axis=2),
        "mass_by_distance": by_distance,
        "top_k_indices": indices,
        "top_k_weights": np.take_along_axis(weights, indices, axis=-1),
    }


def turned(heads: Float64, positions: NDArray[Any], scheme: Scheme) -> Float64:
    """Rotary embedding as the multiplication of complex numbers.

    Args:
        heads: [n, D].
        positions: [n].
        scheme: without a rotary style, heads are given back as they are.
    """
    if scheme.rotary_style is None:
        return heads
    dims = scheme.rotary_dims
    turned = heads.copy()
    if scheme.rotary_style == "half":
        real, imaginary = slice(0, dims // 2), slice(dims // 2, dims)
    else:
        real, imaginary = slice(0, dims, 2), slice(1, dims, 2)
    wavelengths = scheme.rotary_base ** (np.arange(0, dims, 2) / dims)
    angles = positions[:, None] / wavelengths[None, :]
    pairs = (heads[:, real] + 1j * heads[:, imaginary]) * np.exp(1j * angles)
    turned[:, real], turned[:, imaginary] = pairs.real, pairs.imag
    return turned
