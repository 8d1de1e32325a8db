"""What the tests of several distributions share."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

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
def export_all() -> ExportAll:
    """Runs `attnserve-export` with each list of arguments, in two processes side by side."""

    def export(share: Sequence[Sequence[str]]) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _EXPORT, json.dumps(share)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def export_in_two(all_arguments: Sequence[Sequence[str]]) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(export, (all_arguments[0::2], all_arguments[1::2])))

    return export_in_two
