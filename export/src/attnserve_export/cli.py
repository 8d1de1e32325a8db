"""The `attnserve-export` command."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from attnserve_proto import commands
from attnserve_proto.commands import CommandError, Loading, Parser, values
from attnserve_proto.manifest import ALIGNMENTS, MASKS, STYLES, Manifest

from attnserve_export import __version__, repository
from attnserve_export.errors import ExportError, VerificationError
from attnserve_export.runtime import CPU, CUDA, MAX_OPSET, MIN_OPSET

_HELP = (
    "Exports attention to ONNX, verifies it, and writes it into a model repository, which "
    "`attnserve-server --repository` serves."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code.

    Returns:
        0, written; 1, verification failed or the system refused something; 2, wrong arguments;
        130, interrupted.
    """
    return commands.run("attnserve-export", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    where = f"see `attnserve-export {options.kind} --help`"
    started = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        if options.kind == "tune":
            folder = repository.folder_of(options.out, options.name, options.version)
            repository.read_content(folder)
            with Loading():
                from attnserve_export import building

            for line in building.tune(options, folder, progress):
                print(line)
            return 0
        target = repository.place(
            options.out, options.name, options.version, overwrite=options.overwrite
        )
        commands.check_folder("--out", options.out)
        # Imported once the options can be right: torch takes seconds.
        with Loading():
            from attnserve_export import building

        export = {
            "core": building.core,
            "layer": building.layer,
            "transformer": building.transformer,
        }[options.kind]
        manifest = export(options, target, progress)
    except ExportError as error:
        raise CommandError(f"{error}; {where}", 2) from None
    except VerificationError as error:
        raise CommandError(
            f"not written: {error}; try another --seed or --dtype, and report it if that fails too"
        ) from None
    _report(manifest, target)
    return 0


def _report(manifest: Manifest, target: Path) -> None:
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {manifest.kind}, {manifest.dtype}, opset {manifest.opset}, {size:,} bytes")
    for variant in manifest.variants:
        errors = variant.verification.max_abs_error
        print(
            f"  {variant.name}: max abs error {max(errors.values()):.2e} over "
            f"{len(variant.verification.cases)} cases against {variant.verification.reference}"
        )


_LARGEST_SIZE = 1 << 20
# Well within what FP32 holds.
_factor = values.number(1e-30, 1e30)
_size = values.integer(1, _LARGEST_SIZE)


def _parser() -> Parser:
    parser = Parser(prog="attnserve-export", description=_HELP)
    parser.add_argument("--version", action="version", version=f"attnserve-export {__version__}")
    kinds = parser.add_subparsers(required=True, metavar="KIND")

    core = kinds.add_parser("core", help="attention over query, key and value")
    _add_common(core, "core")
    core.add_argument("--num-heads", type=_size, required=True)
    core.add_argument("--num-kv-heads", type=_size, help="default: as many as --num-heads")
    core.add_argument("--head-dim", type=_size, required=True)
    core.add_argument("--value-head-dim", type=_size, help="default: --head-dim")
    core.add_argument("--scale", type=_factor, help="default: 1/sqrt(head_dim)")
    _add_attention(core)

    layer = kinds.add_parser("layer", help="attention with its projections")
    _add_common(layer, "layer")
    layer.add_argument(
        "--module",
        choices=("multihead", "attnserve"),
        default="attnserve",
        help="torch.nn.MultiheadAttention, or this project's module (GQA, any head_dim)",
    )
    layer.add_argument("--num-heads", type=_size, required=True)
    layer.add_argument("--num-kv-heads", type=_size, help="default: as many as --num-heads")
    layer.add_argument("--embed-dim", type=_size, required=True)
    layer.add_argument("--head-dim", type=_size, help="default: embed_dim / num_heads")
    layer.add_argument("--context-dim", type=_size, help="with --mask cross; default embed_dim")
    _add_attention(layer)
    layer.add_argument(
        "--bias-terms", action=argparse.BooleanOptionalAction, default=True, help="of projections"
    )
    parameters = layer.add_mutually_exclusive_group()
    parameters.add_argument("--seed", type=values.integer(0), help="random parameters; default 0")
    parameters.add_argument("--weights", type=values.path, help="a safetensors file")

    transformer = kinds.add_parser("transformer", help="a Hugging Face checkpoint")
    _add_common(transformer, "transformer")
    transformer.add_argument(
        "--checkpoint",
        type=values.path,
        required=True,
        help="folder with config.json, model*.safetensors",
    )
    _add_dtype(transformer, "of parameters as stored, and of hidden states; default fp32")
    transformer.add_argument(
        "--no-native",
        action="store_true",
        help="leave out the variant that needs the operators of attnserve-kernels",
    )
    transformer.add_argument(
        "--part",
        choices=("encoder", "decoder", "text", "vision"),
        default="",
        help="export this part alone; a decoder attends to states that it is given",
    )
    transformer.add_argument(
        "--inputs-embeds",
        action="store_true",
        help="make variants, too, that take token embeddings in the place of ids",
    )

    tune = kinds.add_parser("tune", help="measure a core model's variants on this machine")
    _add_place(tune)
    tune.add_argument("--provider", choices=(CPU, CUDA), default=CPU)
    tune.add_argument(
        "--seq-lens",
        type=values.ascending(_size),
        default=(64, 256, 1024, 4096),
        help="default 64,256,1024,4096",
    )
    tune.add_argument("--batch", type=_size, default=1, help="sequences per run (default 1)")
    tune.add_argument(
        "--seconds", type=values.some_seconds, default=3.0, help="for each length (default 3)"
    )
    tune.set_defaults(kind="tune")
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
        "--window", type=_size, help="keys up to its own that a query sees; default: all"
    )
    parser.add_argument(
        "--window-right",
        type=values.integer(0),
        help="keys after its own that it sees, unless causal; default: --window less 1, or all",
    )
    parser.add_argument(
        "--chunk", type=_size, help="positions of a chunk, which alone a query sees; default: all"
    )
    parser.add_argument("--softcap", type=_factor, default=0.0, help="default: none")
    parser.add_argument("--alibi", action="store_true", help="scores fall with distance")
    parser.add_argument(
        "--sinks",
        type=values.listed(values.number(-1e30, 1e30)),
        metavar="A,B,...",
        help="of each head, a logit that takes part in the softmax and has no value; one number: "
        "for all heads; default: none",
    )
    parser.add_argument("--rotary", choices=STYLES, help="default: none")
    parser.add_argument("--rotary-dims", type=_size, help="default: head_dim")
    parser.add_argument("--rotary-base", type=_factor, default=10_000.0)
    _add_dtype(parser)


def _add_dtype(parser: argparse.ArgumentParser, text: str | None = None) -> None:
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help=text)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=values.path, required=True, help="the model repository")
    parser.add_argument("--name", type=values.name, required=True, help="of the model")
    parser.add_argument(
        "--version", type=values.version, default=1, help="of the model (default 1)"
    )


def _add_common(parser: argparse.ArgumentParser, kind: str) -> None:
    _add_place(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace that version")
    parser.add_argument(
        "--opset",
        type=values.integer(MIN_OPSET, MAX_OPSET),
        default=MIN_OPSET,
        help=f"default {MIN_OPSET}",
    )
    parser.set_defaults(kind=kind)


if __name__ == "__main__":
    sys.exit(main())
