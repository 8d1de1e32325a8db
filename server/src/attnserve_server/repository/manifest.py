"""`model.json`, read and checked. The format is described in docs/model-repository.md."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve_server.repository.fields import (
    MASKS,
    integer,
    number,
    one_of,
    optional_integer,
    yes_or_no,
)
from attnserve_server.repository.transformer import Transformer, read_transformer

KINDS = ("core", "layer", "transformer")
DTYPES = ("FP32", "FP16", "BF16")
ALIGNMENTS = ("top-left", "bottom-right")
MEMORY = ("linear", "quadratic")
STYLES = ("half", "interleaved")

# Of models and variants.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class ManifestError(Exception):
    """A model's files or manifest are not as they should be; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention that a model computes; of each block, in a transformer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    mask: str
    window: int | None
    window_right: int | None
    alignment: str
    alibi: bool
    rotary: str | None
    scale: float
    softcap: float


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer model has besides: E, and E of the context (None: self-attention)."""

    embed_dim: int
    context_dim: int | None


@dataclass(frozen=True, slots=True)
class VariantEntry:
    """One ONNX graph: its file, names of its inputs and outputs, providers, measured error.

    Attributes:
        quadratic: whether it holds the scores of all queries and keys while it runs.
        native: whether it needs the operators of attnserve-kernels.
    """

    name: str
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    providers: tuple[str, ...]
    quadratic: bool
    native: bool
    max_abs_error: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Pick:
    """Names of variants to prefer up to a length, best first; None: any length."""

    up_to: int | None
    variants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and SHA-256 (hex) of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of one model."""

    name: str
    version: int
    kind: str
    dtype: str
    attention: Attention
    layer: Layer | None
    transformer: Transformer | None
    tokenizer: str | None
    variants: tuple[VariantEntry, ...]
    picks: Mapping[str, tuple[Pick, ...]]
    files: Mapping[str, FileEntry]
    source: str
    text: str


def read(folder: Path) -> Manifest:
    """Read `folder`/model.json.

    Raises:
        ManifestError: it is missing, not JSON, or lacks what the format asks for.
    """
    path = folder / "model.json"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON: {error}") from None
    try:
        manifest = _manifest(content, text)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ManifestError(f"{path}: {type(error).__name__} at {error}") from None
    for file in manifest.files:
        if Path(file).name != file or file.startswith("."):
            raise ManifestError(f"{path}: files: {file!r} is not a plain file name")
    return manifest


def _manifest(content: Any, text: str) -> Manifest:
    if content["manifest_version"] != 1:
        raise ValueError(f"manifest_version: {content['manifest_version']}; allowed: 1")
    attention = content["attention"]
    manifest = Manifest(
        name=str(content["name"]),
        version=integer("version", content["version"], highest=2**63 - 1),
        kind=one_of("kind", content["kind"], KINDS),
        dtype=one_of("dtype", content["dtype"], DTYPES),
        attention=Attention(
            num_heads=integer("attention.num_heads", attention["num_heads"]),
            num_kv_heads=integer("attention.num_kv_heads", attention["num_kv_heads"]),
            head_dim=integer("attention.head_dim", attention["head_dim"]),
            value_head_dim=integer("attention.value_head_dim", attention["value_head_dim"]),
            mask=one_of("attention.mask", attention["mask"], MASKS),
            window=optional_integer("attention.window", attention.get("window")),
            window_right=optional_integer(
                "attention.window_right", attention.get("window_right"), lowest=0
            ),
            alignment=one_of(
                "attention.alignment", attention.get("alignment", "top-left"), ALIGNMENTS
            ),
            alibi=yes_or_no("attention.alibi", attention.get("alibi", False)),
            rotary=_rotary(attention.get("rotary")),
            scale=number("attention.scale", attention["scale"], above_zero=True),
            softcap=number("attention.softcap", attention.get("softcap", 0), above_zero=False),
        ),
        layer=_layer(content.get("layer")),
        transformer=read_transformer(content.get("transformer"), attention),
        tokenizer=content.get("tokenizer"),
        variants=tuple(_variant(entry) for entry in content["variants"]),
        picks={
            str(provider): _picks(rows) for provider, rows in (content.get("picks") or {}).items()
        },
        files={
            name: FileEntry(sha256=str(entry["sha256"]), bytes=int(entry["bytes"]))
            for name, entry in content["files"].items()
        },
        source=str(content["source"]["description"]),
        text=text,
    )
    if not manifest.variants:
        raise ValueError("variants: none")
    if (manifest.kind == "layer") != (manifest.layer is not None):
        raise ValueError("layer: goes with kind layer")
    if (manifest.kind == "transformer") != (manifest.transformer is not None):
        raise ValueError("transformer: goes with kind transformer")
    named = [variant.file for variant in manifest.variants]
    if manifest.tokenizer is not None:
        named.append(manifest.tokenizer)
    for name in named:
        if name not in manifest.files:
            raise ValueError(f"files: {name!r} has no entry")
    return manifest


def _rotary(content: Any) -> str | None:
    return None if content is None else one_of("attention.rotary.style", content["style"], STYLES)


def _picks(rows: Any) -> tuple[Pick, ...]:
    picks: list[Pick] = []
    for row in rows:
        up_to = optional_integer("picks: up_to", row["up_to"])
        last = picks[-1].up_to if picks else 0
        if last is None or (up_to is not None and up_to <= last):
            raise ValueError(f"picks: up_to: {up_to} after {last}; allowed: rising, null last")
        if not isinstance(row["variants"], list):
            raise ValueError(f"picks: variants: {row['variants']!r}; allowed: a list of names")
        picks.append(Pick(up_to, tuple(str(name) for name in row["variants"])))
    return tuple(picks)


def _layer(content: Any) -> Layer | None:
    if content is None:
        return None
    context = content["context_dim"]
    embed_dim = integer("layer.embed_dim", content["embed_dim"])
    return Layer(embed_dim, optional_integer("layer.context_dim", context))


def _variant_name(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"variants: name: {name!r}; allowed: {NAME.pattern}")
    return name


def _variant(content: Any) -> VariantEntry:
    verification = content["verification"]
    return VariantEntry(
        name=_variant_name(content["name"]),
        file=str(content["file"]),
        inputs=tuple(str(entry["name"]) for entry in content["inputs"]),
        outputs=tuple(str(entry["name"]) for entry in content["outputs"]),
        providers=tuple(str(provider) for provider in content["providers"]),
        quadratic=one_of("memory", content.get("memory", "quadratic"), MEMORY) == "quadratic",
        native=yes_or_no("native", content.get("native", False)),
        max_abs_error=max((float(e) for e in verification["max_abs_error"].values()), default=0.0),
        tolerance=float(verification["tolerance"]),
    )
