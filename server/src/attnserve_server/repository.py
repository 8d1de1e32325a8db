"""The model repository on disk: what is there, and whether its files are what they should be."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from attnserve_proto.manifest import FILE, NAME, Manifest, ManifestError

_VERSION = re.compile(r"[1-9][0-9]*")
_SHOWN = 5


def find(repository: Path) -> Iterator[Path]:
    """The folders of all model versions, by name and version; hidden ones are left out.

    Raises:
        ManifestError: `repository` is not a folder.
    """
    if not repository.is_dir():
        raise ManifestError(f"{repository}: no such folder; allowed: a model repository")
    for model in sorted(repository.iterdir()):
        if not NAME.fullmatch(model.name) or not model.is_dir():
            continue
        try:
            versions = [entry for entry in model.iterdir() if _VERSION.fullmatch(entry.name)]
        except OSError:
            continue  # it has gone meanwhile, or nobody may look
        yield from sorted(versions, key=lambda entry: int(entry.name))


def explain_empty(repository: Path) -> str:
    """Why no model was found in a folder: what was looked for, and what lies there."""
    wanted = f"looked for {repository}/NAME/VERSION/{FILE}"
    if (repository / FILE).is_file():
        return f"{wanted}, but it is itself a version of a model; give {_above(repository, 2)}"
    entries = sorted(entry.name for entry in repository.iterdir())
    if any((repository / name / FILE).is_file() for name in entries):
        return f"{wanted}, but it is itself a model; give the folder around it, " + str(
            _above(repository, 1)
        )
    deeper = sorted(found.parents[2].name for found in repository.glob(f"*/*/*/{FILE}"))
    if deeper:
        return f"{wanted}, but models lie in {repository / deeper[0]}; give that"
    if not entries:
        return f"{wanted}, but the folder is empty; `attnserve-export` writes models into it"
    more = ", ..." if len(entries) > _SHOWN else ""
    return f"{wanted}, but there lies {', '.join(entries[:_SHOWN])}{more}"


def _above(folder: Path, levels: int) -> Path:
    return folder.resolve().parents[levels - 1]


Fingerprint = dict[str, tuple[int, int, int, int]]
"""Of files by name: inode, bytes, and when content and inode last changed, in nanoseconds."""


def check_files(folder: Path, manifest: Manifest) -> Fingerprint:
    """Compare a version's files with its manifest.

    Returns:
        What the files were when they were compared, for `check_unchanged`.

    Raises:
        ManifestError: a name, a size or a SHA-256 differs, or a file lies elsewhere.
    """
    if (manifest.name, str(manifest.version)) != (folder.parent.name, folder.name):
        raise ManifestError(
            f"{folder}/{FILE}: is for {manifest.name} version {manifest.version}, "
            "which differs from its folders"
        )
    compared: Fingerprint = {}
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ManifestError(f"{path}: leads out of its folder; allowed: files within")
        if not path.is_file():
            raise ManifestError(f"{path}: listed in {FILE}, but missing")
        compared[name] = _fingerprint(path)
        if path.stat().st_size != entry.bytes:
            raise ManifestError(f"{path}: {path.stat().st_size} bytes; {FILE} says {entry.bytes}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.sha256:
            raise ManifestError(f"{path}: SHA-256 {digest}; {FILE} says {entry.sha256}")
    return compared


def check_unchanged(folder: Path, compared: Fingerprint) -> None:
    """Make sure that what was loaded since `check_files` is what that has compared.

    Raises:
        ManifestError: a file was written to, replaced or removed meanwhile.
    """
    for name, before in compared.items():
        path = folder / name
        try:
            changed = _fingerprint(path) != before
        except OSError:
            changed = True
        if changed:
            raise ManifestError(f"{path}: changed while it was loaded; load it again")


def _fingerprint(path: Path) -> tuple[int, int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
