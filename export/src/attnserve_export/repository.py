"""The model repository on disk: manifests and files, written whole or not at all.

The format is described in docs/model-repository.md.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve_export.errors import ExportError
from attnserve_export.verification import Verification

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph; a dimension is an integer or a symbol's name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class VariantInfo:
    """One graph of a model."""

    name: str
    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    providers: tuple[str, ...]
    memory: str
    native: bool
    verification: Verification


@dataclass(frozen=True)
class Pick:
    """Which variants to prefer up to a length (the longer of Sq and Sk; None: any), best first."""

    up_to: int | None
    variants: tuple[str, ...]


@dataclass(frozen=True)
class AttentionInfo:
    """The attention that a model computes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    mask: str
    window: int | None
    window_right: int | None
    alignment: str
    alibi: bool
    rotary: Mapping[str, Any] | None
    scale: float
    softcap: float


@dataclass(frozen=True)
class LayerInfo:
    """What a layer has besides."""

    embed_dim: int
    context_dim: int | None


@dataclass(frozen=True)
class TransformerLayerInfo:
    """What may differ from layer to layer: the scale, and keys that a query sees (None: all)."""

    scale: float
    window: int | None


@dataclass(frozen=True)
class TransformerAttentionInfo:
    """One attention of a transformer: an encoder's, a decoder's, or the one between them."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: str
    position_bias: bool
    layers: tuple[TransformerLayerInfo, ...]


@dataclass(frozen=True)
class TransformerInfo:
    """What a transformer has besides."""

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_seq_len: int
    pad_token_id: int
    pooling: str | None
    normalize_pooled: bool
    decoder_start_token_id: int | None
    attentions: tuple[TransformerAttentionInfo, ...]


@dataclass(frozen=True)
class Manifest:
    """`model.json`, but for `files`, which are known once they are written."""

    name: str
    version: int
    kind: str
    dtype: str
    opset: int
    attention: AttentionInfo
    layer: LayerInfo | None
    transformer: TransformerInfo | None
    tokenizer: str | None
    variants: tuple[VariantInfo, ...]
    picks: Mapping[str, tuple[Pick, ...]]
    source: Mapping[str, Any]
    created_by: Mapping[str, str]
    tuned: Mapping[str, Any] | None = None
    manifest_version: int = 1


def folder_of(repository: Path, name: str, version: int) -> Path:
    """The folder of a version.

    Raises:
        ExportError: the name or version is not allowed.
    """
    if not NAME.fullmatch(name):
        raise ExportError(f"--name: given {name!r}; allowed: {NAME.pattern}")
    if not 1 <= version < 2**63:
        raise ExportError(f"--version: given {version}; allowed: 1..{2**63 - 1}")
    return repository / name / str(version)


def place(repository: Path, name: str, version: int, *, overwrite: bool) -> Path:
    """The folder of a version that may be written.

    Raises:
        ExportError: the name or version is not allowed, or the version is there already.
    """
    target = folder_of(repository, name, version)
    if target.exists() and not overwrite:
        raise ExportError(
            f"--version: {target} is there already; allowed: another version, or --overwrite"
        )
    return target


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; gone at the end unless committed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            target.parent.rmdir()  # only if nothing else is in it


def commit(folder: Path, target: Path, manifest: Manifest) -> None:
    """Write the manifest into a staged folder, and rename it to its place.

    A version that is there already (`--overwrite`) is renamed away first: between the two renames
    there is no version at all for a moment, but never half of one.
    """
    content = dataclasses.asdict(manifest)
    content["files"] = {
        path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
    path = folder / "model.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in [*folder.iterdir(), folder]:
        _sync(file)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        target.rename(old / target.name)
        folder.rename(target)
        shutil.rmtree(old)
    else:
        folder.rename(target)
    _sync(target.parent)


def rewrite(folder: Path, changes: Mapping[str, Any]) -> None:
    """Replace entries of a version's manifest, in one step.

    Raises:
        ExportError: there is no manifest.
    """
    path = folder / "model.json"
    content = read(folder) | dict(changes)
    beside = path.with_name(".model.json.new")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(beside)
    beside.rename(path)
    _sync(folder)


def read(folder: Path) -> dict[str, Any]:
    """A version's manifest as it is written.

    Raises:
        ExportError: there is none, or it is not JSON.
    """
    try:
        content: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{folder}/model.json: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{folder}/model.json: not JSON: {error}") from None
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
