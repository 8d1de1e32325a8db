"""Files of a checkpoint, read."""

import json
from pathlib import Path
from typing import Any

from attnserve_export.errors import ExportError


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        ExportError: it cannot be read, or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"--checkpoint: {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"--checkpoint: {path}: not JSON: {error}") from None
