"""Every graph is run in ONNX Runtime on fresh random inputs and compared with a reference."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from attnserve_proto.manifest import CaseResult, Verification
from numpy.typing import NDArray

from attnserve_export import sessions
from attnserve_export.errors import VerificationError

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One check of a graph.

    Attributes:
        name: what is special about it.
        dims: its sizes, for the manifest.
        feeds: the graph's inputs.
        expected: what each output should be, in float64.
        tolerance: largest absolute error.
        compared: for an output, which of its elements count; absent: all.
        looked_up: for an output of indices, in which array's last axis they count: what is found
            there must be what `expected` has, since of nearly equal elements any may come first.
        derive: makes what is compared of the graph's outputs; None: they are compared themselves.
        magnitudes: for an output, what its error is divided by, or that of each element; absent:
            1.
    """

    name: str
    dims: Mapping[str, int]
    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]
    tolerance: float
    compared: Mapping[str, Array]
    looked_up: Mapping[str, Array] = field(default_factory=dict)
    derive: Callable[[Mapping[str, Array]], Mapping[str, Array]] | None = None
    magnitudes: Mapping[str, float | Array] = field(default_factory=dict)


def core_tolerance(dtype: str, key_len: int, largest_score: float) -> float:
    """The largest error allowed to an attention over values of about unit size.

    FP32: 2e-6 * sqrt(Sk), since a row's rounding errors add like a random walk, times the size of
    the scores above 8: exp turns an absolute error of a score into a relative one of a weight.
    FP16: 2e-3, two units in the last place of an output between 1 and 2, plus what rounding the
    largest score to FP16 costs beyond a score of 8, 2^-11 of it, for the same reason. BF16, which
    has three bits less: 8 times that.
    """
    if dtype == "FP16":
        return 2e-3 + max(0.0, largest_score - 8) * 2**-11
    if dtype == "BF16":
        return 1.6e-2 + max(0.0, largest_score - 8) * 2**-8
    return 2e-6 * math.sqrt(key_len) * max(1.0, largest_score / 8)


def lowest_bias_tolerance(dtype: str) -> float:
    """What a bias of the lowest number adds.

    FP16's, -65504, leaves scores a unit of 2^-7 in FP32; FP32's and BF16's leave nothing of them.
    """
    return 2**-7 if dtype == "FP16" else 0.0


def log_sum_exp_magnitudes(expected: Array) -> Array:
    """What errors of a log-sum-exp are divided by: 2, or an eighth of its size if that is more.

    It is of the size of the scores, and FP32 rounds it as it does them; a total adds its own error.
    """
    sizes = np.abs(np.where(np.isinf(expected), 0.0, expected))
    return np.maximum(2.0, sizes / 8)


def angle_tolerance(longest: int) -> float:
    """What a rotary embedding adds in FP32: angles of up to `longest`, rounded to FP32."""
    return 2e-7 * longest


def verify(
    path: Path,
    cases: Sequence[Case],
    *,
    reference: str,
    seed: int,
    progress: Callable[[str], None],
    lean: bool = False,
) -> Verification:
    """Run all cases on the CPU; `lean` as in `sessions.open_session`.

    Raises:
        VerificationError: an error above its tolerance, or a value that is not finite.
    """
    session = sessions.open_session(path, lean=lean)
    outputs = [entry.name for entry in session.get_outputs()]
    worst: dict[str, float] = {}
    results = []
    progress(f"{len(cases)} cases against {reference}")
    for case in cases:
        answers: Mapping[str, Array]
        if case.derive is None:
            answers = sessions.run(session, case.feeds, outputs)
        else:
            answers = case.derive(sessions.run(session, case.feeds, outputs))
        errors = errors_of(case, answers)
        sizes = {name: _told_by(case.magnitudes.get(name, 1.0)) for name in errors}
        largest = max(errors.values())
        if not largest <= case.tolerance:
            # The first of them: what comes later differs because of it.
            name = next(key for key, error in errors.items() if not error <= case.tolerance)
            raise VerificationError(
                f"case {case.name!r} {dict(case.dims)}: {name} is off by "
                f"{errors[name] * sizes[name]:.3g}; allowed: {case.tolerance * sizes[name]:.3g}; "
                f"seed {seed}"
            )
        told = {name: error * sizes[name] for name, error in errors.items()}
        worst = {name: max(worst.get(name, 0.0), error) for name, error in told.items()}
        allowed = case.tolerance * max(sizes.values())
        results.append(CaseResult(case.name, case.dims, max(told.values()), allowed))
    return Verification(
        reference=reference,
        seed=seed,
        tolerance=max(result.tolerance for result in results),
        max_abs_error=worst,
        cases=tuple(results),
    )


def _told_by(magnitude: float | Array) -> float:
    """What an error over its magnitude is multiplied by to be told: by each element's there is no
    one, so that it stays relative.
    """
    return magnitude if isinstance(magnitude, float) else 1.0


def errors_of(case: Case, answers: Mapping[str, Array]) -> dict[str, float]:
    """The largest absolute error of each output over its magnitude, in their order."""
    return {name: _error(name, case, answers[name]) for name in answers}


def _error(name: str, case: Case, answer: Array) -> float:
    expected = case.expected[name]
    if answer.shape != expected.shape:
        raise VerificationError(
            f"case {case.name!r} {dict(case.dims)}: {name} has shape {list(answer.shape)}; "
            f"expected: {list(expected.shape)}"
        )
    if name in case.looked_up:
        array = case.looked_up[name]
        if answer.size and not (answer.min() >= 0 and answer.max() < array.shape[-1]):
            return math.inf
        answer = np.take_along_axis(array, answer, axis=-1)
        expected = np.take_along_axis(array, expected, axis=-1)
    exact = answer.astype(np.float64)
    with np.errstate(invalid="ignore"):
        # -infinity is right where -infinity is expected, of which no difference can be taken.
        difference = np.where(exact == expected, 0.0, np.abs(exact - expected))
    difference = difference / case.magnitudes.get(name, 1.0)
    compared = case.compared.get(name)
    if compared is not None:
        difference = np.where(compared, difference, 0.0)
    if not difference.size:
        return 0.0
    # NaN passes no comparison, so it must not be lost in a maximum.
    return math.inf if np.isnan(difference).any() else float(difference.max())
