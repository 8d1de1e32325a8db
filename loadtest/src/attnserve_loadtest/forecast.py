"""What a length would take that was not measured, as far as the fit bears it.

The fit is constant + linear + quadratic in the length, none below zero, by least squares of
relative errors to the medians. How far it is to be believed is not derived from its residuals,
which say nothing of what lies beyond, but from how it did before: it is fitted to the shorter
lengths alone, four at least, and foretells the longer ones that were measured. A forecast `reach`
times beyond the longest length rests on those of these trials that reached as far, up to twice as
far; between measured lengths it rests on trials that left one of them out. Two such trials at least
are needed: what was never tried is not foretold.

The interval is exp(±t * r * sqrt(1 + 1/n)) around the forecast: r the root mean square of the n
trials' logarithmic errors, t Student's for n degrees of freedom. It covers what is true if the
next error is as those were. A cliff beyond all lengths measured (a cache that is full, another
kernel) is in none of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

CONFIDENCE = 0.95
FEWEST_LENGTHS = 5
_FITTED = 4
_FEWEST_TRIALS = 2
# An interval wider than by this factor says nothing.
_WIDEST = 2.0
_NEAR = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a length would take.

    Attributes:
        seq_len: the length.
        milliseconds: the forecast.
        low, high: its interval.
        confidence: the interval's.
        reach: the length over the longest measured one; 1 or less: between measured lengths.
        trials: how many such forecasts were tried on what was measured.
    """

    seq_len: int
    milliseconds: float
    low: float
    high: float
    confidence: float
    reach: float
    trials: int


@dataclass(frozen=True, slots=True)
class Trial:
    """A forecast of what was measured.

    Attributes:
        reach: the length over the longest that was fitted.
        error: log(forecast / measured).
    """

    reach: float
    error: float


class Forecaster:
    """Forecasts for one line of a report.

    Args:
        seq_lens: [N], ascending.
        medians_ms: [N], above 0.

    Raises:
        ValueError: there are fewer than five lengths.
    """

    def __init__(self, seq_lens: Sequence[int], medians_ms: Sequence[float]) -> None:
        if len(seq_lens) < FEWEST_LENGTHS:
            raise ValueError(
                f"{len(seq_lens)} lengths were answered; a forecast needs {FEWEST_LENGTHS} or more"
            )
        self._lengths = np.array(seq_lens, float)
        self._medians = np.array(medians_ms, float)
        self._parts = _fit(self._lengths, self._medians)
        self._beyond = self._trials_beyond()
        self._between = self._trials_between()

    @property
    def shortest(self) -> int:
        """The shortest length that can be foretold: the shortest measured."""
        return int(self._lengths[0])

    @property
    def farthest(self) -> int:
        """The longest length that the fit bears."""
        reaches = sorted({trial.reach for trial in self._beyond}, reverse=True)
        for reach in reaches:
            if self._interval(reach) is not None:
                return int(self._lengths[-1] * reach * _NEAR)
        return int(self._lengths[-1])

    def at(self, seq_len: int) -> Forecast | None:
        """The forecast of a length; None: the fit does not bear it.

        Args:
            seq_len: the length.
        """
        if seq_len < self.shortest:
            return None
        reach = seq_len / float(self._lengths[-1])
        found = self._interval(reach)
        if found is None:
            return None
        width, trials = found
        milliseconds = _value(self._parts, float(seq_len))
        return Forecast(
            seq_len,
            milliseconds,
            milliseconds / width,
            milliseconds * width,
            CONFIDENCE,
            reach,
            trials,
        )

    def _interval(self, reach: float) -> tuple[float, int] | None:
        """By what factor a forecast may be off, and how many trials say so."""
        if reach <= _NEAR:
            errors = [trial.error for trial in self._between]
        else:
            errors = [
                trial.error
                for trial in self._beyond
                if reach / _NEAR <= trial.reach <= 2 * reach * _NEAR
            ]
        count = len(errors)
        if count < _FEWEST_TRIALS:
            return None
        spread = math.sqrt(sum(error**2 for error in errors) / count * (1 + 1 / count))
        width = math.exp(float(special.stdtrit(count, (1 + CONFIDENCE) / 2)) * spread)
        return (width, count) if width <= _WIDEST else None

    def _trials_beyond(self) -> list[Trial]:
        trials = []
        for count in range(_FITTED, len(self._lengths)):
            lengths, medians = self._lengths[:count], self._medians[:count]
            parts = _fit(lengths, medians)
            trials += [
                Trial(float(n / lengths[-1]), math.log(_value(parts, float(n)) / t))
                for n, t in zip(self._lengths[count:], self._medians[count:], strict=True)
            ]
        return trials

    def _trials_between(self) -> list[Trial]:
        trials = []
        for left_out in range(1, len(self._lengths) - 1):
            lengths = np.delete(self._lengths, left_out)
            parts = _fit(lengths, np.delete(self._medians, left_out))
            n, t = float(self._lengths[left_out]), float(self._medians[left_out])
            trials.append(Trial(n / float(lengths[-1]), math.log(_value(parts, n) / t)))
        return trials


def _fit(lengths: NDArray[np.float64], medians: NDArray[np.float64]) -> tuple[float, float, float]:
    """Constant, linear and quadratic coefficients, milliseconds."""
    scale = float(lengths[-1])
    share = lengths / scale
    terms = np.stack([np.ones_like(share), share, share**2], axis=1)
    found, _ = optimize.nnls(terms / medians[:, None], np.ones_like(medians))
    constant, linear, quadratic = map(float, found)
    return constant, linear / scale, quadratic / scale**2


def _value(parts: tuple[float, float, float], length: float) -> float:
    constant, linear, quadratic = parts
    return constant + linear * length + quadratic * length**2
