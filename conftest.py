"""What the tests of several distributions share."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import attnserve_kernels
import pytest

ExportAll = Callable[[Sequence[Sequence[str]]], None]

_EXPORT = """
import json, sys
from attnserve_export.cli import main
for arguments in json.loads(sys.argv[1]):
    print(arguments, file=sys.stderr)
    if main(arguments):
        sys.exit(1)
"""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs operators that could not be built here."""
    marked = item.get_closest_marker("needs_library") is not None
    if marked and attnserve_kernels.library_path() is None:
        pytest.skip("attnserve-kernels has no library here")


@pytest.fixture(scope="session")
def export_all(pytestconfig: pytest.Config) -> ExportAll:
    """Runs `attnserve-export` with each list of arguments, in two processes side by side.

    What is exported from nothing but its arguments is kept in pytest's cache for the next run, as
    long as no source that it depends on has changed.
    """
    cache = pytestconfig.cache
    assert cache is not None
    kept = cache.mkdir("exports")
    sources = _digest_of_sources()

    def place(arguments: Sequence[str]) -> tuple[Path, Path] | None:
        """Where an export is kept, and where it goes; None if it reads other files."""
        if "--checkpoint" in arguments or "--weights" in arguments:
            return None
        options = dict(pairwise(arguments))
        folder = Path(options["--name"]) / options.get("--version", "1")
        others = [a for a in arguments if a != options["--out"]]
        key = hashlib.sha256(json.dumps([sources, others]).encode()).hexdigest()[:32]
        return kept / key, Path(options["--out"]) / folder

    def export(share: Sequence[Sequence[str]]) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _EXPORT, json.dumps(share)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def export_in_two(all_arguments: Sequence[Sequence[str]]) -> None:
        missing = []
        for arguments in all_arguments:
            known = place(arguments)
            if known is not None and known[0].is_dir():
                shutil.copytree(*known)
            else:
                missing.append(arguments)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(export, (missing[0::2], missing[1::2])))
        for known in map(place, missing):
            if known is not None:
                unfinished = known[0].with_suffix(f".{os.getpid()}")
                shutil.copytree(known[1], unfinished)
                with contextlib.suppress(OSError):  # another run was first
                    unfinished.rename(known[0])

    return export_in_two


def _digest_of_sources() -> str:
    """Of everything that an export depends on."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for pattern in ("export/src/**/*.py", "kernels/native/*", "constraints.txt"):
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()
