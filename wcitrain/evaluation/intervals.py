"""Intervals and tests of shares, means and medians: how far numbers of so many examples can be trusted."""

import math

import numpy as np
from torch import Tensor


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a binomial share p observed on n examples, z = 1.96.

    ( p + z²/2n ± z sqrt( p(1−p)/n + z²/4n² ) ) / (1 + z²/n)
    """
    z = 1.96
    centre = share + z * z / (2 * num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_interval(values: Tensor) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean (Efron & Tibshirani 1993, chapter 13).

    The 2.5 % and 97.5 % quantiles of the means of 2000 samples of the values [N], drawn with replacement.
    """
    numbers, generator = values.detach().cpu().double().numpy(), np.random.default_rng(0)
    means: list[float] = []
    while len(means) < 2000:  # a hundred at a time: ten thousand values take 8 MB, not 160
        means += numbers[generator.integers(len(numbers), size=(100, len(numbers)))].mean(1).tolist()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(a_flags: Tensor, b_flags: Tensor) -> tuple[int, int, float]:
    """Return b, c and the p-value of McNemar's exact test (1947) of truth values [N] on the same examples.

        p = min( 1, 2 P[ X ≤ min(b, c) ] ),  X ~ Binomial(b + c, 1/2)

    with b examples that only the first model gets right and c that only the second does.
    """
    only_a, only_b = int((a_flags & ~b_flags).sum()), int((b_flags & ~a_flags).sum())
    num = only_a + only_b
    total = sum(math.comb(num, k) for k in range(min(only_a, only_b) + 1))
    return only_a, only_b, min(1.0, 2 * total / 2**num)


def median_interval(values: Tensor) -> tuple[float, float, float]:
    """Return the median of values [N], infinite ones too, and its 95 % interval for any distribution.

    Between the l-th smallest and the l-th largest value, l = floor( (N − 1.96 sqrt N) / 2 ): the number of
    values below the median is binomial (Conover 1999, section 3.2). Infinite ends for N < 8, where l = 0.
    """
    ordered = np.sort(values.detach().cpu().double().numpy())
    rank = math.floor((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2)
    ends = (float(ordered[rank - 1]), float(ordered[-rank])) if rank > 0 else (-math.inf, math.inf)
    return float(np.median(ordered)), *ends
