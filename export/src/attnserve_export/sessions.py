"""ONNX graphs run on this machine, to verify and to measure them."""

from collections.abc import Mapping, Sequence
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
    path: Path, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0
) -> onnxruntime.InferenceSession:
    """A graph, ready to run, its threads not spinning between runs.

    Args:
        path: the ONNX file.
        providers: where to run it.
        threads: of one run; 0 lets ONNX Runtime choose.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    library = attnserve_kernels.library_path()
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def run(
    session: onnxruntime.InferenceSession,
    feeds: Mapping[str, Array],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Array]:
    """Run a graph.

    Args:
        session: of the graph.
        feeds: its inputs, and perhaps more, which are left out.
        shapes: of the outputs to bring back.

    Returns:
        The outputs by name.
    """
    taken = [entry.name for entry in session.get_inputs()]
    taken += [each.name for each in session.get_overridable_initializers() if each.name in feeds]
    if not any(feeds[name].dtype == ml_dtypes.bfloat16 for name in taken):
        names = list(shapes)
        answers = session.run(names, {name: feeds[name] for name in taken})
        return dict(zip(names, answers, strict=True))
    # ONNX Runtime's Python has no BF16 arrays: only their bits go in and out.
    binding = session.io_binding()
    for name in taken:
        array = np.ascontiguousarray(feeds[name])
        if array.dtype == ml_dtypes.bfloat16:
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                array.view(np.uint16), _BF16
            )
            binding.bind_ortvalue_input(name, value)
        else:
            binding.bind_cpu_input(name, array)
    types = {entry.name: entry.type for entry in session.get_outputs()}
    answers = {}
    for name, shape in shapes.items():
        if types[name] == "tensor(bfloat16)":
            answers[name] = np.empty(shape, ml_dtypes.bfloat16)
            binding.bind_output(name, "cpu", 0, _BF16, list(shape), answers[name].ctypes.data)
        else:
            binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    for name, value in zip(shapes, binding.get_outputs(), strict=True):
        if name not in answers:
            answers[name] = value.numpy()
    return answers
