"""One ONNX graph, loaded and run by ONNX Runtime."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import attnserve_kernels
import ml_dtypes
import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from attnserve_server.dtypes import Array
from attnserve_server.engine.providers import Providers

_BFLOAT16 = 16  # its number in ONNX
_NOWHERE: Mapping[str, Array] = {}


class GraphSession:
    """An ONNX graph that is ready to run. Safe to call from several threads.

    Args:
        path: the ONNX file.
        providers: where to run it.
        intra_op_threads: CPU threads of one computation.
        spinning: whether those threads spin while idle.
    """

    def __init__(
        self, path: Path, providers: Providers, *, intra_op_threads: int, spinning: bool
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op_threads
        # Attention is one chain of operators: nothing runs beside it within a computation.
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        # Errors come as exceptions; nothing else of its log is for the operator.
        options.log_severity_level = 4
        library = attnserve_kernels.library_path()
        if library is not None:
            options.register_custom_ops_library(str(library))
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers.names)
        )
        self._on_cuda = providers.on_cuda
        self.inputs: frozenset[str] = frozenset(i.name for i in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())
        types = [*self._session.get_inputs(), *self._session.get_outputs()]
        heads = [entry.shape[1] for entry in types if entry.name in ("query", "key", "value")]
        # Whether it takes any number of heads; a fixed number is an integer.
        self.any_heads = len(heads) == 3 and not any(isinstance(size, int) for size in heads)
        self._has_bfloat16 = any(entry.type == "tensor(bfloat16)" for entry in types)

    def run(
        self,
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        into: Mapping[str, Array] = _NOWHERE,
    ) -> dict[str, Array]:
        """Run the graph.

        Args:
            feeds: every input by name, and perhaps more, which are left out.
            outputs: the outputs to bring back.
            into: contiguous arrays of the right shape and dtype to put outputs into, by name;
                those that are not aligned are left to the caller.

        Returns:
            Those outputs by name, on the host.
        """
        if self._on_cuda or self._has_bfloat16:
            results = self._run_bound(feeds, outputs)
            for name in into.keys() & results.keys():
                into[name][...] = results[name]
                results[name] = into[name]
            return results
        # Kernels may rely on what C++ does of elements: that they lie at multiples of their size.
        into = {name: array for name, array in into.items() if array.flags.aligned}
        if into:
            return self._run_into(feeds, outputs, into)
        results = self._session.run(list(outputs), {name: feeds[name] for name in self.inputs})
        return dict(zip(outputs, results, strict=True))

    def _run_into(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], into: Mapping[str, Array]
    ) -> dict[str, Array]:
        """As `run` on a CPU, writing outputs where they are wanted instead of copying them."""
        binding = self._session.io_binding()
        for name in self.inputs:
            binding.bind_cpu_input(name, feeds[name])
        for name in outputs:
            array = into.get(name)
            if array is None:
                binding.bind_output(name, "cpu")
            else:
                address = array.ctypes.data
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, address)
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return {
            name: into[name] if name in into else value.numpy()
            for name, value in zip(outputs, values, strict=True)
        }

    def _run_bound(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """As `run`, with IO binding: outputs not asked for never leave the device."""
        device = "cuda" if self._on_cuda else "cpu"
        binding = self._session.io_binding()
        kept = []
        for name in self.inputs:
            array = feeds[name]
            if array.dtype == ml_dtypes.bfloat16:
                # ONNX Runtime's Python has no BF16 arrays: their bits go in and out.
                bits = np.ascontiguousarray(array).view(np.uint16)
                value = OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
                kept.append((bits, value))
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, array)
        for name in outputs:
            binding.bind_output(name, "cpu" if self._has_bfloat16 else device)
        self._session.run_with_iobinding(binding)
        if not self._has_bfloat16:
            return dict(zip(outputs, binding.copy_outputs_to_cpu(), strict=True))
        return {
            name: _array(value) for name, value in zip(outputs, binding.get_outputs(), strict=True)
        }


def _array(value: OrtValue) -> Array:
    """A copy of a tensor on the CPU."""
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    size = value.tensor_size_in_bytes()
    memory = (ctypes.c_char * size).from_address(value.data_ptr())
    bits = np.frombuffer(memory, np.uint16).copy()
    array: Array = bits.view(ml_dtypes.bfloat16).reshape(value.shape())
    return array
