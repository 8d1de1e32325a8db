"""The tensors that `attnserve attend` sends: those of a file, or random ones."""

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attnserve_client import Model, _tensors
from attnserve_client._results import Array

TENSORS = (
    "query",
    "key",
    "value",
    "hidden_states",
    "context",
    "key_lengths",
    "bias",
    "sinks",
    "prefix_lengths",
    "cu_seqlens_q",
    "cu_seqlens_k",
)
NUMBERS = ("scale", "softcap")
ALLOWED = f"{', '.join(TENSORS)}; numbers called {', '.join(NUMBERS)}; q, k and v for short"

# Those that have the model's dtype, unless they are of whole numbers or boolean.
_OF_MODEL = frozenset(("query", "key", "value", "hidden_states", "context", "bias"))

_SHORT = {"q": "query", "k": "key", "v": "value"}

# How NumPy's files name what it has no name for: two bytes of nothing.
_BFLOAT16_IN_FILES = np.dtype("V2")


def read(path: Path) -> dict[str, Any]:
    """What an .npz file holds, by the names of `attend`'s arguments.

    Raises:
        ValueError: it is none, or has others than a request takes.
    """
    allowed = f"an .npz file of arrays called {ALLOWED}"
    try:
        with np.load(path) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("one array without a name")
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        reason = error.strerror or "it is cut off"
        raise ValueError(f"--input: given {path}: {reason}; allowed: {allowed}") from None
    except (ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        # NumPy speaks of pickles wherever it knows no other format.
        reason = "no such file" if "pickle" in str(error) else str(error)
        raise ValueError(f"--input: given {path}: {reason}; allowed: {allowed}") from None
    unknown = [name for name in arrays if name not in (*TENSORS, *NUMBERS, *_SHORT)]
    if unknown or not arrays:
        given = f"arrays called {', '.join(unknown)}" if unknown else "no array"
        raise ValueError(f"--input: given {path} with {given}; allowed: {allowed}")
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        whole = _SHORT.get(name, name)
        if whole in found:
            raise ValueError(f"--input: given {path} with {name} and {whole}; allowed: one of them")
        found[whole] = _number(path, name, array) if name in NUMBERS else array
    return found


def as_model(tensors: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The same, with what is in the model's dtype rounded to it.

    Raises:
        TypeError: the model is BF16, and ml_dtypes is not installed.
    """
    dtype = _tensors.numpy_dtype(model.dtype)
    return {
        name: _converted(array, dtype) if name in _OF_MODEL else array
        for name, array in tensors.items()
    }


def random(model: Model, options: argparse.Namespace) -> dict[str, Array]:
    """Normally distributed tensors of a model's dtype, by the options of the command.

    Raises:
        TypeError: the model is BF16, and ml_dtypes is not installed.
        ValueError: it takes none that could be made without knowing more.
    """
    if model.kind == "transformer":
        raise ValueError(f"--model: {model.name} takes tokens; use `attnserve tokens`")
    generator = np.random.default_rng(options.seed)
    batch, seq_len = options.batch, options.seq_len
    shapes: dict[str, tuple[int, ...]]
    if model.kind == "layer":
        if model.mask == "cross":
            raise ValueError(f"--model: {model.name} takes a context; give both with --input")
        shapes = {"hidden_states": (batch, seq_len, model.embed_dim)}
    else:
        shapes = {
            "query": (batch, model.num_heads, seq_len, model.head_dim),
            "key": (batch, model.num_kv_heads, seq_len, model.head_dim),
            "value": (batch, model.num_kv_heads, seq_len, model.value_head_dim),
        }
    dtype = _tensors.numpy_dtype(model.dtype)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def storable(array: Array) -> Array:
    """An array that NumPy's files can name: bfloat16 becomes float32, which holds all of it."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _number(path: Path, name: str, array: Array) -> float:
    if array.size != 1 or array.dtype.kind not in "fiu":
        raise ValueError(
            f"--input: given {path} with {name} of {array.dtype}, shape {list(array.shape)}; "
            "allowed: one number"
        )
    return float(array.reshape(()))


def _converted(array: Array, dtype: "np.dtype[Any]") -> Array:
    if array.dtype == _BFLOAT16_IN_FILES:
        array = array.view(_tensors.numpy_dtype("BF16"))
    floating = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return array.astype(dtype) if floating else array
