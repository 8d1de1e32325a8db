"""The variants of a model: which module computes what, from which inputs, into which outputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from attnserve_export.attention.core import (
    AttentionConfig,
    BlockedCore,
    BlockedSinksCore,
    CappedCore,
    CappedSinksCore,
    Core,
    CudnnCore,
    DiagnosticsCore,
    FlashCore,
    FusedCore,
    NativeCore,
    PackedCore,
    PackedDiagnosticsCore,
    PackedWeightsCore,
    PagedCore,
    ReferenceCore,
    SinksCore,
    SoftcapCore,
)
from attnserve_export.attention.flash import has_cudnn, has_flash
from attnserve_export.attention.packed import packed_inputs
from attnserve_export.attention.paged import INPUTS as PAGED_INPUTS
from attnserve_export.attention.paged import OUTPUTS as PAGED_OUTPUTS
from attnserve_export.attention.paged import has_paged, has_paged_layer, paged_inputs
from attnserve_export.runtime import CPU, CUDA

OUTPUT = ("output",)
ROWS = ("output", "log_sum_exp")
WEIGHTS = ("output", "weights")
WEIGHTS_AND_ROWS = ("output", "weights", "log_sum_exp")
DIAGNOSTICS = (
    "entropy",
    "mass_per_key",
    "mass_by_distance",
    "top_k_indices",
    "top_k_weights",
)


@dataclass(frozen=True)
class VariantSpec:
    """A variant before it is exported.

    Attributes:
        core: makes its module.
        inputs: of its graph after those that carry the sequence (query, key and value, or hidden
            states).
        outputs: of its graph.
        memory: "linear" or "quadratic" in the length.
        providers: that it suits. What does not suit the CPU is verified there all the same, in
            FP32: the CPU has no such kernels for the other types.
        native: whether it needs the operators of attnserve-kernels.
        takes_value: whether value is among a core model's inputs.
    """

    core: Callable[[AttentionConfig], Core]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    memory: str
    providers: tuple[str, ...] = (CUDA, CPU)
    native: bool = False
    takes_value: bool = True


_LENGTHS = ("key_lengths",)
FUSED = VariantSpec(FusedCore, _LENGTHS, OUTPUT, "quadratic")
BLOCKED = VariantSpec(BlockedCore, _LENGTHS, OUTPUT, "linear")
# Of plain operators too, and so on any provider; apart from the others, since a log-sum-exp is
# another pass over the scores.
BLOCKED_SINKS = VariantSpec(BlockedSinksCore, (*_LENGTHS, "sinks"), ROWS, "linear")
FLASH = VariantSpec(FlashCore, _LENGTHS, OUTPUT, "linear", (CUDA,))
CUDNN = VariantSpec(CudnnCore, _LENGTHS, OUTPUT, "linear", (CUDA,))
REFERENCE = VariantSpec(ReferenceCore, (*_LENGTHS, "bias", "prefix_lengths"), WEIGHTS, "quadratic")
CAPPED = replace(REFERENCE, core=CappedCore)
REFERENCE_SINKS = VariantSpec(
    SinksCore, (*REFERENCE.inputs, "sinks"), WEIGHTS_AND_ROWS, "quadratic"
)
CAPPED_SINKS = replace(REFERENCE_SINKS, core=CappedSinksCore)
SOFTCAP = replace(REFERENCE_SINKS, core=SoftcapCore, inputs=(*REFERENCE_SINKS.inputs, "softcap"))
_MASKS = ("bias", "mask", "prefix_lengths", "softcap", "sinks")
NATIVE = VariantSpec(NativeCore, (*_LENGTHS, *_MASKS), ROWS, "linear", (CPU,), native=True)
DIAGNOSTICS_SPEC = VariantSpec(
    DiagnosticsCore,
    (*_LENGTHS, "top_k", "distances", *_MASKS),
    DIAGNOSTICS,
    "linear",
    native=True,
    takes_value=False,
)
# Requests with packed sequences get these, and no others.
PACKED = replace(NATIVE, core=PackedCore, inputs=packed_inputs(_MASKS))
PACKED_DIAGNOSTICS = replace(
    DIAGNOSTICS_SPEC,
    core=PackedDiagnosticsCore,
    inputs=packed_inputs(("top_k", "distances", *_MASKS)),
)
PACKED_WEIGHTS = replace(
    PACKED, core=PackedWeightsCore, outputs=WEIGHTS_AND_ROWS, memory="quadratic"
)
# For sessions alone: requests that bring all their keys never get it.
PAGED = VariantSpec(PagedCore, PAGED_INPUTS, PAGED_OUTPUTS, "linear", (CPU,), native=True)


def core_specs(config: AttentionConfig, dtype: str, *, native: bool) -> dict[str, VariantSpec]:
    """The variants of a core model; the first becomes `model.onnx`, which any ONNX Runtime runs.

    Args:
        config: the attention.
        dtype: "FP32", "FP16" or "BF16".
        native: whether attnserve-kernels is there to verify its variants with.
    """
    plain = not config.softcap and not config.alibi and config.sinks is None
    specs = {"fused": FUSED} if plain else {}
    capped = bool(config.softcap)
    sinks = CAPPED_SINKS if capped else REFERENCE_SINKS
    if config.sinks is None:
        specs["blocked"], reference = BLOCKED, CAPPED if capped else REFERENCE
    else:
        specs["blocked"], reference = _without(BLOCKED_SINKS, "sinks"), _without(sinks, "sinks")
    if has_flash(config, dtype):
        specs["flash"] = FLASH
    if has_cudnn(config, dtype):
        specs["cudnn"] = CUDNN
    specs |= {
        "reference": reference,
        "blocked_sinks": BLOCKED_SINKS,
        "reference_sinks": sinks,
        "softcap": SOFTCAP,
        "native": NATIVE,
        "diagnostics": DIAGNOSTICS_SPEC,
        "packed": PACKED,
        "packed_diagnostics": PACKED_DIAGNOSTICS,
        "packed_weights": PACKED_WEIGHTS,
    }
    if config.mask != "causal":
        specs = {name: _without(spec, "prefix_lengths") for name, spec in specs.items()}
    if has_paged(config):
        specs["paged"] = replace(PAGED, inputs=paged_inputs(config))
    return {name: spec for name, spec in specs.items() if native or not spec.native}


def layer_specs(config: AttentionConfig, dtype: str, *, native: bool) -> dict[str, VariantSpec]:
    """The variants of a layer model: as a core's, but for softcap and sinks as inputs; pages if
    causal."""

    specs = core_specs(config, dtype, native=native)
    left_out = {"softcap", "blocked_sinks"}
    if config.sinks is not None:
        left_out.add("reference_sinks")  # what `reference` is too
    if not has_paged_layer(config):
        left_out.add("paged")
    return {
        name: _without(_without(spec, "softcap"), "sinks")
        for name, spec in specs.items()
        if name not in left_out
    }


def _without(spec: VariantSpec, left_out: str) -> VariantSpec:
    return replace(spec, inputs=tuple(name for name in spec.inputs if name != left_out))


def core_module(config: AttentionConfig, spec: VariantSpec) -> nn.Module:
    """The module of a core model's variant."""
    return spec.core(config)
