"""Files written whole or not at all: beside their place, then renamed."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from attnserve_proto.commands.running import CommandError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, that takes its place if nothing goes wrong.

    A link is followed; what is no ordinary file (a terminal, /dev/null) is written as it is.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    beside = path.with_name(f".{secrets.token_hex(8)}.new{path.suffix}")
    try:
        yield beside
        if path.exists():
            beside.chmod(path.stat().st_mode & 0o7777)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_file(option: str, path: Path) -> None:
    """Say before any work that a file cannot be written.

    Raises:
        CommandError: code 2.
    """
    if path.is_dir():
        raise CommandError(f"{option}: given {path}, a folder; allowed: a file in it", 2)
    try:
        if not path.exists() or path.is_file():
            with tempfile.NamedTemporaryFile(dir=os.path.realpath(path.parent), prefix="."):
                pass
    except OSError as error:
        refuse_file(option, path, error, "a file in a folder that can be written")


def check_folder(option: str, path: Path) -> None:
    """Say before any work that a folder, which need not be there yet, cannot be written into.

    Raises:
        CommandError: code 2.
    """
    try:
        there = Path(os.path.realpath(path))
        while not os.path.lexists(there):
            there = there.parent
        with tempfile.TemporaryDirectory(dir=there, prefix="."):
            pass
    except OSError as error:
        refuse_file(option, path, error, "a folder that can be written, or made")


def refuse_file(option: str, path: Path, error: OSError, allowed: str) -> NoReturn:
    """Say which file it is that the system refuses, and what is allowed.

    Raises:
        CommandError: code 2.
    """
    reason = error.strerror or str(error)
    raise CommandError(f"{option}: given {path}: {reason}; allowed: {allowed}", 2) from None
