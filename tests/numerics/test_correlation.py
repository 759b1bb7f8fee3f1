"""Correlations of a measure with generalisation: against scipy, by hand, and on measures that cheat."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from wcitrain.measures.correlation import conditional_information, correlate

GRID = list(itertools.product([0, 1, 2], [0, 1, 2], [0, 1]))  # lr, width, seed
LR, WIDTH = [p[0] for p in GRID], [p[1] for p in GRID]
RUNS = list(range(len(GRID)))


def columns(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A gap that depends on both hyper-parameters, and the noise of seeds."""
    noise = np.random.default_rng(seed).normal(size=len(GRID))
    return np.array(LR) + 1.7 * np.array(WIDTH) + 0.01 * noise, noise


def test_the_three_coefficients_are_scipys_and_lie_in_their_intervals():
    """Signs or axes mixed up would survive on symmetric data; these are not."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=30)
    y = x**3 + generator.normal(size=30)
    result = correlate(x, y, range(30), {}, num_bootstrap=200)
    for estimate, function in (
        (result.kendall, scipy.stats.kendalltau),
        (result.spearman, scipy.stats.spearmanr),
        (result.pearson, scipy.stats.pearsonr),
    ):
        assert estimate.value == pytest.approx(function(x, y).statistic, abs=1e-12)
        assert estimate.low < estimate.value < estimate.high
    assert math.isnan(result.granulated.value)  # no axis
    assert math.isnan(result.within.value)  # no run has three checkpoints


def test_the_pearson_interval_covers_like_fishers():
    """A bootstrap that resamples the wrong thing is off by a factor, not by a few percent."""
    generator = np.random.default_rng(2)
    x, noise = generator.normal(size=(2, 200))
    y = x + noise
    result = correlate(x, y, range(200), {}, num_bootstrap=2000).pearson
    fisher = scipy.stats.pearsonr(x, y).confidence_interval()
    assert result.low == pytest.approx(fisher.low, abs=0.03)  # both have sampling errors of about .01
    assert result.high == pytest.approx(fisher.high, abs=0.03)


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
    assert result.by_axis == {"lr": 1.0, "width": 0.0}  # pairs of width: +1 at lr 0, −1 at lr 1
    assert result.granulated.value == 0.5


def test_a_measure_that_copies_one_hyper_parameter_is_found_out():
    """High τ alone would crown it: Ψ loses the other axis, and given that hyper-parameter nothing is left."""
    gap, noise = columns()
    copies = np.array(WIDTH) + 1e-6 * noise[::-1]
    honest = correlate(gap, gap, RUNS, {"lr": LR, "width": WIDTH}, num_bootstrap=50)
    copied = correlate(copies, gap, RUNS, {"lr": LR, "width": WIDTH}, num_bootstrap=50)
    assert copied.kendall.value > 0.6
    assert honest.granulated.value == 1.0
    assert honest.information == pytest.approx(1.0)
    assert copied.by_axis["width"] == 1.0
    assert abs(copied.by_axis["lr"]) < 0.7
    assert copied.information < 0.3 < 0.9 < honest.information
    assert copied.information < copied.information_chance + 0.2


def test_an_exact_copy_of_a_hyper_parameter_has_no_information_beyond_it():
    """Dropping the ties of μ would leave only pairs that the copied hyper-parameter decides: K would be 1."""
    generator = np.random.default_rng(0)
    lr = np.repeat([0.0, 1.0, 2.0], 8)
    gap = 3 * lr + generator.normal(size=24) * 0.5
    copied = correlate(lr, gap, range(24), {"lr": lr.tolist()}, num_bootstrap=100)
    assert copied.kendall.value > 0.7
    assert copied.information == pytest.approx(0.0, abs=1e-12)
    assert correlate(gap, gap, range(24), {"lr": lr.tolist()}, num_bootstrap=0).information == pytest.approx(
        1.0
    )


def test_shuffles_keep_the_checkpoints_of_a_run_together():
    """Ten copies of each run, shuffled one by one, would look independent: chance would be far too low."""
    generator = np.random.default_rng(4)
    x, y = np.repeat(generator.normal(size=(2, 6)), 10, axis=1)
    together = correlate(x, y, np.repeat(np.arange(6), 10).tolist(), {}, num_bootstrap=300)
    apart = correlate(x, y, range(60), {}, num_bootstrap=300)
    assert together.information_chance > 5 * apart.information_chance


def test_the_information_of_a_two_by_two_table_by_hand():
    """K without conditions: pairs agree in 4 of 6, so I = ln 2 − h(2/3), over H = ln 2."""
    mu, g = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 0.0, 3.0, 2.0])
    agree = 4 / 6
    left = -(agree * math.log(agree) + (1 - agree) * math.log(1 - agree))
    result = conditional_information(mu, g, np.arange(4), {})
    assert result == pytest.approx(1 - left / math.log(2), abs=1e-12)
    assert conditional_information(g, g, np.arange(4), {}) == pytest.approx(1.0)


def test_the_order_of_the_models_does_not_matter():
    """Pairs are counted in both orders: otherwise sorted input would give one-sided signs."""
    gap, noise = columns(3)
    mu = gap + noise
    order = np.random.default_rng(0).permutation(len(gap))
    axes = {"lr": np.array(LR), "width": np.array(WIDTH)}
    one = correlate(mu, gap, RUNS, axes, num_bootstrap=0)
    other = correlate(mu[order], gap[order], order, {k: v[order] for k, v in axes.items()}, num_bootstrap=0)
    assert one.information == pytest.approx(other.information, abs=1e-12)
    assert one.by_axis == pytest.approx(other.by_axis)
    assert one.kendall.value == pytest.approx(other.kendall.value)


def test_within_runs_is_the_mean_over_runs():
    """Between runs a measure may say nothing and within each everything, and the other way round."""
    mu = [0, 1, 2, 10, 11, 12]
    g = [5, 6, 7, 1, 0, 2]
    result = correlate(mu, g, [0, 0, 0, 1, 1, 1], {}, num_bootstrap=0)
    assert result.within.value == pytest.approx((1 + 1 / 3) / 2)
    assert result.kendall.value < 0


def test_models_without_numbers_are_left_out_and_too_few_are_refused():
    """A diverged run must not turn every coefficient into NaN."""
    nan = float("nan")
    assert (
        correlate([1, 2, nan, 4], [1, 2, 3, 5], "abcd", {"lr": [1, 2, 1, 2]}, num_bootstrap=0).num_models == 3
    )
    with pytest.raises(ValueError, match="got 2 models with finite"):
        correlate([1, 2, nan, nan], [1, 2, 3, 5], "abcd", {})
    with pytest.raises(ValueError, match="one length"):
        correlate([1, 2, 3], [1, 2, 3], "abcd", {})


def test_a_constant_measure_has_no_coefficient():
    """Zero would read as "measured, no correlation"."""
    result = correlate([1, 1, 1, 1], [1, 2, 3, 4], "abcd", {"lr": [1, 1, 2, 2]})
    assert math.isnan(result.kendall.value)
    assert str(result.kendall) == "–"


def test_the_same_seed_gives_the_same_intervals():
    """An interval that changes from call to call cannot be quoted."""
    gap, noise = columns()
    first, second = (correlate(noise, gap, RUNS, {"lr": LR}, num_bootstrap=50) for _ in range(2))
    assert first == second
