"""What the tests of several distributions share."""

import contextlib
import fcntl
import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import attnserve_kernels
import pytest
from hypothesis import settings

# No test fails because the machine is busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell's background jobs ignore it, and so would all processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ExportAll = Callable[[Sequence[Sequence[str]]], None]

# Tests are shared out by file: what takes long comes first, so that no process is left alone with
# it at the end.
LONGEST = (
    "test_export_family.py",
    "test_families.py",
    "test_export_core.py",
    "test_loadtest_scaling.py",
    "test_paged.py",
    "test_end_to_end.py",
    "test_ray_cluster.py",
    "test_export_inputs.py",
    "test_server_wedged.py",
    "test_server_traces.py",
    "test_half_transformers.py",
    "test_benchmarks_kernels.py",
    "test_gpu_acceptance.py",
    "test_benchmarks_serving.py",
    "test_benchmarks_dataplane.py",
    "test_server_memory.py",
    "test_export_checkpoints.py",
    "test_client_retries.py",
    "test_benchmarks_decode.py",
    "test_export_flash.py",
    "test_loadtest_locust.py",
    "test_loadtest_load.py",
    "test_loadtest_generator.py",
    "test_loadtest_open_locust.py",
    "test_moving.py",
    "test_transformers.py",
    "test_cluster.py",
    "test_cluster_shards.py",
    "test_kernels.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs operators that could not be built here."""
    marked = item.get_closest_marker("needs_library") is not None
    if marked and attnserve_kernels.library_path() is None:
        pytest.skip("attnserve-kernels has no library here")


@pytest.fixture(scope="session")
def export_all(pytestconfig: pytest.Config) -> ExportAll:
    """Runs `attnserve-export` with each list of arguments.

    Exports are kept in pytest's cache for the next run and for the process beside this one, as long
    as no source that they depend on has changed.
    """
    from attnserve_export.cli import main
    from exporter import read_operators_once

    read_operators_once()
    cache = pytestconfig.cache
    assert cache is not None
    kept = cache.mkdir("exports")
    sources = _digest_of_sources()

    def export(arguments: Sequence[str], *, wait: bool) -> bool:
        """Put an export where its arguments say; False if another process is making it."""
        options = dict(pairwise(arguments))
        version = Path(options["--name"]) / options.get("--version", "1")
        told = [a for a in arguments if a != options["--out"]]
        for option in {"--checkpoint", "--weights"} & options.keys():
            told[told.index(options[option])] = _digest(Path(options[option]))
        key = hashlib.sha256(json.dumps([sources, told]).encode()).hexdigest()[:32]
        with _locked(kept / f"{key}.lock", wait=wait) as mine:
            if not mine:
                return False
            if not (kept / key).is_dir():
                assert main(arguments) == 0, arguments
                unfinished = kept / f"{key}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                shutil.copytree(Path(options["--out"]) / version, unfinished)
                unfinished.rename(kept / key)
                return True
        shutil.copytree(kept / key, Path(options["--out"]) / version)
        return True

    def export_them(all_arguments: Sequence[Sequence[str]]) -> None:
        elsewhere = [a for a in all_arguments if not export(a, wait=False)]
        for arguments in elsewhere:
            export(arguments, wait=True)

    return export_them


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock among processes; False if another has it and `wait` isn't set."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _digest_of_sources() -> str:
    """Of everything that an export depends on."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for pattern in ("export/src/**/*.py", "kernels/native/*", "constraints.txt"):
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    """Of a file, or of a folder's files, those of its folders included."""
    digest = hashlib.sha256(path.name.encode())
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(f"{file.relative_to(path.parent)} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
