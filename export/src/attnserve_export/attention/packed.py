"""The variants `packed` and `packed_diagnostics`: sequences that lie one after another in one row.

No query sees keys of another sequence, and nothing is padded: the time is that of the sequences by
themselves. Positions count from each sequence's first token. Written as it is: nothing is traced.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from attnserve_export.attention.core import DOMAIN, AttentionConfig, Core
from attnserve_export.attention.paged import TYPES, nodes, turning

_STARTS = ("cu_seqlens_q", "cu_seqlens_k")
# Inputs of both operators after those that carry the heads, where they are for packed sequences.
_LAST = ("bias", "slopes", "softcap", "mask", "prefix_lengths", *_STARTS, "sinks")


def packed_inputs(others: Sequence[str]) -> tuple[str, ...]:
    """Inputs of a graph, after those that carry the heads."""
    return (*_STARTS, *others)


def packed_attention(
    config: AttentionConfig, inputs: Sequence[str], outputs: Sequence[str], dtype: str, opset: int
) -> onnx.ModelProto:
    """The graph of a core model's variant.

    Args:
        config: the attention.
        inputs: as `packed_inputs`.
        outputs: `output` and `log_sum_exp`, or those of a diagnosis.
        dtype: of query, key and value: "FP32", "FP16" or "BF16".
        opset: of the default domain.
    """
    kind = TYPES[dtype]
    diagnosis = "output" not in outputs
    own: dict[str, tuple[int, tuple[str | int, ...]]] = {
        "query": (kind, (1, config.num_heads, "query_len", config.head_dim)),
        "key": (kind, (1, config.num_kv_heads, "key_len", config.head_dim)),
    }
    if not diagnosis:
        own["value"] = (kind, (1, config.num_kv_heads, "key_len", config.value_head_dim))
    lines = list[str]()
    given = {name: name for name in (*own, *inputs)}
    if config.rotary is not None:
        # FP32, which the operator then takes everything in.
        lines += _turned(config)
        given |= {name: f"turned_{name}" for name in ("query", "key")}
        for name in ("value", "bias"):
            if name in given:
                lines.append(f"exact_{name} = Cast <to = 1> ({name})")
                given[name] = f"exact_{name}"
    weights = list[TensorProto]()
    if config.slopes is not None:
        given["slopes"] = "slopes"
        weights.append(numpy_helper.from_array(np.array(config.slopes, np.float32), "slopes"))
    # No key_lengths: the starts say where sequences end.
    first = (
        ("query", "key", "", "top_k", "distances") if diagnosis else ("query", "key", "value", "")
    )
    rounded = config.rotary is not None and not diagnosis
    node = helper.make_node(
        "AttentionDiagnostics" if diagnosis else "Attention",
        [given.get(name, "") for name in (*first, *_LAST)],
        ["exact_output", *outputs[1:]] if rounded else list(outputs),
        name="packed",
        domain=DOMAIN,
    )
    for name, value in Core(config).attributes().items():
        node.attribute.append(helper.make_attribute(name, value))
    last = [f"output = Cast <to = {kind}> (exact_output)"] if rounded else []
    shapes: dict[str, tuple[int, tuple[str | int, ...]]] = {
        **own,
        **dict.fromkeys(_STARTS, (TensorProto.INT64, ("sequences_and_end",))),
        "prefix_lengths": (TensorProto.INT64, ("sequences",)),
        "bias": (kind, (1, "bias_heads", "bias_queries", "bias_keys")),
        "mask": (TensorProto.BOOL, (1, "mask_heads", "mask_queries", "mask_keys")),
        "softcap": (TensorProto.FLOAT, (1,)),
        "sinks": (TensorProto.FLOAT, (config.num_heads,)),
        "top_k": (TensorProto.INT64, (1,)),
        "distances": (TensorProto.INT64, (1,)),
        "output": (kind, (1, config.num_heads, "query_len", config.value_head_dim)),
        "log_sum_exp": (TensorProto.FLOAT, (1, config.num_heads, "query_len")),
        **_diagnostics_shapes(config.num_heads),
    }

    def described(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, *shapes[name]) for name in names]

    graph = helper.make_graph(
        [*nodes(lines), node, *nodes(last)],
        "packed",
        described((*own, *inputs)),
        described(outputs),
        weights,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _diagnostics_shapes(heads: int) -> dict[str, tuple[int, tuple[str | int, ...]]]:
    return {
        "entropy": (TensorProto.FLOAT, (1, heads, "query_len")),
        "mass_per_key": (TensorProto.FLOAT, (1, heads, "key_len")),
        "mass_by_distance": (TensorProto.FLOAT, ("sequences", heads, "distances")),
        "top_k_indices": (TensorProto.INT64, (1, heads, "query_len", "top_k")),
        "top_k_weights": (TensorProto.FLOAT, (1, heads, "query_len", "top_k")),
    }


def _turned(config: AttentionConfig) -> list[str]:
    """From query and key [1, heads, T, D] to `turned_...`, by positions within their sequences."""
    rotary = config.rotary
    assert rotary is not None
    attributes = f"interleaved = {int(rotary.style == 'interleaved')}"
    if rotary.dims != config.head_dim:
        attributes += f", rotary_embedding_dim = {rotary.dims}, num_heads = {config.num_heads}"
    lines = [
        "none = Constant <value_int = 0> ()",
        "unit = Constant <value_int = 1> ()",
        "first_axis = Constant <value_ints = [0]> ()",
        "from_second = Constant <value_ints = [1]> ()",
        "to_last = Constant <value_ints = [-1]> ()",
        "to_end = Constant <value_ints = [9223372036854775807]> ()",
    ]
    for name, starts in zip(("query", "key"), _STARTS, strict=True):
        lines += [
            f"{name}_count = Shape <start = 2, end = 3> ({name})",
            f"{name}_tokens = Squeeze ({name}_count, first_axis)",
            f"{name}_all = Range (none, {name}_tokens, unit)",
            # The sequence of each token: how many have ended up to there.
            f"{name}_ends = Slice ({starts}, from_second, to_end, first_axis)",
            f"{name}_begins = Slice ({starts}, first_axis, to_last, first_axis)",
            f"{name}_room = Add ({name}_count, from_second)",
            f"{name}_zeros = ConstantOfShape <value = int64[1] {{0}}> ({name}_room)",
            f"{name}_ends_shape = Shape ({name}_ends)",
            f"{name}_ones = ConstantOfShape <value = int64[1] {{1}}> ({name}_ends_shape)",
            f'{name}_ended = ScatterElements <reduction = "add"> '
            f"({name}_zeros, {name}_ends, {name}_ones)",
            f"{name}_so_far = CumSum ({name}_ended, none)",
            f"{name}_of = Slice ({name}_so_far, first_axis, to_last, first_axis)",
            f"{name}_begin = Gather ({name}_begins, {name}_of)",
            f"{name}_within = Sub ({name}_all, {name}_begin)",
        ]
    if config.visibility.bottom_right:
        lines += [
            "query_lengths = Sub (query_ends, query_begins)",
            "lengths_of_keys = Sub (key_ends, key_begins)",
            "offsets = Sub (lengths_of_keys, query_lengths)",
            "offset = Gather (offsets, query_of)",
            "query_positions = Add (query_within, offset)",
        ]
    else:
        lines.append("query_positions = Identity (query_within)")
    lines.append("key_positions = Identity (key_within)")
    for name in ("query", "key"):
        lines += [
            *turning(rotary, f"{name}_"),
            f"exact_{name} = Cast <to = 1> ({name})",
            f"turned_{name} = RotaryEmbedding <{attributes}> "
            f"(exact_{name}, {name}_cosine, {name}_sine)",
        ]
    return lines
