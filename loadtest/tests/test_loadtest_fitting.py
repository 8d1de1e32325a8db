import numpy as np
import pytest
from attnserve_loadtest.fitting import fit_power_law, growth_of
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096]


def power_law(exponent: float, coefficient: float = 1e-3) -> list[float]:
    return [coefficient * n**exponent for n in LENGTHS]


@given(st.floats(0.2, 3.0), st.floats(1e-6, 10.0))
def test_exact_power_law_is_recovered(exponent: float, coefficient: float) -> None:
    fit = fit_power_law("compute", LENGTHS, power_law(exponent, coefficient))
    assert fit is not None
    assert fit.exponent == pytest.approx(exponent, abs=1e-9)
    assert fit.coefficient_ms == pytest.approx(coefficient, rel=1e-6)
    assert fit.r_squared == pytest.approx(1)
    assert [each.exponent for each in fit.local_exponents] == pytest.approx([exponent] * 6)
    assert [each.log2_ratio for each in fit.residuals] == pytest.approx([0] * 7, abs=1e-9)


def test_slope_and_interval_agree_with_scipy() -> None:
    from scipy import stats

    noise = np.random.default_rng(3).normal(0, 0.2, len(LENGTHS))
    medians = [t * 2**e for t, e in zip(power_law(1.7), noise, strict=True)]
    theirs = stats.linregress(np.log2(LENGTHS), np.log2(medians))
    fit = fit_power_law("compute", LENGTHS, medians)
    assert fit is not None
    assert fit.high is not None
    assert fit.exponent == pytest.approx(theirs.slope)
    assert fit.r_squared == pytest.approx(theirs.rvalue**2)
    reach = stats.t.ppf(0.975, len(LENGTHS) - 2) * theirs.stderr
    assert fit.high - fit.exponent == pytest.approx(reach)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_interval_covers_the_truth_at_its_nominal_rate(exponent: float) -> None:
    random = np.random.default_rng(11)
    runs, covered = 2000, 0
    for _ in range(runs):
        noise = random.normal(0, 0.1, len(LENGTHS))
        medians = [t * 2**e for t, e in zip(power_law(exponent), noise, strict=True)]
        fit = fit_power_law("end_to_end", LENGTHS, medians)
        assert fit is not None
        assert fit.low is not None
        assert fit.high is not None
        covered += fit.low <= exponent <= fit.high
    # The standard deviation of the rate is 0.5 %: within four of them.
    assert 0.93 < covered / runs < 0.97


def test_constant_cost_shows_in_rising_local_exponents() -> None:
    fit = fit_power_law("end_to_end", LENGTHS, [1 + 1e-6 * n**2 for n in LENGTHS])
    assert fit is not None
    local = [each.exponent for each in fit.local_exponents]
    assert local == sorted(local)
    assert local[0] < 0.1
    assert fit.exponent < local[-1] < 2


def test_two_lengths_give_a_slope_without_interval() -> None:
    fit = fit_power_law("compute", [10, 20], [1.0, 4.0])
    assert fit is not None
    assert fit.exponent == pytest.approx(2)
    assert (fit.low, fit.high, fit.r_squared) == (None, None, None)


def test_durations_of_zero_are_left_out() -> None:
    fit = fit_power_law("compute", [16, 64, 128, 256], [0.0, 1.0, 2.0, 4.0])
    assert fit is not None
    assert fit.points == 3
    assert fit.exponent == pytest.approx(1)


@pytest.mark.parametrize("medians", [[], [1.0], [0.0, 1.0]])
def test_fewer_than_two_lengths_have_no_exponent(medians: list[float]) -> None:
    assert fit_power_law("compute", LENGTHS[: len(medians)], medians) is None


@pytest.mark.parametrize(
    "parts", [(5.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 7.0), (1.0, 0.0, 4.0), (2.0, 3.0, 4.0)]
)
def test_constant_linear_and_quadratic_parts_are_found(parts: tuple[float, ...]) -> None:
    lengths = (64, 100, 256, 300, 1024)
    share = np.array(lengths) / 1024
    medians = parts[0] + parts[1] * share + parts[2] * share**2
    fit = fit_power_law("compute", lengths, medians.tolist())
    assert fit is not None
    growth = growth_of(fit)
    assert growth is not None
    found = (growth.constant_ms, growth.linear_ms, growth.quadratic_ms)
    assert found == pytest.approx(parts, abs=1e-6)
    assert growth.off < 1e-6
    assert growth.seq_len == 1024


def test_parts_are_those_of_scipys_solver_and_never_negative() -> None:
    generator = np.random.default_rng()
    lengths = (32, 64, 128, 256, 512, 1024)
    share = np.array(lengths) / 1024
    columns = np.stack([np.ones(6), share, share**2], axis=1)
    for _ in range(50):
        medians = np.exp(generator.standard_normal(6)) * share ** generator.uniform(-1, 3)
        fit = fit_power_law("compute", lengths, medians.tolist())
        assert fit is not None
        growth = growth_of(fit)
        assert growth is not None
        expected = optimize.nnls(columns / medians[:, None], np.ones(6))[0]
        found = (growth.constant_ms, growth.linear_ms, growth.quadratic_ms)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert min(found) >= 0


def test_three_lengths_say_nothing_of_three_parts() -> None:
    fit = fit_power_law("compute", (1, 2, 4), (1.0, 2.0, 4.0))
    assert fit is not None
    assert growth_of(fit) is None
