"""How sure a number is: intervals of shares and means, and whether two models differ on the same examples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

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


def bootstrap_interval(
    values: Tensor | Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean (Efron & Tibshirani 1993, chapter 13).

    The 2.5 % and 97.5 % quantiles of the means of ``num_resamples`` samples, drawn with replacement: the ends
    jitter by about 1/sqrt(num_resamples) of the length. Values [N] are of independent examples, no restarts.
    """
    numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if num := int((~np.isfinite(numbers)).sum()):
        raise ValueError(f"bootstrap_interval: got {num} values that are not finite; expected none.")
    generator = np.random.default_rng(seed)
    means: list[float] = []
    while len(means) < num_resamples:  # a hundred at a time: ten thousand values take 8 MB, not 160
        size = (min(100, num_resamples - len(means)), len(numbers))
        means += numbers[generator.integers(len(numbers), size=size)].mean(1).tolist()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


class McNemar(NamedTuple):
    """Examples that only one of two models gets right, and the two-sided p-value of equal models."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(a_flags: Tensor, b_flags: Tensor) -> McNemar:
    """Return McNemar's exact test (1947) of two models' truth values [N] on the same examples.

        p = min( 1, 2 P[ X ≤ min(b, c) ] ),  X ~ Binomial(b + c, 1/2)                                      (1)

    with b examples that only the first gets right and c that only the second does. Examples on which both
    agree say nothing about a difference: on the same images this is much sharper than comparing intervals.
    """
    only_a, only_b = int((a_flags & ~b_flags).sum()), int((b_flags & ~a_flags).sum())
    num = only_a + only_b
    total = sum(math.comb(num, k) for k in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, min(1.0, 2 * total / 2**num))
