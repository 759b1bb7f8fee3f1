"""Does a measure go with generalisation? Correlations over many runs, with intervals and controls.

Legend: M models, μ [M] a measure, g [M] what it should predict (a robust gap), θ_i a hyper-parameter.

    τ, r     Kendall's τ_b and Pearson's r of (μ, g) over all models                                       (1)
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


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; NaN where there is none (a constant, too few models)."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        """Return ".52 (.31 to .70)"."""
        value, low, high = (
            f"{x:.2f}".replace("0.", ".", 1) if abs(x) < 0.995 else f"{x:.0f}"
            for x in (self.value, self.low, self.high)
        )
        interval = f" ({low} to {high})" if math.isfinite(self.low) else ""
        return "–" if math.isnan(self.value) else value + interval


@dataclass(frozen=True)
class Correlation:
    """How one measure goes with one target."""

    kendall: Estimate  # (1)
    pearson: Estimate
    granulated: Estimate  # Ψ of (2); NaN without an axis that has pairs
    information: float  # K of (3)
    information_chance: float  # 95 % quantile of K for a shuffled measure
    num_models: int  # with a finite measure and target
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
        measure, target: μ and g [M]; models where one of them is not finite are left out, fewer
            than three others a ``ValueError``.
        runs: The run each model comes from [M], any hashable; models of one run are its checkpoints.
        axes: θ_i [M] for each hyper-parameter i by name, any hashable. Seeds do not belong here.
        num_bootstrap: Draws of the bootstrap, and a fifth as many shuffles; 0 leaves intervals out.

    >>> axes = {"lr": [1, 1, 2, 2]}
    >>> result = correlate([1, 2, 3, 4], [2, 3, 5, 9], runs="abcd", axes=axes, num_bootstrap=0)
    >>> result.kendall.value, result.granulated.value
    (1.0, 1.0)
    """
    lengths = {len(column) for column in (measure, target, runs, *axes.values())}
    if len(lengths) > 1:
        raise ValueError(f"correlate: got columns of {sorted(lengths)} models; expected one length for all.")
    mu, g = np.asarray(measure, dtype=np.float64), np.asarray(target, dtype=np.float64)
    keep = np.isfinite(mu) & np.isfinite(g)
    if keep.sum() < 3:
        raise ValueError(f"correlate: got {keep.sum()} models with finite numbers; expected at least 3.")
    mu, g, run = mu[keep], g[keep], _codes(runs, keep)
    coded = [_codes(values, keep) for values in axes.values()]
    columns = [column for column in coded if column.max() > 0]  # that differ
    generator, num_runs = np.random.default_rng(seed), int(run.max()) + 1
    drawn = generator.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_bootstrap)
    # c [1 + B, M]: how often each model was drawn.
    counts = np.concatenate([np.ones((1, len(mu))), drawn[:, run]])

    sx, sy = _signs(mu), _signs(g)
    psi = [_granulated(sx * sy, counts, i, columns) for i in range(len(columns))]
    psi = [values for values in psi if len(values)]
    conditions = _conditions(columns, len(mu))
    members = [np.flatnonzero(run == r) for r in range(num_runs)]
    shuffled, other = [], np.empty_like(mu)
    for _ in range(num_bootstrap // 5):  # the runs' blocks of values in another order
        blocks = [members[r] for r in generator.permutation(num_runs)]
        other[np.concatenate(members)] = mu[np.concatenate(blocks)]
        shuffled.append(_information(_signs(other), sy, run, conditions))
    return Correlation(
        kendall=_estimate(_tau(sx, sy, counts)),
        pearson=_estimate(_pearson(mu, g, counts)),
        granulated=_estimate(_mean(psi)) if psi else Estimate(math.nan),
        information=_information(sx, sy, run, conditions),
        information_chance=float(np.percentile(shuffled, 95)) if shuffled else math.nan,
        num_models=len(mu),
        num_runs=num_runs,
    )


def _codes(values: Sequence[Any], keep: npt.NDArray[np.bool_]) -> Ints:
    """Return the values to keep as numbers 0, 1, ... in order of first appearance."""
    known: dict[Any, int] = {}
    kept = itertools.compress(values, keep)
    return np.array([known.setdefault(value, len(known)) for value in kept], dtype=np.int64)


def _signs(x: Floats) -> Floats:
    """Return the signs of all differences [M, M]."""
    return np.sign(x[:, None] - x[None, :])


def _conditions(columns: Sequence[Ints], num: int) -> list[Ints]:
    """Return for every set S of (3) which of its values each ordered pair of models has [M, M]."""
    conditions = []
    for chosen in itertools.chain.from_iterable(itertools.combinations(columns, size) for size in range(3)):
        cell = np.zeros((num, num), dtype=np.int64)
        for column in chosen:
            values = int(column.max()) + 1
            cell = (cell * values + column[:, None]) * values + column[None, :]
        conditions.append(np.unique(cell, return_inverse=True)[1].reshape(num, num))
    return conditions


def _information(sx: Floats, sy: Floats, run: Ints, conditions: Sequence[Ints]) -> float:
    """Return K of (3). Both orders of a pair count, so the order of the models does not matter."""
    keep = (run[:, None] != run[None, :]) & (sy != 0)
    code = 2 * (sx[keep].astype(np.int64) + 1) + (sy[keep] > 0)
    shares = []
    for cell in conditions if len(code) else ():
        table = np.bincount(cell[keep] * 6 + code, minlength=6 * (int(cell.max()) + 1)).reshape(-1, 3, 2)
        entropy = _entropy(table.sum(1)) - _entropy(table.sum((1, 2)))  # H(g | S)
        left = _entropy(table) - _entropy(table.sum(2))  # H(g | μ, S)
        if entropy > 1e-12:
            shares.append((entropy - left) / entropy)
    return max(0.0, min(shares)) if shares else math.nan


def _entropy(counts: Ints) -> float:
    """Return the entropy in nats of a table of counts."""
    shares = np.asarray(counts, dtype=np.float64).ravel() / np.sum(counts)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def _granulated(product: Floats, counts: Floats, axis: int, columns: Sequence[Ints]) -> Floats:
    """Return ψ of (2) for rows of counts [B], a pair weighing as often as it was drawn; [0] without pairs."""
    group = np.zeros_like(columns[axis])
    for i, column in enumerate(columns):
        if i != axis:
            group = group * (int(column.max()) + 1) + column
    first, second = np.triu_indices(len(group), 1)
    keep = (group[first] == group[second]) & (columns[axis][first] != columns[axis][second])
    first, second = first[keep], second[keep]
    groups, group = np.unique(group[first], return_inverse=True)
    weights = counts[:, first] * counts[:, second]  # [B, pairs]
    members = np.eye(len(groups))[group]  # [pairs, groups]
    sums, totals = (weights * product[first, second] @ members).T, (weights @ members).T  # [groups, B]
    return _mean(list(_quotient(sums, totals))) if len(groups) else np.empty(0)


def _mean(rows: Sequence[Floats]) -> Floats:
    """Return the mean of rows over what is finite, NaN where nothing is."""
    is_finite = np.isfinite(rows)
    return _quotient(np.where(is_finite, rows, 0.0).sum(0), is_finite.sum(0).astype(np.float64))


def _tau(sx: Floats, sy: Floats, counts: Floats) -> Floats:
    """Return Kendall's τ_b for rows of counts [B], from the signs of all pairs [M, M]; NaN for a constant."""
    both, x, y = (((counts @ matrix) * counts).sum(1) for matrix in (sx * sy, np.abs(sx), np.abs(sy)))
    return np.clip(_quotient(both, np.sqrt(x * y)), -1, 1)


def _pearson(x: Floats, y: Floats, counts: Floats) -> Floats:
    """Return Pearson's r of x and y [M] for rows of counts [B]; NaN for a constant."""
    total = counts.sum(1, keepdims=True)
    x = x - (counts * x).sum(1, keepdims=True) / total
    y = y - (counts * y).sum(1, keepdims=True) / total
    for column in (x, y):
        size = np.abs(np.where(counts > 0, column, 0.0)).max(1, keepdims=True)
        column /= np.where(size > 0, size, 1.0)
    squared = (counts * x * x).sum(1) * (counts * y * y).sum(1)
    return np.clip(_quotient((counts * x * y).sum(1), np.sqrt(squared)), -1, 1)


def _quotient(numerator: Floats, denominator: Floats) -> Floats:
    """Return the quotient, NaN where the denominator is zero up to rounding."""
    undefined = np.full_like(numerator, math.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 1e-10)


def _estimate(values: Floats) -> Estimate:
    """Return the first value with the percentile interval of the others, if at least 20 are numbers."""
    value, drawn = float(values[0]), values[1:][np.isfinite(values[1:])]
    has_interval = not math.isnan(value) and len(drawn) >= 20
    return Estimate(value, *np.percentile(drawn, [2.5, 97.5]).tolist()) if has_interval else Estimate(value)
