"""A model's parameters: as they are stored, and wider while they are computed with.

A large model has its parameters in memory once. What computes with them in another type gets them
cast when it reads them, each for as long as it takes.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Tables of more numbers than this are not cast as a whole: only the rows that are read.
_LARGE_TABLE = 1 << 24


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What a graph of a model has as its parameters: as they are stored, by all of their names."""
    kept = model.state_dict(keep_vars=True)
    buffers = model.named_buffers(remove_duplicate=False)
    parameters = model.named_parameters(remove_duplicate=False)
    found = {name: tensor for name, tensor in buffers if name in kept}
    return found | {name: tensor.detach() for name, tensor in parameters}


def count_of(model: nn.Module) -> int:
    """How many numbers its parameters are, those that are shared counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def in_fp32(model: nn.Module, *, values: bool) -> nn.Module:
    """A copy of a model that computes in FP32.

    Args:
        model: with its parameters in any type.
        values: whether the copy has their values. Otherwise it has memory that nobody has written
            to, which takes none: it can be traced, and not run.
    """
    known: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        is_parameter = isinstance(tensor, nn.Parameter)
        if not tensor.is_floating_point() or (is_parameter and id(tensor) in known):
            continue
        if is_parameter and not values:
            made = torch.empty(tensor.shape, dtype=torch.float32)
        else:
            made = tensor.detach().to(torch.float32, copy=True)
        known[id(tensor)] = nn.Parameter(made, requires_grad=False) if is_parameter else made
    return copy.deepcopy(model, known)


def release(model: nn.Module) -> None:
    """Give back the memory of a model's parameters, after which it cannot be run any more."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


@contextlib.contextmanager
def widened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """In a `with` block, whoever reads a parameter of a model gets it in a type, and keeps it.

    Args:
        model: any.
        dtype: a floating-point type.
    """
    hooks, own = [], []
    for module in model.modules():
        for kind in ("_parameters", "_buffers"):
            own.append((module, kind, module.__dict__[kind]))
            module.__dict__[kind] = _Widened(module.__dict__[kind], dtype)
        if isinstance(module, nn.Embedding) and _is_large_table(module):
            hooks += _reading_rows(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, kind, before in own:
            module.__dict__[kind] = before


class Eager:
    """A model with eager attention in float64, of whose parameters there is no second copy.

    Attributes:
        forward: of the model, for what it takes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self.forward = model.forward

    def __call__(self, **given: Tensor) -> Any:
        """What transformers makes of some inputs."""
        model, own = self._model, self._model.config._attn_implementation
        try:
            _implement(model, "eager")
            with widened(model, torch.float64):
                return model(**given)
        finally:
            _implement(model, own)


def _implement(model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    model.set_experts_implementation(implementation)


class _Widened(dict[str, Tensor | None]):
    """The parameters of a module, cast when they are read by name.

    Attributes:
        instead: what is read in their place, for a while.
    """

    def __init__(self, own: dict[str, Tensor | None], dtype: torch.dtype) -> None:
        super().__init__(own)
        self._dtype = dtype
        self.instead: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor | None:
        tensor = self.instead.get(name, super().__getitem__(name))
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(self._dtype)


def _is_large_table(module: nn.Embedding) -> bool:
    taken = list(inspect.signature(module.forward).parameters)
    by_ids = bool(taken) and taken[0] in ("input", "input_ids")
    return by_ids and _as_stored(module, "weight").numel() > _LARGE_TABLE


def _as_stored(module: nn.Module, name: str) -> Tensor:
    """A parameter that is not cast, whatever blocks there are around this."""
    tensor = dict.__getitem__(module._parameters, name)
    assert tensor is not None
    return tensor


def _reading_rows(module: nn.Embedding) -> list[Any]:
    """Let a table seem to have no more rows than are read of it."""
    padding_idx = module.padding_idx

    def before(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        parameters: Any = module._parameters
        if parameters.instead:  # by a block around this one
            return given
        ids, places = torch.unique(given[0], return_inverse=True)
        parameters.instead["weight"] = _as_stored(module, "weight")[ids]
        module.padding_idx = None  # means something to gradients alone
        return places, *given[1:]

    def after(*_: object) -> None:
        parameters: Any = module._parameters
        parameters.instead.clear()
        module.padding_idx = padding_idx

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
