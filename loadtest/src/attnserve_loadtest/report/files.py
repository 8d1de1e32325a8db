"""Writes all files of a report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from attnserve_proto.commands import replacing

from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.report.csv_file import write_csv
from attnserve_loadtest.report.html import write_html
from attnserve_loadtest.report.json_file import write_json
from attnserve_loadtest.report.plot import write_png
from attnserve_loadtest.report.schema import Report

Content = TypeVar("Content")

_WRITERS: Mapping[str, Callable[[Report, Path], None]] = {
    "report.json": write_json,
    "report.csv": write_csv,
    "report.png": write_png,
    "report.html": write_html,
}


def make_folder(folder: Path) -> None:
    """Make the folder for a report; it may be there already.

    Raises:
        LoadTestError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".attnserve-loadtest"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LoadTestError(f"cannot write to {folder}: {error.strerror}") from None


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.json`, `.csv`, `.png` and `.html` into a folder; JSON first.

    Raises:
        LoadTestError: a file cannot be written.
    """
    return write_files(report, folder, _WRITERS)


def write_files(
    content: Content, folder: Path, writers: Mapping[str, Callable[[Content, Path], None]]
) -> list[Path]:
    """Write the same content into several files, each of which is replaced whole.

    Args:
        content: what the writers take.
        folder: made if it is not there.
        writers: by the file's name, in their order.

    Raises:
        LoadTestError: a file cannot be written.
    """
    make_folder(folder)
    paths = []
    for name, write in writers.items():
        path = folder / name
        try:
            with replacing(path) as beside:
                write(content, beside)
        except OSError as error:
            raise LoadTestError(f"cannot write {path}: {error.strerror}") from None
        paths.append(path)
    return paths
