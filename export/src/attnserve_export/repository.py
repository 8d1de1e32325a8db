"""The model repository on disk: manifests and files, written whole or not at all.

The format is described in docs/model-repository.md.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attnserve_proto import manifest as manifests
from attnserve_proto.commands import replacing
from attnserve_proto.manifest import FILE, MOST_VERSION, NAME, FileEntry, Manifest, ManifestError

from attnserve_export.errors import ExportError


def folder_of(repository: Path, name: str, version: int) -> Path:
    """The folder of a version.

    Raises:
        ExportError: the name or version is not allowed.
    """
    if not NAME.fullmatch(name):
        raise ExportError(f"--name: given {name!r}; allowed: {NAME.pattern}")
    if not 1 <= version <= MOST_VERSION:
        raise ExportError(f"--version: given {version}; allowed: 1..{MOST_VERSION}")
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

    Raises:
        ExportError: a server would refuse the manifest; nothing is written.
    """
    files = {
        path.name: FileEntry(sha256(path), path.stat().st_size) for path in sorted(folder.iterdir())
    }
    text = manifests.encode(dataclasses.replace(manifest, files=files))
    with _export_errors():
        manifests.parse(target, text)
    (folder / FILE).write_text(text, encoding="utf-8")
    for file in [*folder.iterdir(), folder]:
        _sync(file)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        target.rename(old / target.name)
        try:
            folder.rename(target)
        except BaseException:  # interrupted just here: what was there comes back
            (old / target.name).rename(target)
            raise
        finally:
            shutil.rmtree(old)
    else:
        folder.rename(target)
    _sync(target.parent)


def rewrite(folder: Path, changes: Mapping[str, Any]) -> None:
    """Replace entries of a version's manifest, in one step.

    Raises:
        ExportError: there is no manifest.
    """
    text = manifests.as_text(read_content(folder) | dict(changes))
    with replacing(folder / FILE) as beside:
        beside.write_text(text, encoding="utf-8")
    _sync(folder)


def read(folder: Path) -> Manifest:
    """A version's manifest.

    Raises:
        ExportError: there is none, or it is not as it should be.
    """
    with _export_errors():
        return manifests.read(folder)


def read_content(folder: Path) -> dict[str, Any]:
    """A version's manifest as it is written, with keys that nobody knows.

    Raises:
        ExportError: there is none, or it is not JSON.
    """
    with _export_errors():
        content: dict[str, Any] = manifests.decode(folder, manifests.read_text(folder))
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


@contextlib.contextmanager
def _export_errors() -> Iterator[None]:
    try:
        yield
    except ManifestError as error:
        raise ExportError(str(error)) from None
