"""The variant `paged`: attention of new tokens over keys and values that lie in pages.

One node, written as it is: nothing of it is traced. Its inputs and pages are those of the operator
PagedAttention (docs/kernels.md); a session's window is an input, not the model's.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from attnserve_export.attention.core import DOMAIN, AttentionConfig

# Outputs of the graph; after query, key and value, its inputs.
OUTPUTS = ("output", "log_sum_exp", "entropy")
INPUTS = ("cache", "starts", "lengths", "table_starts", "table", "spec", "parents")

_TYPES = {"FP32": TensorProto.FLOAT, "FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}


def has_paged(config: AttentionConfig) -> bool:
    """Whether a config is what the operator computes.

    Keys are stored as they are given and positions are those of the sequence: neither rotary
    embedding nor a reach to both sides.
    """
    bounded = config.windowed and config.mask != "causal"
    return config.rotary is None and not bounded


def paged_attention(config: AttentionConfig, dtype: str, opset: int) -> onnx.ModelProto:
    """The graph of a core model's variant.

    Args:
        config: the attention, for which `has_paged` holds.
        dtype: of query, key and value: "FP32", "FP16" or "BF16".
        opset: of the default domain.
    """
    kind = _TYPES[dtype]
    query_row = (config.num_heads, config.head_dim)
    shapes: dict[str, tuple[int, tuple[str | int, ...]]] = {
        "query": (kind, ("tokens", *query_row)),
        "key": (kind, ("new_keys", config.num_kv_heads, config.head_dim)),
        "value": (kind, ("new_keys", config.num_kv_heads, config.value_head_dim)),
        "cache": (TensorProto.UINT8, ("cache_bytes",)),
        "starts": (TensorProto.INT64, ("sequences_and_end",)),
        "lengths": (TensorProto.INT64, ("sequences",)),
        "table_starts": (TensorProto.INT64, ("sequences_and_end",)),
        "table": (TensorProto.INT64, ("pages",)),
        "spec": (TensorProto.INT64, (5,)),
        "parents": (TensorProto.INT64, ("parents",)),
        "output": (kind, ("tokens", config.num_heads, config.value_head_dim)),
        "log_sum_exp": (TensorProto.FLOAT, ("tokens", config.num_heads)),
        "entropy": (TensorProto.FLOAT, ("tokens", config.num_heads)),
    }
    inputs = ["query", "key", "value", *INPUTS]
    slopes = [] if config.slopes is None else ["slopes"]
    node = helper.make_node(
        "PagedAttention",
        [*inputs, *slopes],
        OUTPUTS,
        name="paged",
        domain=DOMAIN,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        value_head_dim=config.value_head_dim,
        scale=float(config.scale),
        softcap=float(config.softcap),
    )
    graph = helper.make_graph(
        [node],
        "paged",
        [helper.make_tensor_value_info(name, *shapes[name]) for name in inputs],
        [helper.make_tensor_value_info(name, *shapes[name]) for name in OUTPUTS],
        [numpy_helper.from_array(_floats(config.slopes), "slopes")] if config.slopes else [],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _floats(slopes: list[float]) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    return np.array(slopes, np.float32)
