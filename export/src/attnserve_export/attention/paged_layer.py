"""The variant `paged` of layers: projections around the operator of `attention.paged`."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from attnserve_export.attention.layer import AttentionLayer
from attnserve_export.attention.paged import TYPES, paged_model


def paged_layer(layer: AttentionLayer, dtype: str, opset: int) -> onnx.ModelProto:
    """The graph of a layer model's variant.

    Args:
        layer: with its parameters in the dtype, and a config for which `has_paged_layer` holds.
        dtype: of the hidden states: "FP32" or "FP16".
        opset: of the default domain.
    """
    config, kind = layer.config.attention, TYPES[dtype]
    hidden = (kind, ("tokens", layer.config.embed_dim))
    lines, weights = list[str](), list[TensorProto]()
    for name, num_heads, width in (
        ("query", config.num_heads, config.head_dim),
        ("key", config.num_kv_heads, config.head_dim),
        ("value", config.num_kv_heads, config.value_head_dim),
    ):
        lines += [
            _projected(layer, name[0], "hidden_states", f"{name}_rows", weights),
            f"{name}_shape = Constant <value_ints = [-1, {num_heads}, {width}]> ()",
            f"{name} = Reshape ({name}_rows, {name}_shape)",
        ]
    # The operator gives FP32 where heads were turned.
    last = [
        f"rows = Cast <to = {kind}> (heads)",
        f"merge = Constant <value_ints = [-1, {config.num_heads * config.value_head_dim}]> ()",
        "merged = Reshape (rows, merge)",
        _projected(layer, "o", "merged", "output", weights),
    ]
    return paged_model(config, {"hidden_states": hidden}, hidden, opset, lines, last, weights)


def _projected(
    layer: AttentionLayer, letter: str, given: str, result: str, weights: list[TensorProto]
) -> str:
    """A node that projects `given` [T, ...] to `result`; its parameters go to `weights`."""
    projection = getattr(layer, f"{letter}_proj")
    inputs = [given]
    for part, tensor in (("weight", projection.weight.T), ("bias", projection.bias)):
        if tensor is None:
            continue
        inputs.append(f"{letter}_{part}")
        array: NDArray[np.floating] = np.ascontiguousarray(tensor.detach().numpy())
        weights.append(numpy_helper.from_array(array, inputs[-1]))
    return f"{result} = Gemm ({', '.join(inputs)})"
