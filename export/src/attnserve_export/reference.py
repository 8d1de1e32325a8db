"""What every kernel and model is compared with: attention in float64, written plainly.

It shares no code with the exported modules.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def attention_reference(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    key_lengths: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mask: str = "bidirectional",
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
        mask: "bidirectional", "cross" (alike), or "causal": query i sees keys 0..i.
        scale: multiplies query x key; None is 1/sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap); 0 is off.

    Returns:
        Output [B, H, Sq, Dv] and weights [B, H, Sq, Sk], float64; rows without any visible key
        are 0.
    """
    q, k, v = (np.asarray(array, np.float64) for array in (query, key, value))
    batch, num_heads, query_len, head_dim = q.shape
    num_kv_heads, key_len = k.shape[1:3]
    used_scale = 1 / math.sqrt(head_dim) if scale is None else scale
    weights = np.zeros((batch, num_heads, query_len, key_len))
    output = np.zeros((batch, num_heads, query_len, v.shape[3]))
    full_bias: NDArray[Any] | None = None
    if bias is not None:
        full_bias = np.broadcast_to(np.asarray(bias, np.float64), weights.shape)
    for row in range(batch):
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = used_scale * (q[row, head] @ k[row, kv_head].T)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            if full_bias is not None:
                scores = scores + full_bias[row, head]
            hidden = np.zeros(scores.shape, bool)
            if key_lengths is not None:
                hidden[:, int(np.asarray(key_lengths)[row]) :] = True
            if mask == "causal":
                hidden |= np.arange(key_len)[None, :] > np.arange(query_len)[:, None]
            scores[hidden] = -np.inf
            for i in range(query_len):
                highest = scores[i].max()
                if highest == -np.inf:
                    continue
                exponentials = np.exp(scores[i] - highest)
                weights[row, head, i] = exponentials / exponentials.sum()
            output[row, head] = weights[row, head] @ v[row, kv_head]
    return output, weights
