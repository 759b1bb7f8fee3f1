"""Does a measure go with generalisation? Correlations over many runs, with intervals, chances and controls.

Legend: M models, μ [M] a measure, g [M] what it should predict (a robust gap), θ_i a hyper-parameter.

    τ, r     Kendall's τ_b and Pearson's r of (μ, g) over all models                                       (1)
    ψ_i = mean over groups that agree in every θ_j, j ≠ i, of
          mean over their pairs with different θ_i of sign(μ − μ') sign(g − g'),        Ψ = mean_i ψ_i     (2)

(2) is the granulated Kendall coefficient of Jiang et al. 2020 (arXiv 1912.02178, section 2.2). A measure that
only copies one hyper-parameter has a high τ, but Ψ falls for the other axes, and so does their conditional
information (`information`). Differences to them: seeds are repetitions, not an axis, so a pair may differ in
its seeds; a tie is a sign of its own, zero.

Intervals are over *runs*: checkpoints of one run stay together, pairs of copies of one run do not count. They
are 95 % percentiles of a bootstrap, but of r Student's on the jackknife of artanh r, since percentiles of r
cover 89 to 93 %. With fewer than ``MIN_RUNS`` runs there is none: percentiles of τ cover 28 to 62 % of the
time at three runs, from ten on 93 to 98 %. p of τ: the share of orders of the runs that reach its size.

Of several measures each p is Holm's (1979, Scand. J. Stat. 6(2)): among ``m`` the k-th smallest times
m − k + 1, not below the one before. `compare` sets |τ| of measures against that of one on the same draws of
runs, as two intervals of the same runs say little about the difference:

    Δ = |τ(μ)| − |τ(reference)|, signs held as found;   p = 2 min( P*(Δ* <= 0), P*(Δ* >= 0) )              (3)
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wcitrain.measures.information import Floats, Ints, chance, conditional_information, rearranged

MIN_RUNS = 10  # of an interval
NUM_BOOTSTRAP = 2000  # draws; also of rearrangements half as many


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; NaN where there is none (a constant, fewer than ``MIN_RUNS``)."""

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
    kendall_p: float  # of a measure that has nothing to do with the target
    pearson: Estimate
    granulated: Estimate  # Ψ of (2); NaN without an axis that has pairs
    information: float  # K, see `information`
    information_p: float  # of one that says nothing beyond some two hyper-parameters
    num_models: int  # with a finite measure and target
    num_runs: int


@dataclass(frozen=True)
class Difference:
    """How much better one measure goes with a target than another, by (3)."""

    kendall: Estimate  # Δ
    p: float  # NaN where there is no interval
    num_models: int  # with all three numbers


def correlate(
    measure: Sequence[float],
    target: Sequence[float],
    runs: Sequence[Any],
    axes: Mapping[str, Sequence[Any]],
    *,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> Correlation:
    """Correlate a measure with a target over models.

    Args:
        measure, target: μ and g [M]; models where one of them is not finite are left out, fewer
            than three others a ``ValueError``.
        runs: The run each model comes from [M], any hashable; models of one run are its checkpoints.
        axes: θ_i [M] for each hyper-parameter i by name, any hashable. Seeds do not belong here.
        num_bootstrap: Draws of the bootstrap, and half as many rearrangements; 0 leaves both out.

    >>> axes = {"lr": [1, 1, 2, 2]}
    >>> result = correlate([1, 2, 3, 4], [2, 3, 5, 9], runs="abcd", axes=axes, num_bootstrap=0)
    >>> result.kendall.value, result.granulated.value
    (1.0, 1.0)
    """
    (mu, g), run, columns = _finite("correlate", [measure, target], runs, axes)
    if len(mu) < 3:
        raise ValueError(f"correlate: got {len(mu)} models with finite numbers; expected at least 3.")
    generator, num_runs, num = np.random.default_rng(seed), int(run.max()) + 1, num_bootstrap // 2
    counts = _counts(run, num_bootstrap, generator)
    sx, sy = _signs(mu), _signs(g)
    psi = [_granulated(sx * sy, counts, i, columns) for i in range(len(columns))]
    psi = [values for values in psi if len(values)]
    information, information_p = conditional_information(mu, g, run, columns, num, generator)
    sums = [_sums(mu, one, sy) for one in rearranged(run, np.zeros_like(run), num, generator)]
    is_constant = not (sx.any() and sy.any())
    reached = np.abs(np.concatenate(sums)) >= abs((sx * sy).sum()) - 0.5
    without = 1 - np.eye(num_runs if num_runs >= MIN_RUNS else 0, num_runs)[:, run]  # c of the jackknife
    return Correlation(
        kendall=_estimate(_tau(sx, sy, counts), num_runs),
        kendall_p=chance(reached) if num and not is_constant else math.nan,
        pearson=_students(_pearson(mu, g, np.concatenate([counts[:1], without])), num_runs),
        granulated=_estimate(_mean(psi), num_runs) if psi else Estimate(math.nan),
        information=information,
        information_p=information_p,
        num_models=len(mu),
        num_runs=num_runs,
    )


def compare(
    measures: Mapping[str, Sequence[float]],
    target: Sequence[float],
    runs: Sequence[Any],
    reference: str,
    *,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> dict[str, Difference]:
    """Return (3) for every measure but the reference, over models [M] where all three numbers are finite.

    Every measure's p is for itself: see `holm`. Arguments are as in `correlate`.
    """
    found = {}
    for name in (name for name in measures if name != reference):
        (mu, other, g), run, _ = _finite("compare", [measures[name], measures[reference], target], runs, {})
        if len(g) < 3:
            found[name] = Difference(Estimate(math.nan), math.nan, len(g))
            continue
        counts = _counts(run, num_bootstrap, np.random.default_rng(seed))
        taus = [_tau(_signs(x), _signs(g), counts) for x in (mu, other)]
        delta = np.sign(taus[0][0]) * taus[0] - np.sign(taus[1][0]) * taus[1]
        estimate, p = _estimate(delta, int(run.max()) + 1), math.nan
        if math.isfinite(estimate.low):
            drawn = delta[1:][np.isfinite(delta[1:])]
            p = min(1.0, 2 * min(chance(drawn <= 0), chance(drawn >= 0)))
        found[name] = Difference(estimate, p, len(g))
    return found


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """Return p adjusted for as many measures as have one (Holm); NaN stays.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    known = sorted((p, name) for name, p in chances.items() if math.isfinite(p))
    adjusted, least = dict(chances), 0.0
    for place, (p, name) in enumerate(known):
        adjusted[name] = least = max(least, min(1.0, p * (len(known) - place)))
    return adjusted


def _finite(
    where: str, numbers: Sequence[Sequence[float]], runs: Sequence[Any], axes: Mapping[str, Sequence[Any]]
) -> tuple[list[Floats], Ints, list[Ints]]:
    """Return what models with finite numbers have: numbers, codes of runs, and of axes that differ."""
    lengths = {len(column) for column in (*numbers, runs, *axes.values())}
    if len(lengths) > 1:
        raise ValueError(f"{where}: got columns of {sorted(lengths)} models; expected one length for all.")
    table = np.array([list(column) for column in numbers], dtype=np.float64)
    keep = np.logical_and.reduce(np.isfinite(table))
    coded = [_codes(values, keep) for values in axes.values()]
    return list(table[:, keep]), _codes(runs, keep), [column for column in coded if column.max(initial=0) > 0]


def _counts(run: Ints, num: int, generator: np.random.Generator) -> Floats:
    """Return how often each model counts [1 + B, M]: once, then in draws of whole runs."""
    num_runs = int(run.max()) + 1
    drawn = generator.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num)
    return np.concatenate([np.ones((1, len(run))), drawn[:, run]])


def _codes(values: Sequence[Any], keep: npt.NDArray[np.bool_]) -> Ints:
    """Return the values to keep as numbers 0, 1, ... in order of first appearance."""
    known: dict[Any, int] = {}
    kept = itertools.compress(values, keep)
    return np.array([known.setdefault(value, len(known)) for value in kept], dtype=np.int64)


def _signs(x: Floats) -> Floats:
    """Return the signs of all differences [M, M]."""
    return np.sign(x[:, None] - x[None, :])


def _sums(mu: Floats, places: Ints, sy: Floats) -> Floats:
    """Return Σ sign Δμ sign Δg over all pairs [P] where model i has the value of model places[:, i]."""
    moved = mu[places]
    return np.einsum("pij,ij->p", np.sign(moved[:, :, None] - moved[:, None, :]), sy)


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


def _estimate(values: Floats, num_runs: int) -> Estimate:
    """Return the first value with the percentile interval of the others."""
    value, drawn = float(values[0]), values[1:][np.isfinite(values[1:])]
    has_interval = not math.isnan(value) and num_runs >= MIN_RUNS and len(drawn) >= 20
    return Estimate(value, *np.percentile(drawn, [2.5, 97.5]).tolist()) if has_interval else Estimate(value)


def _students(values: Floats, num_runs: int) -> Estimate:
    """Return the first r with Student's interval around artanh r, the others being r without one run."""
    from scipy.special import stdtrit  # slow to import

    if num_runs < MIN_RUNS or not np.isfinite(values).all():
        return Estimate(float(values[0]))
    z = np.arctanh(values.clip(-1 + 1e-15, 1 - 1e-15))
    stderr = math.sqrt((num_runs - 1) / num_runs * np.square(z[1:] - z[1:].mean()).sum())
    ends = z[0] + float(stdtrit(num_runs - 1, 0.975)) * stderr * np.array([-1, 1])
    return Estimate(float(values[0]), *np.tanh(ends).tolist())
