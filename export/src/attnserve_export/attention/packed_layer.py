"""The same variants of layers: projections around the operators of `attention.packed`."""

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from attnserve_export.attention.layer import AttentionLayer
from attnserve_export.attention.packed import packed_model
from attnserve_export.attention.paged import TYPES, Shape


def packed_layer(
    layer: AttentionLayer, inputs: Sequence[str], outputs: Sequence[str], dtype: str, opset: int
) -> onnx.ModelProto:
    """The graph of a layer model's variant.

    Args:
        layer: with its parameters in the dtype.
        inputs, outputs, opset: as in `packed_attention`.
        dtype: of the hidden states: "FP32" or "FP16".
    """
    config, kind = layer.config.attention, TYPES[dtype]
    own: dict[str, tuple[int, Shape]] = {
        "hidden_states": (kind, (1, "query_len", layer.config.embed_dim))
    }
    source, key_len = "hidden_states", "query_len"
    if layer.config.context_dim is not None:
        source, key_len = "context", "key_len"
        own["context"] = (kind, (1, key_len, layer.config.context_dim))
    lines, after, parameters = list[str](), list[str](), list[TensorProto]()
    projected = [("query", "hidden_states", config.num_heads), ("key", source, config.num_kv_heads)]
    if "output" in outputs:
        projected.append(("value", source, config.num_kv_heads))
        after = [
            "rows = Transpose <perm = [0, 2, 1, 3]> (heads)",
            "merge = Constant <value_ints = [0, 0, -1]> ()",
            "merged = Reshape (rows, merge)",
            *_projected(layer, "o", "merged", "output", parameters),
        ]
    for name, given, heads in projected:
        lines += [
            *_projected(layer, name[0], given, f"{name}_rows", parameters),
            f"{name}_split = Constant <value_ints = [0, 0, {heads}, -1]> ()",
            f"{name}_apart = Reshape ({name}_rows, {name}_split)",
            f"{name} = Transpose <perm = [0, 2, 1, 3]> ({name}_apart)",
        ]
    output = (kind, (1, "query_len", layer.config.embed_dim))
    return packed_model(
        config, own, output, inputs, outputs, opset, lines, after, parameters, key_len
    )


def _projected(
    layer: AttentionLayer, letter: str, given: str, result: str, parameters: list[TensorProto]
) -> list[str]:
    """Nodes that project `given` [1, T, ...] to `result`; what they need goes to `parameters`."""
    projection, product = getattr(layer, f"{letter}_proj"), f"{result}_product"
    for part, tensor in (("weight", projection.weight.T), ("bias", projection.bias)):
        if tensor is not None:
            array: NDArray[np.floating] = np.ascontiguousarray(tensor.detach().numpy())
            parameters.append(numpy_helper.from_array(array, f"{letter}_{part}"))
    if projection.bias is None:
        return [f"{result} = MatMul ({given}, {letter}_weight)"]
    return [
        f"{product} = MatMul ({given}, {letter}_weight)",
        f"{result} = Add ({product}, {letter}_bias)",
    ]
