"""`attnserve info` and `attnserve attend`."""

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attnserve_proto.commands import replacing, values

from attnserve_client import AttentionClient, Model
from attnserve_client._results import Array
from attnserve_client.command_options import add_output

_NUMPY = {"FP32": np.float32, "FP16": np.float16}
_TENSORS = (
    "query",
    "key",
    "value",
    "hidden_states",
    "context",
    "key_lengths",
    "bias",
    "sinks",
    "prefix_lengths",
    "cu_seqlens_q",
    "cu_seqlens_k",
)
_RESULTS = (
    "output",
    "weights",
    "entropy",
    "top_k_indices",
    "top_k_weights",
    "mass_per_key",
    "mass_by_distance",
    "log_sum_exp",
)
# What the model's own is taken for, if an option is not given.
_OPTIONAL = ("scale", "softcap")


def add_info(parser: argparse.ArgumentParser) -> None:
    """The options of `attnserve info`."""
    parser.description = "The server and its models."
    parser.add_argument("--model", type=values.name, help="one model in full, as its manifest")
    parser.set_defaults(run=_info)


def add_attend(parser: argparse.ArgumentParser) -> None:
    """The options of `attnserve attend`."""
    parser.description = "Attention over query, key and value, or a layer's hidden states."
    add = parser.add_argument
    add_model(parser)
    add(
        "--input",
        type=values.path,
        metavar="FILE.npz",
        help=f"arrays, of these: {', '.join(_TENSORS)}",
    )
    add("--seq-len", type=values.integer(1), default=128, help="of random tensors; default 128")
    add("--batch", type=values.integer(1), default=1, help="of random tensors; default 1")
    add("--seed", type=values.integer(0), default=0, help="of random tensors; default 0")
    add("--scale", type=values.number(-1e30, 1e30), help="default: the model's own")
    add("--softcap", type=values.number(0, 1e30), help="default: the model's own")
    add("--weights", action="store_true", help="also the attention weights")
    add("--entropy", action="store_true", help="also the entropy of each query's weights, nats")
    add("--top-k", type=values.integer(0), default=0, help="also so many heaviest keys a query")
    add("--mass-per-key", action="store_true", help="also the weight that each key receives")
    add("--mass-by-distance", type=values.integer(0), default=0, help="also over so many distances")
    add("--log-sum-exp", action="store_true", help="also the log-sum-exp of each query's scores")
    add("--priority", type=values.integer(0), default=0, help="0, normal, or more urgent")
    add_output(parser, "--output", "FILE.npz", "write the answer to")
    parser.set_defaults(run=_attend)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model is called."""
    parser.add_argument("--model", type=values.name, required=True, help="`attnserve info` lists")
    parser.add_argument("--version", type=values.version, help="default: the highest")
    parser.add_argument("--variant", type=values.name, help="default: the server picks")


def save(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays to an .npz file, which is replaced whole."""
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _info(client: AttentionClient, options: argparse.Namespace) -> int:
    if options.model:
        print(client.get_model(options.model, timeout=options.timeout).manifest)
        return 0
    server = client.server_info(timeout=options.timeout)
    providers = ", ".join(server.providers)
    print(f"{server.name} {server.version} on ONNX Runtime {server.onnxruntime_version}")
    print(f"{server.state}; {providers}")
    for model in client.list_models(timeout=options.timeout):
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
    if model.chunk:
        parts.append(f"chunks of {model.chunk}")
    if model.sinks:
        parts.append("sinks")
    if model.num_layers:
        parts.append(f"{model.num_layers} layers")
    return ", ".join(parts)


def _attend(client: AttentionClient, options: argparse.Namespace) -> int:
    if options.input:
        tensors = _read(options.input)
    else:
        model = client.get_model(options.model, timeout=options.timeout)
        tensors = _random_tensors(model, options)
    more: dict[str, Any] = {name: getattr(options, name) for name in _OPTIONAL} | tensors
    result = client.attend(
        model=options.model,
        version=options.version or "",
        variant=options.variant or "",
        return_weights=options.weights,
        return_entropy=options.entropy,
        top_k=options.top_k,
        return_mass_per_key=options.mass_per_key,
        mass_by_distance=options.mass_by_distance,
        return_log_sum_exp=options.log_sum_exp,
        priority=options.priority,
        timeout=options.timeout,
        **more,
    )
    found = {name: getattr(result, name) for name in _RESULTS}
    arrays: dict[str, Array] = {name: each for name, each in found.items() if each is not None}
    for name, array in arrays.items():
        mean, deviation = array.mean(dtype=np.float64), array.std(dtype=np.float64)
        print(f"{name}: {list(array.shape)} {array.dtype}, mean {mean:.6f}, std {deviation:.6f}")
    timings = result.timings
    print(
        f"{result.model} {result.version}, {result.variant}: deserialize {timings.deserialize} us, "
        f"queue {timings.queue} us, compute {timings.compute} us, "
        f"serialize {timings.serialize} us"
    )
    if options.output:
        save(options.output, arrays)
    return 0


def _read(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file.

    Raises:
        ValueError: it is none, or has others than a request takes.
    """
    allowed = f"an .npz file of arrays called {', '.join(_TENSORS)}"
    try:
        with np.load(path) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one array without a name")
            tensors = {name: file[name] for name in file.files}
    except OSError as error:
        reason = error.strerror or "it is cut off"
        raise ValueError(f"--input: given {path}: {reason}; allowed: {allowed}") from None
    except (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        # NumPy speaks of pickles wherever it knows no other format.
        reason = "no such file" if "pickle" in str(error) else str(error)
        raise ValueError(f"--input: given {path}: {reason}; allowed: {allowed}") from None
    unknown = [name for name in tensors if name not in _TENSORS]
    if unknown or not tensors:
        given = f"arrays called {', '.join(unknown)}" if unknown else "no array"
        raise ValueError(f"--input: given {path} with {given}; allowed: {allowed}")
    return tensors


def _random_tensors(model: Model, options: argparse.Namespace) -> dict[str, Array]:
    if model.kind == "transformer":
        raise ValueError(f"--model: {model.name} takes tokens; use `attnserve tokens`")
    generator = np.random.default_rng(options.seed)
    batch, seq_len = options.batch, options.seq_len
    shapes: dict[str, tuple[int, ...]]
    if model.kind == "layer":
        if model.mask == "cross":
            raise ValueError(f"--model: {model.name} takes a context; give both with --input")
        shapes = {"hidden_states": (batch, seq_len, model.embed_dim)}
    else:
        shapes = {
            "query": (batch, model.num_heads, seq_len, model.head_dim),
            "key": (batch, model.num_kv_heads, seq_len, model.head_dim),
            "value": (batch, model.num_kv_heads, seq_len, model.value_head_dim),
        }
    if model.dtype not in _NUMPY:
        raise ValueError(f"--model: {model.name} is {model.dtype}; give tensors with --input")
    dtype = _NUMPY[model.dtype]
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
