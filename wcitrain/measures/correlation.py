"""Does a measure go with generalisation? Correlations over many runs, with intervals and controls.

Legend: M models, μ [M] a measure, g [M] what it should predict (a robust gap), θ_i a hyper-parameter.

    τ, ρ, r     Kendall's τ_b, Spearman's ρ and Pearson's r of (μ, g) over all models                      (1)
    ψ_i = mean over groups that agree in every θ_j, j ≠ i, of
          mean over their pairs with different θ_i of sign(μ − μ') sign(g − g'),        Ψ = mean_i ψ_i     (2)
    K_S = I( sign Δμ ; sign Δg | θ_S, θ_S' ) / H( sign Δg | θ_S, θ_S' ),     K = min over |S| <= 2 of K_S  (3)

(2) is the granulated Kendall coefficient and (3) the conditional mutual information of Jiang et al. 2020
(arXiv 1912.02178, sections 2.2 and 2.3), both over pairs of models. A measure that only copies one
hyper-parameter has a high τ, but Ψ falls for the other axes and K_S vanishes once that hyper-parameter is in
S. Differences to them: seeds are repetitions, not an axis, so a pair may differ in its seeds; a tie is a sign
of its own, zero, except that pairs with equal g are left out of (3).

Intervals are percentiles of a bootstrap over *runs*: checkpoints of one run are drawn together, pairs of
copies of one run do not count. (3) cannot be negative and is biased upward on few models: it comes with the
95 % quantile that it reaches when μ is shuffled over the runs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_CONDITIONED = 2


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; NaN where it has none (a constant, too few models)."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        """Return ".52 (.31 to .70)"."""
        if math.isnan(self.value):
            return "–"
        interval = f" ({_short(self.low)} to {_short(self.high)})" if math.isfinite(self.low) else ""
        return f"{_short(self.value)}{interval}"


@dataclass(frozen=True)
class Correlation:
    """How one measure goes with one target; see the equations of the module.

    Args:
        kendall, spearman, pearson: (1).
        granulated: Ψ of (2); NaN without an axis that has pairs.
        by_axis: ψ_i of (2), for the axes that have pairs.
        within: Mean over runs of Kendall's τ among a run's checkpoints; NaN where no run has three of them.
        information: K of (3).
        information_chance: 95 % quantile of K for a shuffled measure.
        num_models, num_runs: Models with a finite measure and target, and the runs they come from.
    """

    kendall: Estimate
    spearman: Estimate
    pearson: Estimate
    granulated: Estimate
    by_axis: Mapping[str, float]
    within: Estimate
    information: float
    information_chance: float
    num_models: int
    num_runs: int


def correlate(
    measure: Sequence[float],
    target: Sequence[float],
    runs: Sequence[Any],
    axes: Mapping[str, Sequence[Any]],
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Correlation:
    """Correlate a measure with a target over models.

    Args:
        measure: μ [M]; models where it or the target is not finite are left out.
        target: g [M].
        runs: The run each model comes from [M], any hashable; models of one run are its checkpoints.
        axes: θ_i [M] for each hyper-parameter i by name, any hashable. Seeds do not belong here.
        num_bootstrap: Draws of the bootstrap, and a fifth as many shuffles; 0 leaves intervals out.
        seed: Of both.

    Raises:
        ValueError: Columns of different lengths, or fewer than three models with finite numbers.

    >>> axes = {"lr": [1, 1, 2, 2]}
    >>> result = correlate([1, 2, 3, 4], [2, 3, 5, 9], runs="abcd", axes=axes, num_bootstrap=0)
    >>> result.kendall.value, result.by_axis
    (1.0, {'lr': 1.0})
    """
    lengths = {len(column) for column in (measure, target, runs, *axes.values())}
    if len(lengths) > 1:
        raise ValueError(f"correlate: got columns of {sorted(lengths)} models; expected one length.")
    mu, g = np.asarray(measure, dtype=np.float64), np.asarray(target, dtype=np.float64)
    keep = np.isfinite(mu) & np.isfinite(g)
    if keep.sum() < 3:
        raise ValueError(f"correlate: got {keep.sum()} models with finite numbers; expected at least 3.")
    mu, g = mu[keep], g[keep]
    run = _codes([r for r, k in zip(runs, keep, strict=True) if k])
    columns = {
        name: _codes([v for v, k in zip(values, keep, strict=True) if k]) for name, values in axes.items()
    }
    columns = {name: column for name, column in columns.items() if column.max() > 0}
    generator = np.random.default_rng(seed)
    num_runs = int(run.max()) + 1
    drawn = generator.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_bootstrap)
    # c [1 + B, M]: how often each model was drawn.
    counts = np.concatenate([np.ones((1, len(mu))), drawn[:, run]])

    sx, sy = _signs(mu), _signs(g)
    pairs = {name: found for name in columns if len((found := _axis_pairs(name, columns, run))[0])}
    psi = {name: _granulated(sx * sy, counts, *found) for name, found in pairs.items()}
    members = [run == r for r in range(num_runs)]
    taus = np.array([_tau(sx[m][:, m], sy[m][:, m], counts[:, m]) for m in members if m.sum() >= 3])
    weights = np.array([counts[:, m].max(1) for m in members if m.sum() >= 3])

    conditions = _conditions(columns, len(mu))
    information = _information(mu, g, run, conditions)
    shuffled = [
        _information(_shuffled(mu, members, generator), g, run, conditions) for _ in range(num_bootstrap // 5)
    ]
    return Correlation(
        kendall=_estimate(_tau(sx, sy, counts)),
        spearman=_estimate(_pearson(_ranks(mu, counts), _ranks(g, counts), counts)),
        pearson=_estimate(
            _pearson(np.broadcast_to(mu, counts.shape), np.broadcast_to(g, counts.shape), counts)
        ),
        granulated=_estimate(_mean(np.array(list(psi.values())))) if psi else Estimate(math.nan),
        by_axis={name: float(values[0]) for name, values in psi.items()},
        within=_estimate(_mean(taus, weights)) if len(taus) else Estimate(math.nan),
        information=information,
        information_chance=float(np.percentile(shuffled, 95)) if shuffled else math.nan,
        num_models=len(mu),
        num_runs=num_runs,
    )


def conditional_information(mu: Floats, g: Floats, run: Ints, columns: Mapping[str, Ints]) -> float:
    """Return K of (3) over pairs of different runs; NaN where the target's signs have no entropy.

    Args:
        mu, g: [M].
        run: Number of each model's run [M].
        columns: θ_i as numbers [M], by name.
    """
    return _information(mu, g, run, _conditions(columns, len(mu)))


def _conditions(columns: Mapping[str, Ints], num: int) -> list[Ints]:
    """Return for every set S of (3) which of its values each ordered pair of models has [M, M]."""
    conditions = []
    for size in range(MAX_CONDITIONED + 1):
        for names in itertools.combinations(columns, size):
            cell = np.zeros((num, num), dtype=np.int64)
            for name in names:
                column, values = columns[name], int(columns[name].max()) + 1
                cell = (cell * values + column[:, None]) * values + column[None, :]
            conditions.append(np.unique(cell, return_inverse=True)[1].reshape(num, num))
    return conditions


def _information(mu: Floats, g: Floats, run: Ints, conditions: Sequence[Ints]) -> float:
    """Return K of (3). Both orders of a pair count, so the order of the models does not matter."""
    signs_mu, signs_g = _signs(mu), _signs(g)
    keep = (run[:, None] != run[None, :]) & (signs_g != 0)
    code = 2 * (signs_mu[keep].astype(np.int64) + 1) + (signs_g[keep] > 0)
    if not len(code):
        return math.nan
    shares = []
    for cell in conditions:
        table = np.bincount(cell[keep] * 6 + code, minlength=6 * (int(cell.max()) + 1)).reshape(-1, 3, 2)
        entropy = _entropy(table.sum(1)) - _entropy(table.sum((1, 2)))  # H(g | S)
        left = _entropy(table) - _entropy(table.sum(2))  # H(g | μ, S)
        if entropy > 1e-12:
            shares.append((entropy - left) / entropy)
    return max(0.0, min(shares)) if shares else math.nan


def _shuffled(mu: Floats, members: Sequence[npt.NDArray[np.bool_]], generator: np.random.Generator) -> Floats:
    """Return μ with the runs' blocks of values in another order: checkpoints of a run stay together."""
    places = [np.flatnonzero(m) for m in members]
    order = generator.permutation(len(places))
    result = np.empty_like(mu)
    result[np.concatenate(places)] = mu[np.concatenate([places[r] for r in order])]
    return result


def _axis_pairs(axis: str, columns: Mapping[str, Ints], run: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the pairs of models that differ in one axis alone: first, second, number of their group."""
    group = np.zeros(len(run), dtype=np.int64)
    for name, column in columns.items():
        if name != axis:
            group = group * (int(column.max()) + 1) + column
    first, second = np.triu_indices(len(run), 1)
    keep = (group[first] == group[second]) & (columns[axis][first] != columns[axis][second])
    return first[keep], second[keep], np.unique(group[first[keep]], return_inverse=True)[1]


def _granulated(product: Floats, counts: Floats, first: Ints, second: Ints, group: Ints) -> Floats:
    """Return ψ of (2) for rows of counts [B], a pair weighing as often as it was drawn; NaN for none."""
    weights = counts[:, first] * counts[:, second]  # [B, pairs]
    members = np.eye(int(group.max()) + 1)[group]  # [pairs, groups]
    return _mean((weights * product[first, second] @ members).T, (weights @ members).T, is_sum=True)


def _mean(values: Floats, weights: Floats | None = None, *, is_sum: bool = False) -> Floats:
    """Return the mean over the first dimension of what is finite and was drawn, NaN where nothing was.

    With ``is_sum`` the values are sums over ``weights``: their quotients are averaged, each counting once.
    """
    weights = np.ones_like(values) if weights is None else weights
    there = np.isfinite(values) & (weights > 0)
    if is_sum:
        values = np.divide(values, weights, out=np.zeros_like(values), where=there)
        weights = there.astype(np.float64)
    total = np.where(there, weights, 0.0).sum(0)
    sums = np.where(there, values * weights, 0.0).sum(0)
    return np.divide(sums, total, out=np.full_like(total, math.nan), where=total > 0)


def _tau(sx: Floats, sy: Floats, counts: Floats) -> Floats:
    """Return Kendall's τ_b for rows of counts [B], from the signs of all pairs [M, M]; NaN for a constant."""

    def over_pairs(matrix: Floats) -> Floats:
        return ((counts @ matrix) * counts).sum(1)

    return _quotient(over_pairs(sx * sy), over_pairs(np.abs(sx)) * over_pairs(np.abs(sy)))


def _pearson(x: Floats, y: Floats, counts: Floats) -> Floats:
    """Return Pearson's r of x and y [B, M] for every row of counts [B]; NaN for a constant."""
    total = counts.sum(1, keepdims=True)
    x = x - (counts * x).sum(1, keepdims=True) / total
    y = y - (counts * y).sum(1, keepdims=True) / total
    scale = [np.abs(np.where(counts > 0, column, 0.0)).max(1, keepdims=True) for column in (x, y)]
    x, y = (column / np.where(size > 0, size, 1.0) for column, size in zip((x, y), scale, strict=True))
    return _quotient((counts * x * y).sum(1), (counts * x * x).sum(1) * (counts * y * y).sum(1))


def _quotient(numerator: Floats, squared: Floats) -> Floats:
    """Return numerator / sqrt(squared) within [-1, 1]; NaN where the latter is zero up to rounding."""
    tiny = 1e-20
    result = np.full_like(numerator, math.nan)
    np.divide(numerator, np.sqrt(squared), out=result, where=squared > tiny)
    return np.clip(result, -1, 1)


def _ranks(x: Floats, counts: Floats) -> Floats:
    """Return the ranks [B, M] of the models in each drawn sample, ties averaged."""
    below = (x[:, None] < x[None, :]).astype(np.float64)
    level = (x[:, None] == x[None, :]).astype(np.float64)
    return counts @ below + (counts @ level + 1) / 2


def _signs(x: Floats) -> Floats:
    """Return sign(x_i − x_j) [M, M]."""
    return np.sign(x[:, None] - x[None, :])


def _estimate(values: Floats) -> Estimate:
    """Return the first value with the percentile interval of the others, if at least 20 are numbers."""
    value, drawn = float(values[0]), values[1:][np.isfinite(values[1:])]
    if math.isnan(value) or len(drawn) < 20:
        return Estimate(value)
    return Estimate(value, *np.percentile(drawn, [2.5, 97.5]).tolist())


def _entropy(counts: Any) -> float:
    """Return the entropy in nats of a table of counts."""
    shares = np.asarray(counts, dtype=np.float64).ravel() / np.sum(counts)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _codes(values: Sequence[Any]) -> Ints:
    """Return values as numbers 0, 1, ... in order of first appearance."""
    known: dict[Any, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], dtype=np.int64)


def _short(value: float) -> str:
    """Return ".52" for 0.52."""
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"
