"""The exponent of latency in seq_len: ordinary least squares on log-log axes.

The model is log t = log c + k log n + error, with one value of t for each length n: the median of
the requests there. Medians because latency has a long right tail; one value a length because the
requests of one length are repeated looks at the same t, not new evidence about the curve (fitting
all of them would give an interval that is far too narrow).

The interval is k ± t(1 - α/2, m - 2) * standard error, m lengths, by Student's t distribution. It
covers the true k at its nominal rate if the errors in log t are independent, normal and of one
variance. A latency with a constant part, c0 + c1 n^2, is no power law: then the residuals bend, k
depends on the range of lengths, and the interval describes how well a straight line suits these
lengths, not the exponent for large n. That is why the residuals and the exponents between
neighbouring lengths are reported too: read the last of those for large n.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from attnserve_loadtest.report.schema import Fit, LocalExponent, Residual

CONFIDENCE = 0.95


def fit_power_law(
    quantity: str,
    seq_lens: Sequence[int],
    medians_ms: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
) -> Fit | None:
    """Fit medians = coefficient * seq_lens ** exponent.

    Args:
        quantity: what the medians are of: `end_to_end` or `compute`.
        seq_lens: lengths, ascending, each once.
        medians_ms: milliseconds, one for each length. Those of 0 (below the server's clock, 1 µs)
            have no logarithm and are left out.
        confidence: level of the interval, between 0 and 1.

    Returns:
        The fit; None of fewer than two usable lengths. With two, the line goes through both and
        there is neither an interval nor an R².
    """
    usable = [(n, t) for n, t in zip(seq_lens, medians_ms, strict=True) if t > 0]
    if len(usable) < 2:
        return None
    lengths = [n for n, _ in usable]
    x = np.log2(np.array(lengths, float))
    y = np.log2(np.array([t for _, t in usable], float))
    centred = x - x.mean()
    sum_of_squares = float(centred @ centred)
    exponent = float(centred @ y) / sum_of_squares
    fitted = y.mean() + exponent * centred
    errors = y - fitted
    low = high = r_squared = None
    freedom = len(usable) - 2
    if freedom > 0:
        variance = float(errors @ errors) / freedom
        # Student's t; `scipy.stats`, which has it too, takes a second to load.
        reach = float(special.stdtrit(freedom, (1 + confidence) / 2))
        margin = reach * (variance / sum_of_squares) ** 0.5
        low, high = exponent - margin, exponent + margin
        total = float((y - y.mean()) @ (y - y.mean()))
        r_squared = 1 - float(errors @ errors) / total if total > 0 else 1.0
    return Fit(
        quantity=quantity,
        exponent=exponent,
        low=low,
        high=high,
        confidence=confidence,
        coefficient_ms=float(2 ** (y.mean() - exponent * x.mean())),
        r_squared=r_squared,
        points=len(usable),
        residuals=tuple(
            Residual(n, t, float(2**line), float(error))
            for (n, t), line, error in zip(usable, fitted, errors, strict=True)
        ),
        local_exponents=tuple(
            LocalExponent(lengths[i], lengths[i + 1], float((y[i + 1] - y[i]) / (x[i + 1] - x[i])))
            for i in range(len(lengths) - 1)
        ),
    )


@dataclass(frozen=True, slots=True)
class Growth:
    """A latency as constant + linear + quadratic in the length, none of them negative.

    Attributes:
        seq_len: the longest length, at which the parts are given.
        constant_ms, linear_ms, quadratic_ms: what each part takes there.
        off: the largest relative difference from what was measured, at any length.
    """

    seq_len: int
    constant_ms: float
    linear_ms: float
    quadratic_ms: float
    off: float


def growth_of(fit: Fit) -> Growth | None:
    """Split the medians of a fit: non-negative least squares of relative errors.

    Where constant costs dominate, no power law describes a latency; this does.

    Returns:
        The parts; None of fewer than four lengths, which three parts could always meet.
    """
    if fit.points < 4:
        return None
    lengths = np.array([each.seq_len for each in fit.residuals], float)
    observed = np.array([each.observed_ms for each in fit.residuals])
    share = lengths / lengths[-1]
    parts = np.stack([np.ones_like(share), share, share**2], axis=1)
    found, _ = optimize.nnls(parts / observed[:, None], np.ones_like(observed))
    constant, linear, quadratic = map(float, found)
    off = float(np.max(np.abs(parts @ found / observed - 1)))
    return Growth(int(lengths[-1]), constant, linear, quadratic, off)
