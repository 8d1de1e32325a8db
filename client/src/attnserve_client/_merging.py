"""Attention to keys in parts, put together."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnserve_client import _tensors
from attnserve_client._results import Array


def merge_attention(outputs: Sequence[Any], log_sum_exps: Sequence[Any]) -> tuple[Array, Array]:
    """The attention to all keys, of attentions of the same queries to parts of them.

    An output weighs as much as its share of the sum of exponentials: FlashInfer's `merge_states`
    (https://docs.flashinfer.ai/tutorials/recursive_attention.html). Computed in float64. Whatever
    the order and the grouping of the parts, the result is the same but for rounding. Sinks belong
    to one part alone: they would be counted once for each otherwise.

    Args:
        outputs: of each part [..., Dv]: [B, H, Sq, Dv] as `attend` gives them, or [T, H, Dv] of a
            session's step; 0 where a query saw no key.
        log_sum_exps: of each part [...], as `return_log_sum_exp=True` gives them; -inf where a
            query saw no key.

    Returns:
        The output, in the dtype of the first one, and its log-sum-exp, float32: to be merged
        further. A query that saw no key in any part has 0 and -inf.

    Raises:
        ValueError: there is no part, or shapes do not go together.
        TypeError: what is given cannot be read as arrays.
    """
    parts = [_tensors.as_array(each, f"outputs[{n}]") for n, each in enumerate(outputs)]
    logs = [
        _tensors.as_array(each, f"log_sum_exps[{n}]").astype(np.float64)
        for n, each in enumerate(log_sum_exps)
    ]
    if not parts or len(parts) != len(logs):
        raise ValueError(
            f"log_sum_exps: given {len(logs)} for {len(parts)} outputs; "
            "allowed: one for each, and at least one"
        )
    shape = parts[0].shape
    for n, (part, log) in enumerate(zip(parts, logs, strict=True)):
        if part.shape != shape:
            raise ValueError(
                f"outputs[{n}]: given shape {list(part.shape)}; allowed: {list(shape)}, as the "
                "first has"
            )
        if log.shape != shape[:-1]:
            raise ValueError(
                f"log_sum_exps[{n}]: given shape {list(log.shape)}; allowed: {list(shape[:-1])}"
            )
    highest = np.maximum.reduce(logs)
    # Any number serves a query that saw nothing.
    finite = np.where(np.isneginf(highest), 0.0, highest)
    shares = [np.exp(log - finite) for log in logs]
    total = np.add.reduce(shares)
    divisor = np.where(total == 0, 1.0, total)
    merged = np.zeros(shape, np.float64)
    for part, share in zip(parts, shares, strict=True):
        merged += part * (share / divisor)[..., None]
    with np.errstate(divide="ignore"):
        log_sum_exp = finite + np.log(total)
    return merged.astype(parts[0].dtype), log_sum_exp.astype(np.float32)
