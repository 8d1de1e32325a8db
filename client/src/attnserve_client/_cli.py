"""The `attnserve` command: look at a server, and call it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attnserve_client import AttentionClient, AttnserveError, Model, __version__
from attnserve_client._inspect import command as inspect
from attnserve_client._results import Array, TokensResult

_NUMPY = {"FP32": np.float32, "FP16": np.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 fine, 1 the call failed, 2 wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        with AttentionClient(options.target) as client:
            code: int = options.run(client, options)
            return code
    except AttnserveError as error:
        print(f"attnserve: {error}", file=sys.stderr)
        return 1
    except (OSError, TypeError, ValueError, KeyError) as error:
        print(f"attnserve: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnserve", description=__doc__)
    parser.add_argument("--version", action="version", version=f"attnserve {__version__}")
    parser.add_argument("--target", default="127.0.0.1:8001", help="host:port of the server")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="the server and its models")
    info.add_argument("--model", default="", help="one model in full, its manifest included")
    info.set_defaults(run=_info)

    attend = commands.add_parser("attend", help="attention over Q/K/V from a file, or random")
    attend.add_argument("--model", required=True)
    attend.add_argument("--variant", default="")
    attend.add_argument(
        "--input", type=Path, help=".npz with query, key, value (or hidden_states, context), ..."
    )
    attend.add_argument("--seq-len", type=int, default=128, help="without --input: random tensors")
    attend.add_argument("--batch", type=int, default=1, help="without --input")
    attend.add_argument("--seed", type=int, default=0, help="without --input")
    attend.add_argument("--weights", action="store_true", help="also the attention weights")
    attend.add_argument("--output", type=Path, help=".npz to write the answer to")
    attend.set_defaults(run=_attend)

    tokens = commands.add_parser("tokens", help="text through a transformer model")
    tokens.add_argument("texts", nargs="+", metavar="TEXT")
    tokens.add_argument("--model", required=True)
    tokens.add_argument("--query", help="show what this token attends to (default: every token)")
    tokens.add_argument("--layers", type=_numbers, help="e.g. 0,5; default all")
    tokens.add_argument("--heads", type=_numbers, help="e.g. 0,5; default all, averaged")
    tokens.add_argument("--top", type=int, default=5, help="how many tokens to show")
    tokens.add_argument("--output", type=Path, help=".npz to write hidden states and weights to")
    tokens.set_defaults(run=_tokens)

    inspect.add_arguments(commands.add_parser("inspect", help="a page that shows attention"))
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: numbers and commas") from None


def _info(client: AttentionClient, options: argparse.Namespace) -> int:
    if options.model:
        print(client.get_model(options.model).manifest)
        return 0
    server = client.server_info()
    providers = ", ".join(server.providers)
    print(f"{server.name} {server.version} on ONNX Runtime {server.onnxruntime_version}")
    print(f"{server.state}; {providers}")
    for model in client.list_models():
        print(f"\n{model.name} version {model.version}: {_describe(model)}")
        for variant in model.variants:
            print(
                f"  {variant.name:<10} gives {', '.join(variant.outputs[:2])}"
                f"{', ...' if len(variant.outputs) > 2 else ''}"
                f"; max abs error {variant.max_abs_error:.1e} (bound {variant.tolerance:.1e})"
            )
    return 0


def _describe(model: Model) -> str:
    heads = f"{model.num_heads} heads of {model.head_dim}"
    if model.num_kv_heads != model.num_heads:
        heads += f", {model.num_kv_heads} for keys and values"
    parts = [model.kind, model.mask, model.dtype, heads]
    if model.window:
        parts.append(f"window {model.window}")
    if model.num_layers:
        parts.append(f"{model.num_layers} layers")
    return ", ".join(parts)


def _attend(client: AttentionClient, options: argparse.Namespace) -> int:
    if options.input:
        with np.load(options.input) as file:
            tensors = {name: file[name] for name in file.files}
    else:
        tensors = _random_tensors(client.get_model(options.model), options)
    result = client.attend(
        model=options.model, variant=options.variant, return_weights=options.weights, **tensors
    )
    timings = result.timings
    arrays = {
        name: array
        for name, array in (("output", result.output), ("weights", result.weights))
        if array is not None
    }
    for name, array in arrays.items():
        mean, deviation = array.mean(dtype=np.float64), array.std(dtype=np.float64)
        print(f"{name}: {list(array.shape)} {array.dtype}, mean {mean:.6f}, std {deviation:.6f}")
    print(
        f"{result.model} {result.version}, {result.variant}: deserialize {timings.deserialize} us, "
        f"queue {timings.queue} us, compute {timings.compute} us, "
        f"serialize {timings.serialize} us"
    )
    if options.output:
        np.savez(options.output, **arrays)  # type: ignore[arg-type]
    return 0


def _random_tensors(model: Model, options: argparse.Namespace) -> dict[str, Array]:
    if model.kind == "transformer":
        raise ValueError(f"model {model.name} takes tokens; use: attnserve tokens")
    generator = np.random.default_rng(options.seed)
    batch, seq_len = options.batch, options.seq_len
    shapes: dict[str, tuple[int, ...]]
    if model.kind == "layer":
        if model.mask == "cross":
            raise ValueError(f"model {model.name} takes a context; give both with --input")
        shapes = {"hidden_states": (batch, seq_len, model.embed_dim)}
    else:
        shapes = {
            "query": (batch, model.num_heads, seq_len, model.head_dim),
            "key": (batch, model.num_kv_heads, seq_len, model.head_dim),
            "value": (batch, model.num_kv_heads, seq_len, model.value_head_dim),
        }
    if model.dtype not in _NUMPY:
        raise ValueError(f"model {model.name} is {model.dtype}; give tensors with --input")
    dtype = _NUMPY[model.dtype]
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _tokens(client: AttentionClient, options: argparse.Namespace) -> int:
    result = client.attend_tokens(
        options.texts,
        model=options.model,
        layers=options.layers,
        heads=options.heads,
        return_weights=True,
    )
    for index in range(len(options.texts)):
        _print_sequence(result, index, options)
    if options.output:
        arrays: dict[str, Array] = {}
        for index in range(len(options.texts)):
            arrays[f"ids_{index}"] = np.asarray(result.ids[index])
            arrays[f"hidden_{index}"] = (result.hidden or [])[index]
            arrays[f"weights_{index}"] = (result.weights or [])[index]
        np.savez(options.output, **arrays)  # type: ignore[arg-type]
    return 0


def _print_sequence(result: TokensResult, index: int, options: argparse.Namespace) -> None:
    tokens = result.tokens[index] or [str(token) for token in result.ids[index]]
    queries = [i for i, token in enumerate(tokens) if options.query in (None, token)]
    if not queries:
        raise ValueError(f"--query: {options.query!r} is none of the tokens {' '.join(tokens)}")
    weights = (result.weights or [])[index].mean(axis=1)  # (L, S, S), averaged over heads
    print(" ".join(tokens))
    for query in queries:
        for layer, number in enumerate(result.layers):
            heaviest = np.argsort(-weights[layer, query], kind="stable")[: options.top]
            seen = "  ".join(f"{tokens[key]} {weights[layer, query, key]:.2f}" for key in heaviest)
            print(f"  {tokens[query]:>12}  layer {number}: {seen}")


if __name__ == "__main__":
    sys.exit(main())
