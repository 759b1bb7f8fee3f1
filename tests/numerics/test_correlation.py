"""Correlations of a measure with generalisation: against scipy, by hand, and on measures that cheat."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from wcitrain.measures.correlation import compare, correlate, holm
from wcitrain.measures.information import conditional_information, rearranged

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
    """Ten copies of twelve runs are twelve observations: an interval from 120 would be far too short."""
    x = np.repeat(np.arange(12.0), 10)
    y = np.repeat(np.arange(12.0) + 4 * np.tile([0, 1, -1], 4), 10)
    together = correlate(x, y, np.repeat(np.arange(12), 10).tolist(), {}, num_bootstrap=200)
    apart = correlate(x, y, range(120), {}, num_bootstrap=200)
    for one, other in ((together.pearson, apart.pearson), (together.kendall, apart.kendall)):
        assert one.value == other.value
        assert one.high - one.low > 2 * (other.high - other.low)


def test_the_granulated_coefficient_by_hand():
    """ψ: μ follows lr always, and runs against width in one of three groups."""
    mu = [0, 1, 2, 3]  # (lr, width) = (0,0), (0,1), (1,0), (1,1)
    g = [0, 1, 3, 2]
    axes = {"lr": [0, 0, 1, 1], "width": [0, 1, 0, 1]}
    result = correlate(mu, g, range(4), axes, num_bootstrap=0)
    assert result.granulated.value == 0.5  # 1 for lr; pairs of width: +1 at lr 0, −1 at lr 1


def test_a_measure_that_copies_one_hyper_parameter_is_found_out():
    """High τ alone would crown it: Ψ loses the other axes, and given that hyper-parameter nothing is left."""
    lr, width, depth, _ = np.array(list(itertools.product([0, 1, 2], [0, 1, 2], [0, 1], [0, 1]))).T
    noise = np.random.default_rng(0).normal(size=(2, len(lr)))
    gap = lr + 1.7 * width + 0.6 * depth + 0.1 * noise[0]
    axes = {"lr": lr, "width": width, "depth": depth}
    columns = {"honest": gap, "copied": width + 1e-6 * noise[1]}
    honest, copied = (correlate(mu, gap, range(36), axes, num_bootstrap=400) for mu in columns.values())
    assert copied.kendall.value > 0.5
    assert copied.kendall_p == 1 / 201
    assert honest.granulated.value == 1.0
    assert honest.information == pytest.approx(1.0)
    assert copied.granulated.value < 0.6
    assert copied.information < 0.1 < 0.9 < honest.information
    assert honest.information_p < 0.05 < 0.2 < copied.information_p
    found = compare(columns, gap, range(36), "honest", num_bootstrap=400)["copied"]
    assert found.kendall.high < 0
    assert found.p == 2 / 401


def test_checkpoints_of_a_run_change_places_together():
    """Ten copies of each run, shuffled one by one, would look independent: every p would be far too low."""
    x, y = np.repeat([[0, 1, 2, 3, 4, 5], [1, 0, 3, 2, 5, 4]], 10, axis=1)
    together = correlate(x, y, np.repeat(np.arange(6), 10).tolist(), {}, num_bootstrap=300)
    apart = correlate(x, y, range(60), {}, num_bootstrap=300)
    assert together.kendall_p > 0.05 > apart.kendall_p
    assert together.information_p > 0.05 > apart.information_p


def test_values_change_places_among_alike_runs_only():
    """A run of three checkpoints for one of two, or one of another cell, would break pairs or the null."""
    run = np.array([0, 0, 1, 2, 2, 3, 4, 4])
    cell = np.array([0, 0, 0, 0, 0, 1, 1, 1])  # alike: runs 0 and 2; 1, 3 and 4 have nobody
    (places,) = rearranged(run, cell, 200, np.random.default_rng(0))
    assert {tuple(row) for row in places} == {(0, 1, 2, 3, 4, 5, 6, 7), (3, 4, 2, 0, 1, 5, 6, 7)}


def design(num: int) -> np.ndarray:
    """Hyper-parameters [axes, num]: 2 x 2 x 2 and six other methods, as published, or a grid; two seeds."""
    levels = {22: (2, 2, 2), 48: (4, 3, 2), 96: (4, 4, 3)}[num]
    grid = np.array(list(itertools.product(*map(range, levels))) * 2).T
    if num != 22:
        return grid
    return np.concatenate([np.pad(grid, ((0, 0), (0, 6))), [[0] * 16 + [1, 1, 2, 2, 3, 4]]])


NULLS = {  # name: strength of the measure's and the gap's dependence on the first two hyper-parameters
    "independent": ((0, 0), (0, 0)),
    "one": ((3, 0), (3, 0)),
    "one, strongly": ((30, 0), (30, 0)),
    "both": ((3, 3), (3, 3)),
    "one of two": ((3, 0), (3, 3)),
}


def share_found(num: int, null: str | None, repetitions: int, num_orders: int = 199) -> float:
    """How often a measure that says nothing beyond hyper-parameters (None: an honest one) has p <= 5 %."""
    generator, axes = np.random.default_rng(1), design(num)
    scaled, found = axes[:3] / axes[:3].max(1, keepdims=True), 0
    for _ in range(repetitions):
        noise = generator.normal(size=(2, num))
        if null is None:
            gap = 3 * scaled.sum(0) + noise[0]
            mu = gap + 0.5 * noise[1]
        else:
            mu, gap = (np.array(own) @ scaled[:2] + e for own, e in zip(NULLS[null], noise, strict=True))
        p = conditional_information(mu, gap, np.arange(num), list(axes), num_orders, generator)[1]
        found += p <= 0.05
    return found / repetitions


@pytest.mark.parametrize("null", ["one", "both", "one of two"])
def test_information_beyond_hyper_parameters_is_found_by_chance_one_time_in_twenty(null):
    """A measure shuffled over all runs is no null: 15 to 99 % of copied hyper-parameters were "above chance".

    At a level of 5 %, 60 repetitions: standard error 2.8 %, four are allowed.
    """
    assert share_found(22, null, 60, num_orders=99) <= 0.05 + 4 * 0.028


def test_information_of_an_honest_measure_is_found():
    """A p of one whatever the measure would pass the test above."""
    assert share_found(22, None, 20) >= 0.7


@pytest.mark.slow
@pytest.mark.parametrize("null", NULLS)
def test_the_level_of_information_holds_for_larger_designs(null):
    """The same for 48 runs at 200 repetitions: standard error 1.5 %."""
    assert share_found(48, null, 200) <= 0.05 + 4 * 0.015


@pytest.mark.slow
@pytest.mark.parametrize("num", [10, 48])
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9])
def test_intervals_and_chances_of_coefficients_hold_their_level(num, strength):
    """Normal pairs of correlation ρ have τ = 2/π arcsin ρ; 400 repetitions, standard error 1.1 %.

    Two measures alike in ρ differ by chance at most one time in twenty; four standard errors are allowed.
    """
    generator, counts = np.random.default_rng(num), np.zeros(4)
    tau = 2 / math.pi * math.asin(strength)
    for seed in range(400):
        g, *noise = generator.normal(size=(3, num))
        a, b = (strength * g + math.sqrt(1 - strength**2) * e for e in noise)
        one = correlate(a, g, range(num), {}, num_bootstrap=400, seed=seed)
        other = compare({"a": a, "b": b}, g, range(num), "a", num_bootstrap=400, seed=seed)["b"]
        counts += [
            one.kendall.low <= tau <= one.kendall.high,
            one.pearson.low <= strength <= one.pearson.high,
            other.p <= 0.05,
            one.kendall_p <= 0.05,
        ]
    covered, pearson, differs, found = counts / 400
    assert min(covered, pearson) >= 0.95 - 4 * 0.011
    assert differs <= 0.05 + 4 * 0.011
    assert (abs(found - 0.05) <= 4 * 0.011) if strength == 0 else found > 0.15


def test_several_p_are_adjusted_by_holm():
    """Of twenty-four measures one is below 5 % by chance; a missing p must not count, nor an order break."""
    assert holm({"a": 0.01, "b": math.nan, "c": 0.02, "d": 0.5}) == pytest.approx(
        {"a": 0.03, "b": math.nan, "c": 0.04, "d": 0.5}, nan_ok=True
    )
    assert list(holm({"x": 0.4, "y": 0.3}).values()) == [0.6, 0.6]


def test_intervals_need_ten_runs():
    """Three runs have 27 draws: their percentiles cover a third to two thirds, and read as 95 %."""
    generator = np.random.default_rng(0)
    for num, has_interval in ((1, False), (3, False), (9, False), (10, True)):
        x = np.repeat(generator.normal(size=(3, num)), 3, axis=1) + generator.normal(size=(3, 3 * num))
        runs = np.repeat(np.arange(num), 3).tolist()
        result = correlate(x[0], x[1], runs, {"lr": runs}, num_bootstrap=100)
        other = compare({"a": x[0], "b": x[2]}, x[1], runs, "a", num_bootstrap=100)["b"]
        estimates = result.kendall, result.pearson, other.kendall
        assert [math.isfinite(one.low) for one in estimates] == [has_interval] * 3
        assert math.isfinite(other.p) == has_interval


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
