"""Core and layer models: their graphs, and what they are compared with."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import attnserve_kernels
import numpy as np
import onnx
import torch
from attnserve_proto.manifest import Attention, Layer, Manifest, RotaryEmbedding
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from attnserve_export import cases, graphs
from attnserve_export.attention.blocked import blocked_attention
from attnserve_export.attention.core import (
    DOMAIN,
    PACKED_CORES,
    AttentionConfig,
    BlockedCore,
    BlockedSinksCore,
    CudnnCore,
    FlashCore,
    NativeCore,
    PagedCore,
)
from attnserve_export.attention.flash import OPSET as FLASH_OPSET
from attnserve_export.attention.flash import cudnn_attention, flash_attention
from attnserve_export.attention.layer import AttentionLayer, LayerConfig, layer_module
from attnserve_export.attention.packed import packed_attention
from attnserve_export.attention.packed_layer import packed_layer
from attnserve_export.attention.paged import paged_attention
from attnserve_export.attention.paged_layer import paged_layer
from attnserve_export.attention.variants import (
    DIAGNOSTICS,
    VariantSpec,
    core_module,
    core_specs,
    layer_specs,
)
from attnserve_export.errors import ExportError
from attnserve_export.exporting import TRACED, Description, Exported, Progress, write_version
from attnserve_export.graphs import Graph, Input
from attnserve_export.runtime import CPU
from attnserve_export.verification import Case

TORCH = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}

_DIAGNOSTICS_DIMS = {
    "mass_by_distance": {2: "distances"},
    "top_k_indices": {3: "top_k"},
    "top_k_weights": {3: "top_k"},
}
_BROADCAST_DIMS = ("batch", "heads", "queries", "keys")
_REFERENCE = "attention in float64 (attnserve_export.reference)"


def export_core(
    config: AttentionConfig,
    target: Path,
    *,
    name: str,
    version: int,
    dtype: str,
    opset: int,
    progress: Progress,
) -> Manifest:
    """Export a core model.

    Args:
        config: the attention.
        target: the version's folder.
        name, version: of the model.
        dtype: "FP32", "FP16" or "BF16".
        opset: 23 or newer.
        progress: told what is going on.

    Raises:
        VerificationError: a graph missed its tolerance; nothing is written.
    """
    specs = core_specs(config, dtype, native=_native(progress))

    def graph(spec: VariantSpec, traced: str) -> onnx.ModelProto:
        return core_graph(config, spec, traced, opset)

    variants = _exported(specs, dtype, graph, progress)

    def make(variant: str, generator: np.random.Generator) -> Iterable[Case]:
        spec = specs[variant]
        return cases.core_cases(config, _verified(spec, dtype), spec, generator)

    return write_version(
        Description(
            name=name,
            version=version,
            kind="core",
            dtype=dtype,
            attention=attention_info(config),
            source={"description": "no parameters"},
        ),
        variants,
        target,
        cases=make,
        reference=_REFERENCE,
        extra_files={},
        progress=progress,
    )


def core_graph(
    config: AttentionConfig, spec: VariantSpec, dtype: str, opset: int
) -> onnx.ModelProto:
    """The graph of one variant of a core model."""
    if spec.core is PagedCore:
        return paged_attention(config, dtype, opset)
    if spec.core in PACKED_CORES:
        return packed_attention(config, spec.inputs, spec.outputs, dtype, opset)
    own = _heads(config, dtype)[: 3 if spec.takes_value else 2]
    return _graph(core_module(config, spec), spec, own, config, dtype, opset)


def export_layer(
    module: AttentionLayer | nn.MultiheadAttention,
    mask: str,
    target: Path,
    *,
    name: str,
    version: int,
    dtype: str,
    opset: int,
    source: dict[str, Any],
    progress: Progress,
) -> Manifest:
    """Export an attention layer with its projections.

    Args:
        module: the layer, in FP32.
        mask: of a `MultiheadAttention`, which has none of its own.
        target, name, version, dtype, opset, progress: as in `export_core`.
        source: where the parameters come from.

    Raises:
        ExportError: a `MultiheadAttention` that adds keys of its own.
        VerificationError: a graph missed its tolerance; nothing is written.
    """
    module = copy.deepcopy(module).to(TORCH[dtype]).eval()
    if isinstance(module, nn.MultiheadAttention):
        layer = AttentionLayer.of_multihead(module, mask).to(TORCH[dtype])
    else:
        layer = module
    config = layer.config
    cross = config.context_dim is not None
    key_len = "key_len" if cross else "query_len"
    specs = layer_specs(config.attention, dtype, native=_native(progress))

    def graph(spec: VariantSpec, traced: str) -> onnx.ModelProto:
        if spec.core is PagedCore:
            return paged_layer(layer, traced, opset)
        if spec.core in PACKED_CORES:
            return packed_layer(layer, spec.inputs, spec.outputs, traced, opset)
        own = [_input("hidden_states", traced, "batch", "query_len", config.embed_dim)]
        if config.context_dim is not None:
            own.append(_input("context", traced, "batch", "key_len", config.context_dim))
        used = layer if traced == dtype else copy.deepcopy(layer).to(TORCH[traced])
        wrapped = layer_module(used, spec)
        return _graph(wrapped, spec, own, config.attention, traced, opset, key_len)

    variants = _exported(specs, dtype, graph, progress)
    original = copy.deepcopy(module).double()

    def make(variant: str, generator: np.random.Generator) -> Iterable[Case]:
        spec = specs[variant]
        return cases.layer_cases(layer, original, _verified(spec, dtype), spec, generator)

    return write_version(
        Description(
            name=name,
            version=version,
            kind="layer",
            dtype=dtype,
            attention=attention_info(config.attention),
            source=source,
            layer=Layer(config.embed_dim, config.context_dim),
        ),
        variants,
        target,
        cases=make,
        reference=f"{_REFERENCE} with the layer's projections in float64"
        + (", itself checked against torch.nn.MultiheadAttention" if module is not layer else ""),
        extra_files={},
        progress=progress,
    )


def seeded(make: "type[AttentionLayer]", config: LayerConfig, seed: int) -> AttentionLayer:
    """A layer with random parameters that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(config)


def seeded_multihead(
    embed_dim: int, num_heads: int, context_dim: int | None, bias_terms: bool, seed: int
) -> nn.MultiheadAttention:
    """PyTorch's own module with random parameters that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.MultiheadAttention(
            embed_dim,
            num_heads,
            bias=bias_terms,
            kdim=context_dim,
            vdim=context_dim,
            batch_first=True,
        )
        # PyTorch starts these at zero, which would leave their path unverified.
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return module


def load_parameters(module: nn.Module, path: Path) -> None:
    """Load a module's parameters from a safetensors file.

    Raises:
        ExportError: a parameter is missing, unexpected or of the wrong shape.
    """
    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"--weights: {path} cannot be read: {error}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is not a parameter of the layer" for name in given if name not in wanted]
    wrong += [
        f"{name} has shape {list(given[name].shape)}, allowed: {list(shape)}"
        for name, shape in wanted.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    if wrong:
        raise ExportError(f"--weights: {path}: {'; '.join(wrong)}")
    module.load_state_dict({name: tensor.float() for name, tensor in given.items()})


def attention_info(config: AttentionConfig) -> Attention:
    """An attention for the manifest."""
    return Attention(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        value_head_dim=config.value_head_dim,
        mask=config.mask,
        window=config.window,
        window_right=config.window_right,
        alignment=config.alignment,
        alibi=config.alibi,
        rotary=None if config.rotary is None else RotaryEmbedding(**asdict(config.rotary)),
        chunk=config.chunk,
        sinks=config.sinks,
        scale=config.scale,
        softcap=config.softcap,
    )


def _exported(
    specs: Mapping[str, VariantSpec],
    dtype: str,
    graph: Callable[[VariantSpec, str], onnx.ModelProto],
    progress: Progress,
) -> dict[str, Exported]:
    """All variants; `graph` exports one in a dtype."""
    variants = {}
    for name, spec in specs.items():
        progress(f"exporting {name}")
        verified = _verified(spec, dtype)
        variants[name] = Exported(
            Graph(graph(spec, dtype)),
            spec.memory,
            spec.providers,
            spec.native,
            verified_as=None if verified == dtype else Graph(graph(spec, verified)),
        )
    return variants


def _verified(spec: VariantSpec, dtype: str) -> str:
    """The dtype that a variant is verified in."""
    return dtype if CPU in spec.providers else "FP32"


def _graph(
    module: nn.Module,
    spec: VariantSpec,
    own_inputs: list[Input],
    config: AttentionConfig,
    dtype: str,
    opset: int,
    key_len: str = "key_len",
) -> onnx.ModelProto:
    """A variant's graph; `own_inputs` carry the sequences, `key_len` names the keys' dimension."""
    more = {
        "key_lengths": _key_lengths(),
        "bias": _input("bias", dtype, "batch", config.num_heads, "query_len", key_len),
        "mask": Input(
            "mask",
            torch.ones(
                TRACED["batch"], config.num_heads, TRACED["query_len"], TRACED[key_len]
            ).bool(),
            ("batch", config.num_heads, "query_len", key_len),
        ),
        "prefix_lengths": Input(
            "prefix_lengths", torch.zeros(TRACED["batch"], dtype=torch.int64), ("batch",)
        ),
        "softcap": Input("softcap", torch.tensor([20.0]), (1,)),
        "sinks": Input("sinks", torch.zeros(config.num_heads), (config.num_heads,)),
        # Objects of their own: the exporter takes one tensor given twice for one input.
        "top_k": Input("top_k", torch.ones(1, dtype=torch.int64), (1,)),
        "distances": Input("distances", torch.ones(1, dtype=torch.int64), (1,)),
    }
    inputs = [*own_inputs, *(more[name] for name in spec.inputs)]
    flash = spec.core in (FlashCore, CudnnCore)
    opset = max(opset, FLASH_OPSET) if flash else opset
    model = graphs.export(module, inputs, spec.outputs, opset, by_name=True)
    for name in ("bias", "mask"):
        if name in spec.inputs:
            graphs.free_dims(model, name, [f"{name}_{dim}" for dim in _BROADCAST_DIMS])
    if spec.outputs == DIAGNOSTICS:
        # Their last dimension is the value of an input; traced as 1.
        graphs.rename_dims(model, _DIAGNOSTICS_DIMS)
    if spec.core is NativeCore:
        graphs.free_heads(model, DOMAIN)
    if spec.core is CudnnCore:
        graphs.add_function(model, cudnn_attention(config))
    if flash:
        graphs.add_function(model, flash_attention(config))
    if spec.core is BlockedCore or (flash and config.window is not None):
        graphs.add_function(model, blocked_attention(config, opset))
    if spec.core is BlockedSinksCore:
        graphs.add_function(model, blocked_attention(config, opset, sinks=True))
    return model


def _heads(config: AttentionConfig, dtype: str) -> list[Input]:
    """Query, key and value."""
    return [
        _input("query", dtype, "batch", config.num_heads, "query_len", config.head_dim),
        _input("key", dtype, "batch", config.num_kv_heads, "key_len", config.head_dim),
        _input("value", dtype, "batch", config.num_kv_heads, "key_len", config.value_head_dim),
    ]


def _native(progress: Progress) -> bool:
    if attnserve_kernels.library_path() is not None:
        return True
    progress("attnserve-kernels has no library here: variants that need it are left out")
    return False


def _input(name: str, dtype: str, *dims: str | int) -> Input:
    sizes = [TRACED[dim] if isinstance(dim, str) else dim for dim in dims]
    return Input(name, torch.zeros(sizes, dtype=TORCH[dtype]), dims)


def _key_lengths() -> Input:
    return Input("key_lengths", torch.ones(TRACED["batch"], dtype=torch.int64), ("batch",))
