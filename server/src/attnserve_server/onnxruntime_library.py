"""Where ONNX Runtime is: the shared library in its wheel, which the data plane loads.

The wheel's Python module is a second copy of ONNX Runtime and is never imported here.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

from attnserve_server.settings import SettingsError


class LibraryError(SettingsError):
    """ONNX Runtime is not installed as the data plane needs it; the message says what to do."""


def folder() -> Path:
    """Of the wheel's libraries.

    Raises:
        LibraryError: there is none.
    """
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        raise LibraryError(
            "ONNX Runtime is not installed; install it with `pip install onnxruntime-gpu`"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "capi"


def path() -> Path:
    """The library itself.

    Raises:
        LibraryError: the wheel has none.
    """
    found = sorted(folder().glob("libonnxruntime.so*"))
    if not found:
        raise LibraryError(
            f"{folder()}: no libonnxruntime.so; install ONNX Runtime's own wheel, onnxruntime-gpu"
        )
    return found[0]


def version() -> str:
    """Of the wheel that is installed."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
