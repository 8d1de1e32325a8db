"""ONNX graphs run on this machine, to verify and to measure them."""

import ctypes
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import attnserve_kernels
import ml_dtypes
import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]

_BF16 = 16  # its number in ONNX


def open_session(
    path: Path,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int = 0,
    *,
    lean: bool = False,
) -> onnxruntime.InferenceSession:
    """A graph, ready to run, its threads not spinning between runs.

    Args:
        path: the ONNX file.
        providers: where to run it.
        threads: of one run; 0 lets ONNX Runtime choose.
        lean: whether to take as little memory as can be, and more time: parameters are read where
            the file is mapped, and not laid out anew.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
    library = attnserve_kernels.library_path()
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def run(
    session: onnxruntime.InferenceSession,
    feeds: Mapping[str, Array],
    names: Collection[str],
) -> dict[str, Array]:
    """Run a graph.

    Args:
        session: of the graph.
        feeds: its inputs, and perhaps more, which are left out.
        names: of the outputs to bring back.

    Returns:
        The outputs by name.
    """
    taken = [entry.name for entry in session.get_inputs()]
    taken += [each.name for each in session.get_overridable_initializers() if each.name in feeds]
    types = {entry.name: entry.type for entry in session.get_outputs()}
    halves = any(types[name] == "tensor(bfloat16)" for name in names)
    if not halves and not any(feeds[name].dtype == ml_dtypes.bfloat16 for name in taken):
        answers = session.run(list(names), {name: feeds[name] for name in taken})
        return dict(zip(names, answers, strict=True))
    # ONNX Runtime's Python has no BF16 arrays: only their bits go in and out.
    made = session.run_with_ort_values(list(names), {name: _value(feeds[name]) for name in taken})
    return {name: _array(value, types[name]) for name, value in zip(names, made, strict=True)}


def _value(array: Array) -> onnxruntime.OrtValue:
    if array.dtype != ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    bits = np.ascontiguousarray(array).view(np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BF16)


def _array(value: onnxruntime.OrtValue, kind: str) -> Array:
    if kind != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    shape = tuple(value.shape())
    bits = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    numbers: Array = np.array(bits, np.uint16).view(ml_dtypes.bfloat16).reshape(shape)
    return numbers
