"""`attnserve info` and `attnserve attend`."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attnserve_proto.commands import replacing, values

from attnserve_client import AttentionClient, Model, _cli_tensors
from attnserve_client._results import Array
from attnserve_client.command_options import add_output

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
_STARTS = ("cu_seqlens_q", "cu_seqlens_k")  # they are saved, but nothing is said of their mean


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
        help=f"arrays, rounded to the model's dtype, of these: {_cli_tensors.ALLOWED}",
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
    """Write arrays to an .npz file, which is replaced whole; bfloat16 as float32."""
    stored = {name: _cli_tensors.storable(array) for name, array in arrays.items()}
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, **stored)  # type: ignore[arg-type]


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
        if taken := _taken(model):
            print(f"  takes {taken}")
        width = max(len(variant.name) for variant in model.variants)
        for variant in model.variants:
            print(
                f"  {variant.name:<{width}} gives {', '.join(variant.outputs[:2])}"
                f"{', ...' if len(variant.outputs) > 2 else ''}"
                f"; max abs error {variant.max_abs_error:.1e} (bound {variant.tolerance:.1e})"
            )
    for version in server.unavailable:
        print(f"\n{version.name} version {version.version}: not served: {version.reason}")
    return 0


def _taken(model: Model) -> str:
    """What a transformer reads."""
    if model.kind != "transformer":
        return ""
    parts = ["text", "token ids"] if model.takes_text else ["token ids"]
    parts = parts if model.takes_ids or not model.inputs else []
    for entry in model.inputs:
        shape = ", ".join("S" if size is None else str(size) for size in entry.shape)
        read = f" as {entry.tokens} tokens" if entry.tokens else ""
        if entry.patches is not None:
            read += f", {entry.patches.rows} x {entry.patches.columns} patches"
        parts.append(f"{entry.name} [B, {shape}]{read}")
    return "; ".join(parts)


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
    given = _cli_tensors.read(options.input) if options.input else None
    model = client.get_model(options.model, options.version or "", timeout=options.timeout)
    if given is None:
        tensors: dict[str, Any] = dict(_cli_tensors.random(model, options))
    else:
        tensors = _cli_tensors.as_model(given, model)
    # What the model's own is taken for, if it is given nowhere.
    for name in _cli_tensors.NUMBERS:
        number = getattr(options, name)
        if number is not None and name in tensors:
            raise ValueError(f"--{name}: given {number:g}, and in --input; allowed: one of the two")
        tensors.setdefault(name, number)
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
        **tensors,
    )
    found = {name: getattr(result, name) for name in _RESULTS}
    arrays: dict[str, Array] = {name: each for name, each in found.items() if each is not None}
    for name, array in arrays.items():
        exact = array.astype(np.float64)
        mean, deviation = exact.mean(), exact.std()
        print(f"{name}: {list(array.shape)} {array.dtype}, mean {mean:.6f}, std {deviation:.6f}")
    timings = result.timings
    print(
        f"{result.model} {result.version}, {result.variant}: deserialize {timings.deserialize} us, "
        f"queue {timings.queue} us, compute {timings.compute} us, "
        f"serialize {timings.serialize} us"
    )
    if options.output:
        starts = {name: getattr(result, name) for name in _STARTS}
        save(options.output, arrays | {n: each for n, each in starts.items() if each is not None})
    return 0
