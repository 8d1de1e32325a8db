"""The `attnserve-export` command."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from attnserve_proto.manifest import ALIGNMENTS, MASKS, STYLES, Manifest
from torch.nn import MultiheadAttention

from attnserve_export import __version__, models, repository, tuning
from attnserve_export.attention.core import AttentionConfig, default_scale
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.attention.positions import Rotary
from attnserve_export.attention.variants import CPU, CUDA
from attnserve_export.checkpoints.checkpoint import read_checkpoint
from attnserve_export.checkpoints.export import export_transformer
from attnserve_export.errors import ExportError, VerificationError
from attnserve_export.graphs import MAX_OPSET, MIN_OPSET


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 written, 1 verification failed, 2 wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        if options.run is _tune:
            _tune(options)
            return 0
        _check(options)
        target = repository.place(
            options.out, options.name, options.version, overwrite=options.overwrite
        )
        manifest: Manifest = options.run(options, target)
    except ExportError as error:
        print(f"attnserve-export: {error}", file=sys.stderr)
        return 2
    except VerificationError as error:
        print(f"attnserve-export: not written: {error}", file=sys.stderr)
        return 1
    _report(manifest, target)
    return 0


def _core(options: argparse.Namespace, target: Path) -> Manifest:
    return models.export_core(
        _attention(options, options.head_dim),
        target,
        name=options.name,
        version=options.version,
        dtype=options.dtype.upper(),
        opset=options.opset,
        progress=_progress,
    )


def _tune(options: argparse.Namespace) -> None:
    folder = repository.folder_of(options.out, options.name, options.version)
    tuning.tune(
        folder,
        seq_lens=options.seq_lens,
        provider=options.provider,
        batch=options.batch,
        seconds=options.seconds,
        progress=_progress,
    )
    for pick in repository.read(folder).picks[options.provider]:
        length = "longer" if pick.up_to is None else f"up to {pick.up_to}"
        print(f"{options.provider}, {length}: {', '.join(pick.variants)}")


def _layer(options: argparse.Namespace, target: Path) -> Manifest:
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
        progress=_progress,
    )


def _beyond_multihead(options: argparse.Namespace) -> dict[str, bool]:
    """What `torch.nn.MultiheadAttention` cannot do, and whether it is asked for."""
    return {
        "--window": options.window is not None,
        "--window-right": options.window_right is not None,
        "--alignment": options.alignment != "top-left",
        "--alibi": options.alibi,
        "--rotary": options.rotary is not None,
        "--softcap": options.softcap != 0,
    }


def _transformer(options: argparse.Namespace, target: Path) -> Manifest:
    return export_transformer(
        read_checkpoint(options.checkpoint),
        target,
        name=options.name,
        version=options.version,
        opset=options.opset,
        progress=_progress,
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
    )


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


def _check(options: argparse.Namespace) -> None:
    if not MIN_OPSET <= options.opset <= MAX_OPSET:
        raise ExportError(f"--opset: given {options.opset}; allowed: {MIN_OPSET}..{MAX_OPSET}")


def _report(manifest: Manifest, target: Path) -> None:
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {manifest.kind}, {manifest.dtype}, opset {manifest.opset}, {size:,} bytes")
    for variant in manifest.variants:
        errors = variant.verification.max_abs_error
        print(
            f"  {variant.name}: max abs error {max(errors.values()):.2e} over "
            f"{len(variant.verification.cases)} cases against {variant.verification.reference}"
        )


_started = time.monotonic()
_HIGHEST = 2**31 - 1
# Well within what FP32 holds.
_SMALLEST, _LARGEST = 1e-30, 1e30


def _progress(text: str) -> None:
    print(f"[{time.monotonic() - _started:5.1f} s] {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnserve-export", description=__doc__)
    parser.add_argument("--version", action="version", version=f"attnserve-export {__version__}")
    commands = parser.add_subparsers(required=True, metavar="KIND")

    core = commands.add_parser("core", help="attention over query, key and value")
    _add_common(core, _core)
    core.add_argument("--num-heads", type=_positive, required=True)
    core.add_argument("--num-kv-heads", type=_positive, help="default: as many as --num-heads")
    core.add_argument("--head-dim", type=_positive, required=True)
    core.add_argument("--value-head-dim", type=_positive, help="default: --head-dim")
    core.add_argument("--scale", type=_above_zero, help="default: 1/sqrt(head_dim)")
    _add_attention(core)

    layer = commands.add_parser("layer", help="attention with its projections")
    _add_common(layer, _layer)
    layer.add_argument(
        "--module",
        choices=("multihead", "attnserve"),
        default="attnserve",
        help="torch.nn.MultiheadAttention, or this project's module (GQA, any head_dim)",
    )
    layer.add_argument("--num-heads", type=_positive, required=True)
    layer.add_argument("--num-kv-heads", type=_positive, help="default: as many as --num-heads")
    layer.add_argument("--embed-dim", type=_positive, required=True)
    layer.add_argument("--head-dim", type=_positive, help="default: embed_dim / num_heads")
    layer.add_argument("--context-dim", type=_positive, help="with --mask cross; default embed_dim")
    _add_attention(layer)
    layer.add_argument(
        "--bias-terms", action=argparse.BooleanOptionalAction, default=True, help="of projections"
    )
    parameters = layer.add_mutually_exclusive_group()
    parameters.add_argument("--seed", type=_zero_or_more, help="random parameters; default 0")
    parameters.add_argument("--weights", type=Path, help="a safetensors file")

    transformer = commands.add_parser("transformer", help="a Hugging Face checkpoint")
    _add_common(transformer, _transformer)
    transformer.add_argument(
        "--checkpoint", type=Path, required=True, help="folder with config.json, model*.safetensors"
    )

    tune = commands.add_parser("tune", help="measure a core model's variants on this machine")
    tune.add_argument("--out", type=Path, required=True, help="the model repository")
    tune.add_argument("--name", required=True, help="of the model")
    tune.add_argument("--version", type=int, default=1, help="of the model (default 1)")
    tune.add_argument("--provider", choices=(CPU, CUDA), default=CPU)
    tune.add_argument(
        "--seq-lens", type=_lengths, default=(64, 256, 1024, 4096), help="default 64,256,1024,4096"
    )
    tune.add_argument("--batch", type=_positive, default=1, help="sequences per run (default 1)")
    tune.add_argument(
        "--seconds", type=_above_zero, default=3.0, help="to spend on each length (default 3)"
    )
    tune.set_defaults(run=_tune)
    return parser


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mask", choices=MASKS, default="bidirectional")
    parser.add_argument(
        "--alignment",
        choices=ALIGNMENTS,
        default="top-left",
        help="where queries are among the keys if there are fewer or more of them",
    )
    parser.add_argument(
        "--window", type=_positive, help="keys up to its own that a query sees; default: all"
    )
    parser.add_argument(
        "--window-right",
        type=_zero_or_more,
        help="keys after its own that it sees, unless causal; default: --window less 1, or all",
    )
    parser.add_argument("--softcap", type=_above_zero, default=0.0, help="default: none")
    parser.add_argument("--alibi", action="store_true", help="scores fall with distance")
    parser.add_argument("--rotary", choices=STYLES, help="default: none")
    parser.add_argument("--rotary-dims", type=_positive, help="default: head_dim")
    parser.add_argument("--rotary-base", type=_above_zero, default=10_000.0)
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")


def _add_common(parser: argparse.ArgumentParser, run: object) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the model repository")
    parser.add_argument("--name", required=True, help="of the model")
    parser.add_argument("--version", type=int, default=1, help="of the model (default 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace that version")
    parser.add_argument("--opset", type=int, default=MIN_OPSET, help=f"default {MIN_OPSET}")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    number = _zero_or_more(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: an integer, 1..{_HIGHEST}")
    return number


def _zero_or_more(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _HIGHEST):
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: an integer, 0..{_HIGHEST}")
    return int(text)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not _SMALLEST <= number <= _LARGEST:
        allowed = f"a number, {_SMALLEST}..{_LARGEST}"
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: {allowed}")
    return number


if __name__ == "__main__":
    sys.exit(main())
