"""The variants `packed`, `packed_diagnostics` and `packed_weights`: sequences lie in one row.

They lie one after another. No query sees keys of another sequence, and nothing is padded: the time
is that of the sequences by themselves. Positions count from each sequence's first token. Written as
it is: nothing is traced.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from attnserve_export.attention.core import DOMAIN, AttentionConfig, Core
from attnserve_export.attention.paged import TYPES, Shape, nodes, turning

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
        outputs: `output` and `log_sum_exp`, perhaps `weights` between them, or those of a
            diagnosis.
        dtype: of query, key and value: "FP32", "FP16" or "BF16".
        opset: of the default domain.
    """
    kind = TYPES[dtype]
    own: dict[str, tuple[int, Shape]] = {
        "query": (kind, (1, config.num_heads, "query_len", config.head_dim)),
        "key": (kind, (1, config.num_kv_heads, "key_len", config.head_dim)),
    }
    if "output" in outputs:
        own["value"] = (kind, (1, config.num_kv_heads, "key_len", config.value_head_dim))
    output = (kind, (1, config.num_heads, "query_len", config.value_head_dim))
    return packed_model(config, own, output, inputs, outputs, opset)


def packed_model(
    config: AttentionConfig,
    own: dict[str, tuple[int, Shape]],
    output: tuple[int, Shape],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    parameters: Sequence[TensorProto] = (),
    key_len: str = "key_len",
) -> onnx.ModelProto:
    """A graph around the operators.

    Args:
        config: the attention.
        own: inputs that carry the tokens: type and shape.
        output: type and shape of `output`.
        inputs, outputs, opset: as in `packed_attention`.
        before: nodes that make `query`, `key` and `value` [1, heads, T, width] of the inputs; none:
            they are these.
        after: nodes that make `output` of `heads` [1, H, T, Dv]; none: it is these.
        parameters: initializers.
        key_len: what the number of keys is called.
    """
    kind, diagnosis = output[0], "output" not in outputs
    lines, parameters = list(before), list(parameters)
    given = {name: name for name in ("query", "key", "value", *inputs)}
    if config.rotary is not None:
        # FP32, which the operator then takes everything in.
        lines += _turned(config)
        given |= {name: f"turned_{name}" for name in ("query", "key")}
        for name in ("bias",) if diagnosis else ("value", "bias"):
            lines.append(f"exact_{name} = Cast <to = 1> ({name})")
            given[name] = f"exact_{name}"
    for name, numbers in (("slopes", config.slopes), ("sinks", config.sinks)):
        if numbers is not None and name not in inputs:
            given[name] = f"own_{name}"
            parameters.append(numpy_helper.from_array(np.array(numbers, np.float32), given[name]))

    def operator(name: str, first: Sequence[str], made: Sequence[str]) -> onnx.NodeProto:
        # No key_lengths: the starts say where sequences end.
        taken = [given.get(each, "") for each in (*first, *_LAST)]
        node = helper.make_node(name, taken, list(made), name=made[0], domain=DOMAIN)
        for attribute, value in Core(config).attributes().items():
            node.attribute.append(helper.make_attribute(attribute, value))
        return node

    made = nodes(lines)
    if diagnosis:
        made.append(
            operator("AttentionDiagnostics", ("query", "key", "", "top_k", "distances"), outputs)
        )
    else:
        result = "heads" if after else "output"
        exact = f"exact_{result}" if config.rotary is not None else result
        made.append(operator("Attention", ("query", "key", "value", ""), (exact, "log_sum_exp")))
        if config.rotary is not None:
            made += nodes([f"{result} = Cast <to = {kind}> ({exact})"])
        made += nodes(after)
    if "weights" in outputs:
        given |= {"every_key": "every_key", "no_distance": "no_distance"}
        made += nodes(
            [
                "every_key = Shape <start = 2, end = 3> (key)",
                "no_distance = Constant <value_ints = [0]> ()",
            ]
        )
        said = ("all_entropy", "all_mass", "all_by_distance", "places", "heaviest")
        first = ("query", "key", "", "every_key", "no_distance")
        made.append(operator("AttentionDiagnostics", first, said))
        # All keys of a query, the heaviest first, back to their places.
        made += nodes(
            [
                "weights_shape = Shape (places)",
                "nothing = ConstantOfShape <value = float[1] {0}> (weights_shape)",
                "exact_weights = ScatterElements <axis = 3> (nothing, places, heaviest)",
                f"weights = Cast <to = {kind}> (exact_weights)",
            ]
        )
    heads = config.num_heads
    shapes: dict[str, tuple[int, Shape]] = {
        **own,
        **dict.fromkeys(_STARTS, (TensorProto.INT64, ("sequences_and_end",))),
        "prefix_lengths": (TensorProto.INT64, ("sequences",)),
        "bias": (kind, (1, "bias_heads", "bias_queries", "bias_keys")),
        "mask": (TensorProto.BOOL, (1, "mask_heads", "mask_queries", "mask_keys")),
        "softcap": (TensorProto.FLOAT, (1,)),
        "sinks": (TensorProto.FLOAT, (heads,)),
        "top_k": (TensorProto.INT64, (1,)),
        "distances": (TensorProto.INT64, (1,)),
        "output": output,
        "weights": (kind, (1, heads, "query_len", key_len)),
        "log_sum_exp": (TensorProto.FLOAT, (1, heads, "query_len")),
        **_diagnostics_shapes(heads, key_len),
    }

    def described(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, *shapes[name]) for name in names]

    graph = helper.make_graph(
        made, "packed", described((*own, *inputs)), described(outputs), parameters
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _diagnostics_shapes(heads: int, key_len: str) -> dict[str, tuple[int, Shape]]:
    return {
        "entropy": (TensorProto.FLOAT, (1, heads, "query_len")),
        "mass_per_key": (TensorProto.FLOAT, (1, heads, key_len)),
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
