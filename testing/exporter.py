"""PyTorch's exporter, made to do less over and over again."""

import functools
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry


def read_operators_once() -> None:
    """Keep the table of operators that `torch.onnx.export` otherwise builds anew for each graph.

    It reads the sources of 500 functions for that, a third of the time that a small graph takes.
    Nothing is added to the table while exporting.
    """
    build = ONNXRegistry.from_torchlib
    if not hasattr(build, "cache_info"):
        cached: Any = staticmethod(functools.cache(build))
        ONNXRegistry.from_torchlib = cached  # type: ignore[method-assign]
