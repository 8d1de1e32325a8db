"""Core and layer models as `attnserve-export` writes them, without PyTorch's exporter.

For tests in which a model is served and its export is not what is tested: the exporter takes a
second for each graph, ONNX's text format (https://onnx.ai/onnx/repo-docs/Syntax.html) next to
nothing. Variants, their inputs and outputs, and the manifest are the exporter's own, and each graph
is verified as an exported one is; `export/tests/test_handmade.py` compares them with exports.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import attnserve_kernels
import numpy as np
import onnx
import torch
from attnserve_export import cases, graphs, runtime
from attnserve_export.attention.blocked import blocked_attention
from attnserve_export.attention.core import (
    BLOCKED,
    BLOCKED_SINKS,
    CUDNN,
    DOMAIN,
    FLASH,
    PACKED_CORES,
    AttentionConfig,
    BlockedCore,
    BlockedSinksCore,
    CappedCore,
    CappedSinksCore,
    CudnnCore,
    FlashCore,
    FusedCore,
    PagedCore,
    SinksCore,
    SoftcapCore,
    default_scale,
)
from attnserve_export.attention.flash import OPSET as FLASH_OPSET
from attnserve_export.attention.flash import cudnn_attention, flash_attention
from attnserve_export.attention.layer import AttentionLayer
from attnserve_export.attention.packed import packed_attention
from attnserve_export.attention.packed_layer import packed_layer
from attnserve_export.attention.paged import paged_attention
from attnserve_export.attention.paged_layer import paged_layer
from attnserve_export.attention.text import exact, joined
from attnserve_export.attention.variants import (
    CPU,
    DIAGNOSTICS,
    VariantSpec,
    core_specs,
    layer_specs,
)
from attnserve_export.exporting import Description, Exported, write_version
from attnserve_export.graphs import Graph
from attnserve_export.models import attention_info
from attnserve_export.verification import Case
from attnserve_proto.manifest import Layer
from onnx import numpy_helper
from torch.nn import MultiheadAttention

_TYPES = {"FP32": "float", "FP16": "float16", "BF16": "bfloat16"}
_BIAS = "bias_batch, bias_heads, bias_queries, bias_keys"
_REFERENCE = "attention in float64 (attnserve_export.reference)"


def attention(num_heads: int, head_dim: int, **others: Any) -> AttentionConfig:
    """A config; what isn't given is as the command line has it."""
    given = {"num_kv_heads": num_heads, "value_head_dim": head_dim, "mask": "bidirectional"}
    given |= {"scale": default_scale(head_dim)}
    return AttentionConfig(num_heads=num_heads, head_dim=head_dim, **given | others)


def write_core(
    out: Path, name: str, config: AttentionConfig, *, dtype: str = "FP32", version: int = 1
) -> None:
    """Write a core model into a repository."""
    specs = core_specs(config, dtype, native=attnserve_kernels.library_path() is not None)

    def make(variant: str, generator: np.random.Generator) -> Iterable[Case]:
        spec = specs[variant]
        return cases.core_cases(config, _verified(spec, dtype), spec, generator)

    _write(
        Description(
            name, version, "core", dtype, attention_info(config), {"description": "no parameters"}
        ),
        specs,
        lambda spec, verified: core_graph(config, spec, verified),
        out,
        make,
    )


def write_layer(
    out: Path,
    name: str,
    module: AttentionLayer | MultiheadAttention,
    *,
    mask: str = "",
    variants: Collection[str] | None = None,
) -> None:
    """Write a layer in FP32 into a repository.

    Args:
        out: the repository.
        name: of the model.
        module: the layer.
        mask: of a `MultiheadAttention`.
        variants: those to write; None: all.
    """
    is_own = isinstance(module, AttentionLayer)
    layer = module if is_own else AttentionLayer.of_multihead(module, mask)
    config = layer.config
    native = attnserve_kernels.library_path() is not None
    specs = layer_specs(config.attention, "FP32", native=native)
    if variants is not None:
        specs = {name: spec for name, spec in specs.items() if name in variants}
    original = copy.deepcopy(module).eval().double()

    def make(variant: str, generator: np.random.Generator) -> Iterable[Case]:
        return cases.layer_cases(layer, original, "FP32", specs[variant], generator)

    _write(
        Description(
            name,
            1,
            "layer",
            "FP32",
            attention_info(config.attention),
            {"description": "random", "module": "attnserve" if is_own else "multihead"},
            layer=Layer(config.embed_dim, config.context_dim),
        ),
        specs,
        lambda spec, _: _layer_graph(layer, spec),
        out,
        make,
    )


def _write(
    description: Description,
    specs: Mapping[str, VariantSpec],
    graph: Callable[[VariantSpec, str], onnx.ModelProto],
    out: Path,
    make: Callable[[str, np.random.Generator], Iterable[Case]],
) -> None:
    variants = {}
    for name, spec in specs.items():
        verified = _verified(spec, description.dtype)
        variants[name] = Exported(
            Graph(graph(spec, description.dtype)),
            spec.memory,
            spec.providers,
            spec.native,
            verified_as=None if verified == description.dtype else Graph(graph(spec, verified)),
        )
    with torch.inference_mode():
        write_version(
            description,
            variants,
            out / description.name / str(description.version),
            cases=make,
            reference=_REFERENCE,
            extra_files={},
            progress=lambda _: None,
        )


def _verified(spec: VariantSpec, dtype: str) -> str:
    return dtype if CPU in spec.providers else "FP32"


def core_graph(config: AttentionConfig, spec: VariantSpec, dtype: str) -> onnx.ModelProto:
    """The graph of one variant of a core model."""
    if spec.core is PagedCore:
        return paged_attention(config, dtype, runtime.MIN_OPSET)
    if spec.core in PACKED_CORES:
        return packed_attention(config, spec.inputs, spec.outputs, dtype, runtime.MIN_OPSET)
    kind, c = _TYPES[dtype], config
    own = [
        f"{kind}[batch, {c.num_heads}, query_len, {c.head_dim}] query",
        f"{kind}[batch, {c.num_kv_heads}, key_len, {c.head_dim}] key",
        f"{kind}[batch, {c.num_kv_heads}, key_len, {c.value_head_dim}] value",
    ]
    output = f"{kind}[batch, {c.num_heads}, query_len, {c.value_head_dim}] output"
    model = _model(
        config, spec, kind, own[: 3 if spec.takes_value else 2], output, _core(config, spec)
    )
    if spec.native:
        graphs.free_heads(model, DOMAIN)
    return model


def _layer_graph(layer: AttentionLayer, spec: VariantSpec) -> onnx.ModelProto:
    if spec.core is PagedCore:
        return paged_layer(layer, "FP32", runtime.MIN_OPSET)
    if spec.core in PACKED_CORES:
        return packed_layer(layer, spec.inputs, spec.outputs, "FP32", runtime.MIN_OPSET)
    config, c = layer.config, layer.config.attention
    cross = config.context_dim is not None
    own = [f"float[batch, query_len, {config.embed_dim}] hidden_states"]
    if cross:
        own.append(f"float[batch, key_len, {config.context_dim}] context")
    source = "context" if cross else "hidden_states"
    lines = []
    for name, given, heads in (
        ("query", "hidden_states", c.num_heads),
        ("key", source, c.num_kv_heads),
        ("value", source, c.num_kv_heads),
    )[: 3 if spec.takes_value else 2]:
        lines += [
            f"{name}_product = MatMul ({given}, {name[0]}_weight)",
            f"{name}_projected = Add ({name}_product, {name[0]}_bias)",
            f"{name}_split = Constant <value_ints = [0, 0, {heads}, -1]> ()",
            f"{name}_rows = Reshape ({name}_projected, {name}_split)",
            f"{name} = Transpose <perm = [0, 2, 1, 3]> ({name}_rows)",
        ]
    lines += _core(c, spec, result="heads_output")
    if spec.takes_value:
        lines += [
            "output_rows = Transpose <perm = [0, 2, 1, 3]> (heads_output)",
            "merge = Constant <value_ints = [0, 0, -1]> ()",
            "merged = Reshape (output_rows, merge)",
            "output_product = MatMul (merged, o_weight)",
            "output = Add (output_product, o_bias)",
        ]
    output = f"float[batch, query_len, {config.embed_dim}] output"
    key_len = "key_len" if cross else "query_len"
    model = _model(c, spec, "float", own, output, lines, key_len)
    for name in "qkvo" if spec.takes_value else "qk":
        projection = getattr(layer, f"{name}_proj")
        for part, array in (("weight", projection.weight.T), ("bias", projection.bias)):
            content = np.ascontiguousarray(array.detach().numpy())
            model.graph.initializer.append(numpy_helper.from_array(content, f"{name}_{part}"))
    return model


def _model(
    config: AttentionConfig,
    spec: VariantSpec,
    kind: str,
    own: list[str],
    output: str,
    lines: list[str],
    key_len: str = "key_len",
) -> onnx.ModelProto:
    """A graph of `lines`: `own` are its first inputs, `output` is declared as given."""
    heads = config.num_heads
    inputs = {
        "key_lengths": "int64[batch] key_lengths",
        "bias": f"{kind}[{_BIAS}] bias",
        "mask": f"bool[{_BIAS.replace('bias', 'mask')}] mask",
        "prefix_lengths": "int64[batch] prefix_lengths",
        "softcap": "float[1] softcap",
        "sinks": f"float[{heads}] sinks",
        "top_k": "int64[1] top_k",
        "distances": "int64[1] distances",
    }
    outputs = {
        "output": output,
        "weights": f"{kind}[batch, {heads}, query_len, {key_len}] weights",
        "log_sum_exp": f"float[batch, {heads}, query_len] log_sum_exp",
        "entropy": f"float[batch, {heads}, query_len] entropy",
        "mass_per_key": f"float[batch, {heads}, {key_len}] mass_per_key",
        "mass_by_distance": f"float[batch, {heads}, distances] mass_by_distance",
        "top_k_indices": f"int64[batch, {heads}, query_len, top_k] top_k_indices",
        "top_k_weights": f"float[batch, {heads}, query_len, top_k] top_k_weights",
    }
    flash = spec.core in (FlashCore, CudnnCore)
    opset = FLASH_OPSET if flash else runtime.MIN_OPSET
    signature = ", ".join([*own, *(inputs[name] for name in spec.inputs)])
    results = ", ".join(outputs[name] for name in spec.outputs)
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}, "{DOMAIN}" : 1]>
        attention ({signature}) => ({results}) {{ {joined(lines)} }}"""
    )
    if spec.core is CudnnCore:
        graphs.add_function(model, cudnn_attention(config))
    if flash:
        graphs.add_function(model, flash_attention(config))
    if spec.core is BlockedCore or (flash and config.window is not None):
        graphs.add_function(model, blocked_attention(config, opset))
    if spec.core is BlockedSinksCore:
        graphs.add_function(model, blocked_attention(config, opset, sinks=True))
    return model


def _core(config: AttentionConfig, spec: VariantSpec, result: str = "output") -> list[str]:
    """From `query`, `key` and `value` to `result`, or to what else the variant gives."""
    lines, query, key = [], "query", "key"
    if config.rotary is not None:
        lines = [*_positions(config), *_turned(config, "query"), *_turned(config, "key")]
        query, key = "turned_query", "turned_key"
    lines += _own_sinks(config, spec)
    if spec.core is BlockedSinksCore:
        call = f"{DOMAIN}.{BLOCKED_SINKS} ({query}, {key}, value, key_lengths, sinks)"
        return [*lines, f"{result}, log_sum_exp = {call}"]
    functions = {BlockedCore: BLOCKED, FlashCore: FLASH, CudnnCore: CUDNN}
    if spec.core in functions:
        call = f"{DOMAIN}.{functions[spec.core]} ({query}, {key}, value, key_lengths)"
        return [*lines, f"{result} = {call}"]
    if spec.native:
        return [*lines, *_native(config, spec, query, key, result)]
    if config.rotary is None:
        lines += _positions(config)
    lines += [
        *_visible(config, prefixes="prefix_lengths" in spec.inputs),
        f"exact_query = Cast <to = 1> ({query})",
        f"given_key = Cast <to = 1> ({key})",
        "given_value = Cast <to = 1> (value)",
        # 0 where they are padding: a weight of 0 does not hide what is no number.
        "numbers_across = Reshape (numbers, column)",
        "valid = Less (numbers_across, lengths)",
        "none = Constant <value_float = 0.0> ()",
        "exact_key = Where (valid, given_key, none)",
        "exact_value = Where (valid, given_value, none)",
    ]
    make = _fused if spec.core is FusedCore else _reference
    return [*lines, *make(config, spec, result)]


def _native(
    config: AttentionConfig, spec: VariantSpec, query: str, key: str, result: str
) -> list[str]:
    """One operator of attnserve-kernels."""
    lines, mask = [], config.visibility
    attributes = ", ".join(
        (
            f"scale = {exact(config.scale)}",
            f"softcap = {exact(config.softcap)}",
            f"left = {-1 if mask.left is None else mask.left}",
            f"right = {-1 if mask.right is None else mask.right}",
            f"bottom_right = {int(mask.bottom_right)}",
            f"chunk = {mask.chunk or 0}",
        )
    )
    slopes = ""
    if config.slopes is not None:
        slopes = "slopes"
        lines.append(f"slopes = Constant <value_floats = [{_floats(config.slopes)}]> ()")
    last = [slopes, *(name if name in spec.inputs else "" for name in ("softcap", "mask"))]
    last.append("prefix_lengths" if "prefix_lengths" in spec.inputs else "")
    if "sinks" in spec.inputs or config.sinks is not None:
        last += ["", "", "sinks"]
    if spec.outputs == DIAGNOSTICS:
        given = [query, key, "key_lengths", "top_k", "distances", "bias", *last]
        call = f"AttentionDiagnostics <{attributes}> ({', '.join(given)})"
        return [*lines, f"{', '.join(DIAGNOSTICS)} = {DOMAIN}.{call}"]
    given = [query, key, "value", "key_lengths", "bias", *last]
    call = f"{DOMAIN}.Attention <{attributes}> ({', '.join(given)})"
    return [*lines, f"{result}, log_sum_exp = {call}"]


def _own_sinks(config: AttentionConfig, spec: VariantSpec) -> list[str]:
    """`sinks` of a graph that has some, but no input for them."""
    if config.sinks is None or "sinks" in spec.inputs:
        return []
    return [f"sinks = Constant <value_floats = [{_floats(config.sinks)}]> ()"]


def _positions(config: AttentionConfig) -> list[str]:
    """`positions` of the queries [B, 1, Sq, 1] and `numbers` of the keys [1, 1, 1, Sk]."""
    bottom_right = config.visibility.bottom_right
    return [
        "query_len = Shape <start = 2, end = 3> (query)",
        "key_len = Shape <start = 2, end = 3> (key)",
        "zero = Constant <value_int = 0> ()",
        "one = Constant <value_int = 1> ()",
        "scalar = Constant <value_ints: ints = []> ()",
        "query_end = Reshape (query_len, scalar)",
        "key_end = Reshape (key_len, scalar)",
        "query_range = Range (zero, query_end, one)",
        "key_range = Range (zero, key_end, one)",
        "by_sequence = Constant <value_ints = [-1, 1, 1, 1]> ()",
        "column = Constant <value_ints = [1, 1, -1, 1]> ()",
        "row = Constant <value_ints = [1, 1, 1, -1]> ()",
        "lengths = Reshape (key_lengths, by_sequence)",
        "queries = Reshape (query_range, column)",
        "numbers = Reshape (key_range, row)",
        f"offsets = {'Sub (lengths, query_len)' if bottom_right else 'Mul (lengths, zero)'}",
        "positions = Add (queries, offsets)",
    ]


def _turned(config: AttentionConfig, name: str) -> list[str]:
    """Rotary embedding of whole heads, in halves."""
    rotary = config.rotary
    assert rotary is not None
    if rotary.style != "half" or rotary.dims != config.head_dim:
        raise NotImplementedError(rotary)
    wavelengths = [rotary.base ** -(i / rotary.dims) for i in range(0, rotary.dims, 2)]
    at = "positions" if name == "query" else f"{name}_numbers"
    lines = [] if name == "query" else [f"{at} = Reshape (numbers, column)"]
    return [
        *lines,
        f"{name}_at = Cast <to = 1> ({at})",
        f"{name}_rates = Constant <value_floats = [{_floats(wavelengths)}]> ()",
        f"{name}_angles = Mul ({name}_at, {name}_rates)",
        f"{name}_cosine = Cos ({name}_angles)",
        f"{name}_sine = Sin ({name}_angles)",
        f"{name}_first, {name}_second = Split <axis = 3, num_outputs = 2> ({name})",
        f"{name}_a = Mul ({name}_first, {name}_cosine)",
        f"{name}_b = Mul ({name}_second, {name}_sine)",
        f"{name}_c = Mul ({name}_second, {name}_cosine)",
        f"{name}_d = Mul ({name}_first, {name}_sine)",
        f"{name}_left = Sub ({name}_a, {name}_b)",
        f"{name}_right = Add ({name}_c, {name}_d)",
        f"turned_{name} = Concat <axis = 3> ({name}_left, {name}_right)",
    ]


def _visible(config: AttentionConfig, *, prefixes: bool) -> list[str]:
    """Which keys each query sees: from `first` to before `end` [B, 1, Sq, 1]."""
    mask = config.visibility
    if mask.chunk is not None:
        raise NotImplementedError(mask)
    lines = ["nothing = Mul (positions, zero)"]
    if mask.left is None:
        lines.append("first = Identity (nothing)")
    else:
        lines += [
            f"left = Constant <value_int = {mask.left}> ()",
            "reach_left = Sub (positions, left)",
            "first = Max (reach_left, zero)",
        ]
    if mask.right is None:
        lines.append("end = Add (lengths, nothing)")
    else:
        lines += [
            f"right = Constant <value_int = {mask.right + 1}> ()",
            "reach_right = Add (positions, right)",
            "end = Min (reach_right, lengths)",
        ]
    return [
        *lines,
        "from_first = GreaterOrEqual (numbers, first)",
        "before_end = Less (numbers, end)",
        f"{'in_range' if prefixes else 'visible'} = And (from_first, before_end)",
        *(_prefix_lines() if prefixes else ()),
    ]


def _prefix_lines() -> list[str]:
    return [
        "prefixes = Reshape (prefix_lengths, by_sequence)",
        "valid_prefixes = Min (prefixes, lengths)",
        "in_prefix = Less (numbers, valid_prefixes)",
        "visible = Or (in_range, in_prefix)",
    ]


def _fused(config: AttentionConfig, _: VariantSpec, result: str) -> list[str]:
    """ONNX's own Attention."""
    return [
        f"""attended = Attention <scale = {exact(config.scale)}>
            (exact_query, exact_key, exact_value, visible)""",
        "some = Less (first, end)",
        "seen = Where (some, attended, none)",
        f"{result} = CastLike (seen, query)",
    ]


def _reference(config: AttentionConfig, spec: VariantSpec, result: str) -> list[str]:
    """Plain operators, with a bias; the weights too."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    lines = [
        f"scale = Constant <value_float = {exact(config.scale)}> ()",
        "scaled = Mul (exact_query, scale)",
        # Heads that share keys are rows of one product.
        f"by_key_head = Constant <value_ints = [0, {kv_heads}, -1, {config.head_dim}]> ()",
        "grouped = Reshape (scaled, by_key_head)",
        "keys_across = Transpose <perm = [0, 1, 3, 2]> (exact_key)",
        "products = MatMul (grouped, keys_across)",
        f"batch_and_heads = Constant <value_ints = [0, {heads}]> ()",
        "weights_shape = Concat <axis = 0> (batch_and_heads, query_len, key_len)",
        "raw = Reshape (products, weights_shape)",
    ]
    scores = "raw"
    if spec.core in (CappedCore, CappedSinksCore, SoftcapCore):
        cap = "softcap"
        if spec.core is not SoftcapCore:
            cap = "cap"
            lines.append(f"cap = Constant <value_float = {exact(config.softcap)}> ()")
        lines += [
            f"relative = Div (raw, {cap})",
            "bent = Tanh (relative)",
            f"capped = Mul (bent, {cap})",
        ]
        scores = "capped"
    lines += ["exact_bias = Cast <to = 1> (bias)", f"biased = Add ({scores}, exact_bias)"]
    scores = "biased"
    if config.slopes is not None:
        lines += [
            f"slopes = Constant <value_floats = [{_floats(config.slopes)}]> ()",
            "by_head = Constant <value_ints = [1, -1, 1, 1]> ()",
            "slope = Reshape (slopes, by_head)",
            "signed = Sub (positions, numbers)",
            "apart = Abs (signed)",
            "distance = Cast <to = 1> (apart)",
            "penalty = Mul (distance, slope)",
            "inclined = Sub (biased, penalty)",
        ]
        scores = "inclined"
    return [
        *lines,
        "minus_one = Constant <value_float = -1.0> ()",
        "hidden = Div (minus_one, none)",
        f"masked = Where (visible, {scores}, hidden)",
        "last_axis = Constant <value_ints = [-1]> ()",
        *_weights(config, spec),
        "products_shape = Shape (products)",
        "grouped_weights = Reshape (exact_weights, products_shape)",
        "sums = MatMul (grouped_weights, exact_value)",
        f"output_width = Constant <value_ints = [{config.value_head_dim}]> ()",
        "output_shape = Concat <axis = 0> (batch_and_heads, query_len, output_width)",
        "exact_output = Reshape (sums, output_shape)",
        f"{result} = CastLike (exact_output, query)",
        "weights = CastLike (exact_weights, query)",
    ]


def _weights(config: AttentionConfig, spec: VariantSpec) -> list[str]:
    """From `masked` scores to `exact_weights`, and the log-sum-exp where a variant gives it."""
    if not issubclass(spec.core, SinksCore):
        return [
            "highest = ReduceMax <keepdims = 1> (masked, last_axis)",
            "unseeing = Equal (highest, hidden)",
            "normal = Softmax <axis = -1> (masked)",
            "exact_weights = Where (unseeing, none, normal)",
        ]
    lines = ["highest_score = ReduceMax <keepdims = 1> (masked, last_axis)"]
    highest, total = "highest_score", "total_of_keys"
    sinks = "sinks" in spec.inputs or config.sinks is not None
    if sinks:
        highest, total = "highest", "total"
        lines += [
            "heads_of_sinks = Constant <value_ints = [1, -1, 1, 1]> ()",
            "sinks4 = Reshape (sinks, heads_of_sinks)",
            "highest = Max (highest_score, sinks4)",
        ]
    lines += [
        f"unseeing = Equal ({highest}, hidden)",
        f"finite = Where (unseeing, none, {highest})",
        "below = Sub (masked, finite)",
        "exponentials = Exp (below)",
        "total_of_keys = ReduceSum <keepdims = 1> (exponentials, last_axis)",
    ]
    if sinks:
        lines += [
            "sink_below = Sub (sinks4, finite)",
            "of_sink = Exp (sink_below)",
            "total = Add (total_of_keys, of_sink)",
        ]
    return [
        *lines,
        "unit = Constant <value_float = 1.0> ()",
        f"some_total = Where (unseeing, unit, {total})",
        "exact_weights = Div (exponentials, some_total)",
        f"log_total = Log ({total})",
        "rows4 = Add (finite, log_total)",
        "log_sum_exp = Squeeze (rows4, last_axis)",
    ]


def _floats(numbers: Iterable[float]) -> str:
    return ", ".join(map(exact, numbers))
