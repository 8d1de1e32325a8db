"""`model.json` as text: read and checked, and written."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnserve_proto.manifest.fields import integer, optional, record
from attnserve_proto.manifest.schema import Manifest, Transformer

FILE = "model.json"

_VERSION = 1


class ManifestError(Exception):
    """A model's files or manifest are not as they should be; the message says which and why."""


def read(folder: Path) -> Manifest:
    """A version's manifest.

    Raises:
        ManifestError: it is missing, not JSON, or not as the schema has it.
    """
    return parse(folder, read_text(folder))


def read_text(folder: Path) -> str:
    """A version's manifest as it is written.

    Raises:
        ManifestError: it cannot be read.
    """
    path = folder / FILE
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not JSON: {error}") from None


def decode(folder: Path, text: str) -> Any:
    """What the text of `folder`'s manifest holds, unchecked.

    Raises:
        ManifestError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{folder / FILE}: not JSON: {error}") from None


def parse(folder: Path, text: str) -> Manifest:
    """The text of `folder`'s manifest.

    Raises:
        ManifestError: it is not JSON, or not as the schema has it.
    """
    content = decode(folder, text)
    path = folder / FILE
    try:
        if content["manifest_version"] != _VERSION:
            raise ValueError(
                f"manifest_version: {content['manifest_version']}; allowed: {_VERSION}"
            )
        manifest = record(Manifest)("", _with_attentions(content))
        _check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ManifestError(f"{path}: {type(error).__name__} at {error}") from None
    for file in manifest.files:
        if Path(file).name != file or file.startswith("."):
            raise ManifestError(f"{path}: files: {file!r} is not a plain file name")
    return manifest


def encode(manifest: Manifest) -> str:
    """The text of a manifest."""
    return as_text({"manifest_version": _VERSION} | dataclasses.asdict(manifest))


def as_text(content: Mapping[str, Any]) -> str:
    """A manifest's content as it is written."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _with_attentions(content: Any) -> Any:
    """A transformer of before attentions were listed has the one that `attention` describes."""
    transformer, attention = content.get("transformer"), content["attention"]
    if transformer is None or transformer.get("attentions"):
        return content
    num_layers = integer()("transformer.num_layers", transformer["num_layers"])
    name = "decoder" if attention["mask"] == "causal" else "encoder"
    layer = {"scale": attention["scale"], "window": attention.get("window")}
    alone = attention | {"name": name, "layers": [layer] * num_layers}
    return content | {"transformer": transformer | {"attentions": [alone]}}


def _check(manifest: Manifest) -> None:
    """What fields must have in common."""
    if not manifest.variants:
        raise ValueError("variants: none")
    if (manifest.kind == "layer") != (manifest.layer is not None):
        raise ValueError("layer: goes with kind layer")
    if (manifest.kind == "transformer") != (manifest.transformer is not None):
        raise ValueError("transformer: goes with kind transformer")
    sinks, num_heads = manifest.attention.sinks, manifest.attention.num_heads
    if sinks is not None and len(sinks) != num_heads:
        raise ValueError(f"attention.sinks: {len(sinks)}; allowed: {num_heads}, one for each head")
    if manifest.transformer is not None:
        _check_transformer(manifest.transformer)
    named = [variant.file for variant in manifest.variants]
    if manifest.tokenizer is not None:
        named.append(manifest.tokenizer)
    for name in named:
        if name not in manifest.files:
            raise ValueError(f"files: {name!r} has no entry")


def _check_transformer(transformer: Transformer) -> None:
    _check_inputs(transformer)
    last = max(0, transformer.vocab_size - 1)
    integer(0, last)("transformer.pad_token_id", transformer.pad_token_id)
    optional(integer(0, last))(
        "transformer.decoder_start_token_id", transformer.decoder_start_token_id
    )
    seen = set()
    for attention in transformer.attentions:
        where = f"transformer.attentions: {attention.name}"
        if not attention.layers:
            raise ValueError(f"{where}.layers: none")
        if attention.num_heads % attention.num_kv_heads:
            raise ValueError(f"{where}.num_kv_heads: {attention.num_kv_heads}; allowed: a divisor")
        for layer in attention.layers:
            if layer.sinks is not None and len(layer.sinks) != attention.num_heads:
                raise ValueError(
                    f"{where}.sinks: {len(layer.sinks)}; allowed: {attention.num_heads}"
                )
        if attention.name in seen:
            raise ValueError(f"{where}: twice")
        seen.add(attention.name)


def _check_inputs(transformer: Transformer) -> None:
    if transformer.takes_ids and not transformer.vocab_size:
        raise ValueError("transformer.vocab_size: 0; allowed: 1 or more, if takes_ids")
    if not transformer.takes_ids and not transformer.inputs:
        raise ValueError("transformer.inputs: none; allowed: one or more, unless takes_ids")
    seen = set()
    for entry in transformer.inputs:
        where = f"transformer.inputs: {entry.name}"
        named = [size for size in entry.shape if isinstance(size, str)]
        if len(named) > 1 or (named and entry.shape[0] != named[0]):
            raise ValueError(f"{where}.shape: {list(entry.shape)}; allowed: a name at its start")
        if bool(named) == (entry.tokens is not None):
            raise ValueError(f"{where}.tokens: {entry.tokens}; allowed: with a shape of numbers")
        patches = entry.patches
        if patches is not None and (
            len(entry.shape) != 3 or patches.first + patches.rows * patches.columns != entry.tokens
        ):
            raise ValueError(
                f"{where}.patches: {patches.first} and {patches.rows} x {patches.columns}; "
                f"allowed: {entry.tokens} in all, of [channels, height, width]"
            )
        if entry.name in seen:
            raise ValueError(f"{where}: twice")
        seen.add(entry.name)
