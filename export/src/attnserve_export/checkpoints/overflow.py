"""What transformers do about hidden states that overflow, traced without a branch.

In FP16 BART, Marian and their like clamp hidden states after each layer of the encoder, `if not
torch.isfinite(hidden_states).all()`. A graph of fixed nodes does not branch on what it computes, so
both are computed, and one is chosen.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class BothBranches(TorchFunctionMode):
    """While it is active, what is clamped where something is not finite is chosen by a node."""

    def __init__(self) -> None:
        super().__init__()
        self._finite: Tensor | None = None  # of elements, then whether all are
        self._chosen_by: Tensor | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchFunctionMode`."""
        if func is Tensor.__bool__ and args[0] is self._finite:
            self._chosen_by, self._finite = self._finite, None
            return False  # which goes on to the clamp
        result = func(*args, **(kwargs or {}))
        if func is torch.isfinite or (func is Tensor.all and args[0] is self._finite):
            self._finite = result
        elif func is torch.clamp and self._chosen_by is not None:
            result = torch.where(self._chosen_by, args[0], result)
            self._chosen_by = None
        return result
