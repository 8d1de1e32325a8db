"""Who sees whom, read from the masks that transformers makes.

Transformers describes a mask by a function of the places of query and key. Where that function
says no more than how far a query sees, the mask is a `Reach`: nodes of ours compute it, at any
length, without a matrix where they can. Any other mask is taken as the model makes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A query far inside a long sequence, and others that must see as far.
_FAR = 1 << 19
_PROBED = (0, 1, 2, 3, 7, 17, 64, 300, 1023, 8191, _FAR // 3, _FAR - 1, _FAR + 1)


@dataclass(frozen=True)
class Reach:
    """Keys that a query sees besides its own: up to so many before and after; None: all."""

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        """Whether no query sees what comes after it."""
        return self.right == 0


EVERYTHING = Reach(None, None)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def reach_of(mask_function: MaskFunction) -> Reach | None:
    """How far queries see; None: it is not the same for all of them.

    Args:
        mask_function: of batch, head, query and key, as transformers' masks are described.
    """
    try:
        seen = _row(mask_function, _FAR, 2 * _FAR)
        if seen is None:
            return None
        left = None if seen[0] == 0 else _FAR - seen[0]
        right = None if seen[1] == 2 * _FAR - 1 else seen[1] - _FAR
        found = Reach(left, right)
        for query in _PROBED:
            first = 0 if left is None else max(0, query - left)
            last = 2 * _FAR - 1 if right is None else query + right
            if _row(mask_function, query, 2 * _FAR) != (first, last):
                return None
    except Exception:  # of a function that reads more than places: an index, a shape
        return None
    return found


def _row(mask_function: MaskFunction, query: int, key_len: int) -> tuple[int, int] | None:
    """The first and last key that a query sees; None: it sees none, or not all between."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    keys = torch.arange(key_len)[None, None, None, :]
    visible = mask_function(zero, zero, zero + query, keys).expand(1, 1, 1, key_len)
    places = visible.reshape(-1).nonzero()[:, 0]
    if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
        return None
    return int(places[0]), int(places[-1])


@dataclass
class SeenMasks:
    """The masks that a model made for itself during one run."""

    made: list[tuple[Tensor, Reach | None]]

    def reach(self, mask: Tensor | None) -> Reach | None:
        """How far the queries of an attention see that was given a mask; None: not so simple.

        A view of a mask that was made is that mask; one of other values is the model's own.
        """
        if mask is None:
            return EVERYTHING
        for made, reach in self.made:
            if made is mask:
                return reach
        for made, reach in self.made:
            if (
                made.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
                and made.shape == mask.shape
            ):
                return reach
        return None


_current: SeenMasks | None = None


class watching:  # noqa: N801 (a context manager)
    """Keeps the masks that are made in a `with` block, with how far they let queries see."""

    def __enter__(self) -> SeenMasks:
        """Begin."""
        global _current
        _current = SeenMasks([])
        return _current

    def __exit__(self, *_: object) -> None:
        """End."""
        global _current
        _current = None


def make_mask(mask_function: MaskFunction, **given: Any) -> Tensor:
    """What transformers calls for a mask: the one that its eager attention gets."""
    from transformers.masking_utils import eager_mask

    given["allow_is_bidirectional_skip"] = False
    made: Tensor = eager_mask(mask_function=mask_function, **given)
    if _current is not None:
        _current.made.append((made, reach_of(mask_function)))
    return made
