"""How the quantities of a context report grow with the length."""

from collections.abc import Sequence

import numpy as np
from attnserve_loadtest.fitting import CONFIDENCE, fit_power_law
from numpy.typing import NDArray

from attnserve_lens.context.schema import Cell, Growth

Floats = NDArray[np.float64]
_BEST = 5


def by_length(cells: Sequence[Cell], seq_lens: Sequence[int], name: str) -> Floats:
    """A quantity of the cells, the mean over depths: [lengths, L, H], or [lengths]."""
    return np.array(
        [
            np.mean([getattr(cell, name) for cell in cells if cell.seq_len == each], axis=0)
            for each in seq_lens
        ]
    )


def of_heads(
    of: str, seq_lens: Sequence[int], values: Floats, layers: Sequence[int], heads: Sequence[int]
) -> tuple[Growth, ...]:
    """The growth of every head, by layer and head, of values [lengths, L, H]."""
    return tuple(
        growth(f"{of}, layer {layer} head {head}", seq_lens, values[:, at, place], layer, head)
        for at, layer in enumerate(layers)
        for place, head in enumerate(heads)
    )


def best(chosen_by: Floats, growths: Sequence[Growth]) -> tuple[Growth, ...]:
    """The heads with the most weight, heaviest first.

    Args:
        chosen_by: [lengths, L, H], of other trials than the growths: the heaviest of many is heavy
            by chance too.
        growths: of every head, by layer and head.
    """
    order = np.argsort(-chosen_by.mean(axis=0), axis=None)[:_BEST]
    return tuple(growths[int(at)] for at in order)


def growth(
    of: str,
    seq_lens: Sequence[int],
    values: Sequence[float] | Floats,
    layer: int | None = None,
    head: int | None = None,
) -> Growth:
    """Fit a power law to one value a length."""
    numbers = tuple(map(float, values))
    fit = fit_power_law(of, seq_lens, numbers)
    return Growth(
        of=of,
        layer=layer,
        head=head,
        values=numbers,
        exponent=fit.exponent if fit else None,
        low=fit.low if fit else None,
        high=fit.high if fit else None,
        confidence=CONFIDENCE,
        r_squared=fit.r_squared if fit else None,
    )
