"""The variant `paged`: attention of new tokens over keys and values that lie in pages.

Around one operator, whose inputs and pages docs/kernels.md describes, lie the projections of a
layer and the rotary embedding of query and key, which are stored turned. Written as it is: nothing
of it is traced. A session's window is an input, not the model's.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from attnserve_export.attention.core import DOMAIN, AttentionConfig
from attnserve_export.attention.positions import Rotary
from attnserve_export.attention.text import joined

# Outputs of the graph; its inputs after those that carry the tokens.
OUTPUTS = ("output", "log_sum_exp", "entropy", "weights")
OF_OPERATOR = ("cache", "starts", "lengths", "table_starts", "table", "spec", "parents")
INPUTS = (*OF_OPERATOR, "weights_of", "sinks")
# Of each new token, where query and key are turned by it.
POSITIONS = "positions"

TYPES = {"FP32": TensorProto.FLOAT, "FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}

Shape = tuple[str | int, ...]


def has_paged(config: AttentionConfig) -> bool:
    """Whether a core's config is what the operator computes.

    Positions are those of the sequence: no reach to both sides, and with rotary embedding, which
    turns new keys by the positions of the queries, only causal masks.
    """
    if config.chunk is not None:
        return False
    bounded = config.windowed or config.rotary is not None
    return config.mask == "causal" or not bounded


def has_paged_layer(config: AttentionConfig) -> bool:
    """Whether a layer of such a core can be: hidden states are query, key and value in one."""
    return config.mask == "causal" and has_paged(config)


def paged_inputs(config: AttentionConfig) -> tuple[str, ...]:
    """Inputs of a config's graph, after those that carry the tokens."""
    return INPUTS if config.rotary is None else (POSITIONS, *INPUTS)


def paged_attention(config: AttentionConfig, dtype: str, opset: int) -> onnx.ModelProto:
    """The graph of a core model's variant.

    Args:
        config: the attention, for which `has_paged` holds.
        dtype: of query, key and value: "FP32", "FP16" or "BF16".
        opset: of the default domain.
    """
    kind = TYPES[dtype]
    own: dict[str, tuple[int, Shape]] = {
        "query": (kind, ("tokens", config.num_heads, config.head_dim)),
        "key": (kind, ("new_keys", config.num_kv_heads, config.head_dim)),
        "value": (kind, ("new_values", config.num_kv_heads, config.value_head_dim)),
    }
    output = (kind, ("tokens", config.num_heads, config.value_head_dim))
    if config.rotary is None:
        return paged_model(config, own, output, opset)
    last = [f"output = Cast <to = {kind}> (heads)"]
    return paged_model(config, own, output, opset, after=last)


def paged_model(
    config: AttentionConfig,
    own: dict[str, tuple[int, Shape]],
    output: tuple[int, Shape],
    opset: int,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    weights: Sequence[TensorProto] = (),
) -> onnx.ModelProto:
    """A graph around one operator.

    Args:
        config: of the attention.
        own: inputs that carry the tokens: type and shape.
        output: type and shape.
        opset: of the default domain.
        before: nodes that make `query`, `key` and `value` [T, heads, width] of them; none: they are
            these.
        after: nodes that make `output` of `heads` [T, H, Dv], which are FP32 with rotary embedding;
            none: it is these.
        weights: initializers.
    """
    heads, turned = ("query", "key", "value"), list[str]()
    if config.rotary is not None:
        heads = ("turned_query", "turned_key", "exact_value")
        turned = [
            *turning(config.rotary),
            *_turned(config, "query"),
            *_turned(config, "key"),
            "exact_value = Cast <to = 1> (value)",
        ]
    shapes: dict[str, tuple[int, Shape]] = {
        **own,
        POSITIONS: (TensorProto.INT64, ("tokens",)),
        "cache": (TensorProto.UINT8, ("cache_bytes",)),
        "starts": (TensorProto.INT64, ("sequences_and_end",)),
        "lengths": (TensorProto.INT64, ("sequences",)),
        "table_starts": (TensorProto.INT64, ("sequences_and_end",)),
        "table": (TensorProto.INT64, ("pages",)),
        "spec": (TensorProto.INT64, (7,)),
        "parents": (TensorProto.INT64, ("parents",)),
        "weights_of": (TensorProto.INT64, ("weighed_sequences",)),
        "sinks": (TensorProto.FLOAT, (config.num_heads,)),
        "output": output,
        "log_sum_exp": (TensorProto.FLOAT, ("tokens", config.num_heads)),
        "entropy": (TensorProto.FLOAT, ("tokens", config.num_heads)),
        "weights": (TensorProto.FLOAT, ("weights",)),
    }
    slopes = "" if config.slopes is None else "slopes"
    node = helper.make_node(
        "PagedAttention",
        [*heads, *OF_OPERATOR, slopes, "weights_of", "sinks"],
        ["heads" if after else "output", *OUTPUTS[1:]],
        name="paged",
        domain=DOMAIN,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        value_head_dim=config.value_head_dim,
        scale=float(config.scale),
        softcap=float(config.softcap),
    )
    more = [numpy_helper.from_array(np.array(config.slopes, np.float32), "slopes")]
    graph = helper.make_graph(
        [*nodes([*before, *turned]), node, *nodes(after)],
        "paged",
        [
            helper.make_tensor_value_info(name, *shapes[name])
            for name in (*own, *paged_inputs(config))
        ],
        [helper.make_tensor_value_info(name, *shapes[name]) for name in OUTPUTS],
        [*weights, *(more if slopes else [])],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def nodes(lines: Sequence[str]) -> list[onnx.NodeProto]:
    """Nodes from their text."""
    return list(onnx.parser.parse_graph(f"nodes () => () {{ {joined(lines)} }}").node)


def turning(rotary: Rotary, of: str = "") -> list[str]:
    """From `positions` [T] to `cosine` and `sine` [1, T, dims / 2]; `of` begins all their names.

    In float64, and as turns, of which only the fractions count: so angles are as exact at the
    millionth token as at the first.
    """
    rates = [rotary.base ** -(i / rotary.dims) / (2 * math.pi) for i in range(0, rotary.dims, 2)]
    return [
        f"{of}rates = Constant <value = double[1, 1, {len(rates)}] {{{_doubles(rates)}}}> ()",
        f"{of}full_turn = Constant <value = double {{{_doubles([2 * math.pi])}}}> ()",
        f"{of}by_token = Constant <value_ints = [1, -1, 1]> ()",
        f"{of}exact_positions = Cast <to = 11> ({of}positions)",
        f"{of}rows_of_positions = Reshape ({of}exact_positions, {of}by_token)",
        f"{of}turns = Mul ({of}rows_of_positions, {of}rates)",
        f"{of}whole_turns = Floor ({of}turns)",
        f"{of}fractions = Sub ({of}turns, {of}whole_turns)",
        f"{of}exact_angles = Mul ({of}fractions, {of}full_turn)",
        f"{of}angles = Cast <to = 1> ({of}exact_angles)",
        f"{of}cosine = Cos ({of}angles)",
        f"{of}sine = Sin ({of}angles)",
    ]


def _doubles(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.17e}" for number in numbers)


def _turned(config: AttentionConfig, name: str) -> list[str]:
    """From query or key [T, heads, D] to `turned_...`, in FP32: rounding to less here would cost
    more than all that follows."""
    rotary, width = config.rotary, config.head_dim
    assert rotary is not None
    num_heads = config.num_heads if name == "query" else config.num_kv_heads
    interleaved = int(rotary.style == "interleaved")
    attributes = f"interleaved = {interleaved}, num_heads = {num_heads}"
    if rotary.dims != width:
        attributes += f", rotary_embedding_dim = {rotary.dims}"
    return [
        f"{name}_as_row = Constant <value_ints = [1, -1, {num_heads * width}]> ()",
        f"{name}_as_heads = Constant <value_ints = [-1, {num_heads}, {width}]> ()",
        f"exact_{name} = Cast <to = 1> ({name})",
        f"{name}_row = Reshape (exact_{name}, {name}_as_row)",
        f"{name}_turned = RotaryEmbedding <{attributes}> ({name}_row, cosine, sine)",
        f"turned_{name} = Reshape ({name}_turned, {name}_as_heads)",
    ]
