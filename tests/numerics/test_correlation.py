"""Correlations of a measure with generalisation: against scipy, by hand, and on measures that cheat."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from wcitrain.measures.correlation import correlate

GRID = list(itertools.product([0, 1, 2], [0, 1, 2], [0, 1]))  # lr, width, seed
LR, WIDTH = [p[0] for p in GRID], [p[1] for p in GRID]
RUNS = list(range(len(GRID)))


def columns(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A gap that depends on both hyper-parameters, and the noise of seeds."""
    noise = np.random.default_rng(seed).normal(size=len(GRID))
    return np.array(LR) + 1.7 * np.array(WIDTH) + 0.01 * noise, noise


def test_the_coefficients_are_scipys_and_lie_in_their_intervals():
    """Signs or axes mixed up would survive on symmetric data; these are not."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=30)
    y = x**3 + generator.normal(size=30)
    result = correlate(x, y, range(30), {}, num_bootstrap=200)
    pairs = (result.kendall, scipy.stats.kendalltau), (result.pearson, scipy.stats.pearsonr)
    for estimate, function in pairs:
        assert estimate.value == pytest.approx(function(x, y).statistic, abs=1e-12)
        assert estimate.low < estimate.value < estimate.high
    assert math.isnan(result.granulated.value)  # no axis


def test_checkpoints_of_one_run_are_drawn_together():
    """Ten copies of three runs are three observations: an interval from thirty would be far too short."""
    x = np.repeat([0.0, 1.0, 2.0, 3.0, 4.0], 10)
    y = np.repeat([0.0, 2.0, 1.0, 4.0, 3.0], 10)
    together = correlate(x, y, np.repeat(np.arange(5), 10).tolist(), {}, num_bootstrap=500).pearson
    apart = correlate(x, y, range(50), {}, num_bootstrap=500).pearson
    assert together.value == apart.value
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_the_granulated_coefficient_by_hand():
    """ψ: μ follows lr always, and runs against width in one of three groups."""
    mu = [0, 1, 2, 3]  # (lr, width) = (0,0), (0,1), (1,0), (1,1)
    g = [0, 1, 3, 2]
    axes = {"lr": [0, 0, 1, 1], "width": [0, 1, 0, 1]}
    result = correlate(mu, g, range(4), axes, num_bootstrap=0)
    assert result.granulated.value == 0.5  # 1 for lr; pairs of width: +1 at lr 0, −1 at lr 1


def test_a_measure_that_copies_one_hyper_parameter_is_found_out():
    """High τ alone would crown it: Ψ loses the other axis, and given that hyper-parameter nothing is left."""
    gap, noise = columns()
    copies = np.array(WIDTH) + 1e-6 * noise[::-1]
    axes = {"lr": LR, "width": WIDTH}
    honest, copied = (correlate(mu, gap, RUNS, axes, num_bootstrap=50) for mu in (gap, copies))
    assert copied.kendall.value > 0.6
    assert honest.granulated.value == 1.0
    assert honest.information == pytest.approx(1.0)
    assert copied.granulated.value < 0.85
    assert copied.information < 0.3 < 0.9 < honest.information
    assert copied.information < copied.information_chance + 0.2


def test_shuffles_keep_the_checkpoints_of_a_run_together():
    """Ten copies of each run, shuffled one by one, would look independent: chance would be far too low."""
    generator = np.random.default_rng(4)
    x, y = np.repeat(generator.normal(size=(2, 6)), 10, axis=1)
    together = correlate(x, y, np.repeat(np.arange(6), 10).tolist(), {}, num_bootstrap=300)
    apart = correlate(x, y, range(60), {}, num_bootstrap=300)
    assert together.information_chance > 5 * apart.information_chance


def test_the_information_of_a_two_by_two_table_by_hand():
    """K without conditions: pairs agree in 4 of 6, so I = ln 2 − h(2/3), over H = ln 2."""
    mu, g = [0, 1, 2, 3], [1, 0, 3, 2]
    agree = 4 / 6
    left = -(agree * math.log(agree) + (1 - agree) * math.log(1 - agree))
    crossed, equal = (correlate(column, g, "abcd", {}, num_bootstrap=0).information for column in (mu, g))
    assert crossed == pytest.approx(1 - left / math.log(2), abs=1e-12)
    assert equal == pytest.approx(1.0)


def test_the_order_of_the_models_does_not_matter():
    """Pairs are counted in both orders: otherwise sorted input would give one-sided signs."""
    gap, noise = columns(3)
    mu = gap + noise
    order = np.random.default_rng(0).permutation(len(gap))
    axes = {"lr": np.array(LR), "width": np.array(WIDTH)}
    one = correlate(mu, gap, RUNS, axes, num_bootstrap=0)
    other = correlate(mu[order], gap[order], order, {k: v[order] for k, v in axes.items()}, num_bootstrap=0)
    assert one.information == pytest.approx(other.information, abs=1e-12)
    assert one.granulated.value == pytest.approx(other.granulated.value)
    assert one.kendall.value == pytest.approx(other.kendall.value)


def test_models_without_numbers_are_left_out_and_too_few_are_refused():
    """A diverged run must not turn every coefficient into NaN."""
    axes = {"lr": [1, 2, 1, 2]}
    assert correlate([1, 2, math.nan, 4], [1, 2, 3, 5], "abcd", axes, num_bootstrap=0).num_models == 3
    with pytest.raises(ValueError, match="got 2 models with finite"):
        correlate([1, 2, math.nan, math.inf], [1, 2, 3, 5], "abcd", {})
    with pytest.raises(ValueError, match=r"columns of \[4, 5\] models"):  # else the longer is cut
        correlate([1, 2, 3, 4], [2, 3, 5, 9], "abcde", {"lr": [1, 1, 2, 2, 3]})


def test_a_constant_measure_has_no_coefficient():
    """Zero would read as "measured, no correlation"."""
    result = correlate([1, 1, 1, 1], [1, 2, 3, 4], "abcd", {"lr": [1, 1, 2, 2]})
    assert math.isnan(result.kendall.value)
    assert str(result.kendall) == "–"
