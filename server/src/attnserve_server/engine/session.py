"""One ONNX graph, loaded and run by ONNX Runtime."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime

from attnserve_server.dtypes import Array
from attnserve_server.engine.providers import Providers


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
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers.names)
        )
        self._on_cuda = providers.on_cuda
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self.inputs: frozenset[str] = frozenset(i.name for i in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the graph.

        Args:
            feeds: every input by name.
            outputs: the outputs to bring back.

        Returns:
            Those outputs by name, on the host.
        """
        if self._on_cuda:
            return self.run_bound(feeds, outputs)
        results = self._session.run(list(outputs), dict(feeds))
        return dict(zip(outputs, results, strict=True))

    def run_bound(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """As `run`, with IO binding: outputs not asked for never leave the device."""
        device = "cuda" if self._on_cuda else "cpu"
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in outputs:
            binding.bind_output(name, device)
        self._session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.copy_outputs_to_cpu(), strict=True))
