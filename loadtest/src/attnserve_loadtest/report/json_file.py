"""Reports as JSON: writes one, and reads back what was written."""

import json
import types
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.report.load_schema import LOAD_SCHEMA, LOAD_SCHEMA_VERSION, LoadReport
from attnserve_loadtest.report.schema import SCHEMA, SCHEMA_VERSION, Report
from attnserve_loadtest.report.simulation_schema import SimulationReport

# By the schema's name: its version, and what is made of it.
_KNOWN: dict[str, tuple[int, type]] = {
    SCHEMA: (SCHEMA_VERSION, Report),
    LOAD_SCHEMA: (LOAD_SCHEMA_VERSION, LoadReport),
}
_COMMANDS = "`attnserve-loadtest scaling`, `load` or `replay`"


def write_json(report: Report | LoadReport | SimulationReport, path: Path) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", "utf-8")


def read_json(path: Path) -> Report | LoadReport:
    """Read a report that `write_json` wrote.

    Raises:
        LoadTestError: there is no such file, or it is not such a report.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise LoadTestError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise LoadTestError(f"{path} is not JSON") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, str) or schema not in _KNOWN:
        raise LoadTestError(f"{path} is not a report of {_COMMANDS}")
    version, kind = _KNOWN[schema]
    if content.get("schema_version") != version:
        raise LoadTestError(
            f"{path} has schema version {content.get('schema_version')}; "
            f"this program reads {version}"
        )
    try:
        report: Report | LoadReport = _decode(content, kind)
    except (KeyError, TypeError, ValueError) as error:
        raise LoadTestError(f"{path} is damaged: {error}") from None
    return report


def _decode(value: Any, kind: Any) -> Any:
    """`value`, as JSON gave it, as the type that the schema names."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict):
            raise TypeError(f"{kind.__name__} is not an object")
        return kind(**{f.name: _decode(value[f.name], hints[f.name]) for f in fields(kind)})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        some = next(each for each in arguments if each is not types.NoneType)
        return None if value is None else _decode(value, some)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is not an array")
        return tuple(_decode(each, arguments[0]) for each in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
