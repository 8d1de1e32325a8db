"""Attention for CPUs as operators of ONNX Runtime, domain `attnserve`.

The operators are built from `native/` when the package is installed; where that was not possible,
`library_path` is None and models use the graphs that need no operators of ours.
"""

import ctypes
import importlib.machinery
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


@cache
def library_path() -> Path | None:
    """What to give to `SessionOptions.register_custom_ops_library`; None if it was not built."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"operators{suffix}"
        if path.is_file():
            return path
    return None


def instruction_set() -> str | None:
    """Which implementation this processor runs: avx512, avx2 or generic; None without library."""
    path = library_path()
    if path is None:
        return None
    function = ctypes.CDLL(str(path)).attnserve_instruction_set
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()
