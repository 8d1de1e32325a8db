"""Writes all files of a report."""

from pathlib import Path

from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.report.csv_file import write_csv
from attnserve_loadtest.report.html import write_html
from attnserve_loadtest.report.json_file import write_json
from attnserve_loadtest.report.plot import write_png
from attnserve_loadtest.report.schema import Report

_WRITERS = {
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
    make_folder(folder)
    paths = []
    for name, write in _WRITERS.items():
        path = folder / name
        try:
            write(report, path)
        except OSError as error:
            raise LoadTestError(f"cannot write {path}: {error.strerror}") from None
        paths.append(path)
    return paths
