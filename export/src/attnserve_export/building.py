"""From the options of `attnserve-export` to modules, and what is written of them.

This is what needs torch: the command line is read without it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from attnserve_proto.manifest import Manifest
from torch.nn import MultiheadAttention

from attnserve_export import models, repository, tuning
from attnserve_export.attention.core import AttentionConfig, default_scale
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.attention.positions import Rotary
from attnserve_export.checkpoints.checkpoint import read_checkpoint
from attnserve_export.checkpoints.export import export_transformer
from attnserve_export.errors import ExportError
from attnserve_export.exporting import Progress


def core(options: argparse.Namespace, target: Path, progress: Progress) -> Manifest:
    """A core model, as the options say."""
    return models.export_core(
        _attention(options, options.head_dim),
        target,
        name=options.name,
        version=options.version,
        dtype=options.dtype.upper(),
        opset=options.opset,
        progress=progress,
    )


def layer(options: argparse.Namespace, target: Path, progress: Progress) -> Manifest:
    """A layer, as the options say.

    Raises:
        ExportError: they do not go together.
    """
    if options.dtype == "bf16":
        raise ExportError(
            "--dtype: given bf16 for a layer; allowed: fp32, fp16 (ONNX Runtime multiplies no BF16 "
            "matrices on the CPU, where layers are verified)"
        )
    head_dim, left = divmod(options.embed_dim, options.num_heads)
    if options.head_dim is not None:
        head_dim = options.head_dim
    elif left:
        raise ExportError(
            f"--embed-dim: given {options.embed_dim}; allowed: a multiple of --num-heads "
            f"{options.num_heads}, unless --head-dim is given"
        )
    if options.context_dim is not None and options.mask != "cross":
        raise ExportError("--context-dim: given; allowed: with --mask cross only")
    cross = options.mask == "cross"
    context_dim = (options.context_dim or options.embed_dim) if cross else None
    seed = 0 if options.seed is None else options.seed
    module: AttentionLayer | MultiheadAttention
    if options.module == "multihead":
        if options.num_kv_heads not in (None, options.num_heads) or options.head_dim is not None:
            raise ExportError(
                "--module: given multihead with --num-kv-heads or --head-dim; "
                "allowed: --module attnserve for these"
            )
        beyond = [name for name, value in _beyond_multihead(options).items() if value]
        if beyond:
            raise ExportError(
                f"--module: given multihead with {', '.join(beyond)}; "
                "allowed: --module attnserve for these"
            )
        module = models.seeded_multihead(
            options.embed_dim, options.num_heads, context_dim, options.bias_terms, seed
        )
    else:
        config = LayerConfig(
            _attention(options, head_dim), options.embed_dim, context_dim, options.bias_terms
        )
        module = models.seeded(AttentionLayer, config, seed)
    source: dict[str, object] = {"description": f"random, seed {seed}", "seed": seed}
    if options.weights is not None:
        models.load_parameters(module, options.weights)
        digest = repository.sha256(options.weights)
        if options.module == "multihead":
            progress("add_zero_attn, which leaves no parameters behind, is taken to be off")
        source = {"description": f"parameters of {options.weights.name}", "sha256": digest}
    source["module"] = options.module
    return models.export_layer(
        module,
        options.mask,
        target,
        name=options.name,
        version=options.version,
        dtype=options.dtype.upper(),
        opset=options.opset,
        source=source,
        progress=progress,
    )


def _beyond_multihead(options: argparse.Namespace) -> dict[str, bool]:
    """What `torch.nn.MultiheadAttention` cannot do, and whether it is asked for."""
    return {
        "--window": options.window is not None,
        "--window-right": options.window_right is not None,
        "--chunk": options.chunk is not None,
        "--alignment": options.alignment != "top-left",
        "--alibi": options.alibi,
        "--sinks": options.sinks is not None,
        "--rotary": options.rotary is not None,
        "--softcap": options.softcap != 0,
    }


def transformer(options: argparse.Namespace, target: Path, progress: Progress) -> Manifest:
    """A checkpoint."""
    return export_transformer(
        read_checkpoint(options.checkpoint, options.part),
        target,
        name=options.name,
        version=options.version,
        opset=options.opset,
        dtype=options.dtype.upper(),
        native=not options.no_native,
        embeds=options.inputs_embeds,
        progress=progress,
    )


def _attention(options: argparse.Namespace, head_dim: int) -> AttentionConfig:
    num_kv_heads = options.num_kv_heads or options.num_heads
    if options.num_heads % num_kv_heads:
        raise ExportError(
            f"--num-kv-heads: given {num_kv_heads}; allowed: a divisor of --num-heads "
            f"{options.num_heads}"
        )
    return AttentionConfig(
        num_heads=options.num_heads,
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        value_head_dim=getattr(options, "value_head_dim", None) or head_dim,
        mask=options.mask,
        scale=getattr(options, "scale", None) or default_scale(head_dim),
        softcap=options.softcap,
        alignment=options.alignment,
        window=options.window,
        window_right=_window_right(options),
        alibi=options.alibi,
        rotary=_rotary(options, head_dim),
        chunk=options.chunk,
        sinks=_sinks(options),
    )


def _sinks(options: argparse.Namespace) -> tuple[float, ...] | None:
    """One of each head; a single number is for all."""
    given = options.sinks
    if given is None:
        return None
    if len(given) == 1:
        return tuple(given) * int(options.num_heads)
    if len(given) != options.num_heads:
        raise ExportError(
            f"--sinks: given {len(given)} numbers; allowed: one, or one for each of the "
            f"{options.num_heads} heads"
        )
    return tuple(given)


def _window_right(options: argparse.Namespace) -> int | None:
    """A window reaches as far to the right as to the left, unless causal or told otherwise."""
    given: int | None = options.window_right
    if given is not None and options.mask == "causal":
        raise ExportError("--window-right: given with --mask causal; allowed: the other masks")
    if given is None and options.window is not None and options.mask != "causal":
        return int(options.window) - 1
    return given


def _rotary(options: argparse.Namespace, head_dim: int) -> Rotary | None:
    if options.rotary is None:
        if options.rotary_dims is not None:
            raise ExportError("--rotary-dims: given without --rotary; allowed: with it")
        return None
    dims = options.rotary_dims or head_dim
    if dims % 2 or dims > head_dim:
        raise ExportError(f"--rotary-dims: given {dims}; allowed: even, at most {head_dim}")
    return Rotary(options.rotary, dims, options.rotary_base)


def tune(options: argparse.Namespace, folder: Path, progress: Progress) -> Sequence[str]:
    """Measure a core model's variants; what was found, a line for each pick.

    Raises:
        ExportError: there is no such model, or it has nothing to measure.
        KeyboardInterrupt: interrupted; the lengths that were measured are kept.
    """
    tuning.tune(
        folder,
        seq_lens=options.seq_lens,
        provider=options.provider,
        batch=options.batch,
        seconds=options.seconds,
        progress=progress,
    )
    return [
        f"{options.provider}, {'longer' if pick.up_to is None else f'up to {pick.up_to}'}: "
        f"{', '.join(pick.variants)}"
        for pick in repository.read(folder).picks[options.provider]
    ]
