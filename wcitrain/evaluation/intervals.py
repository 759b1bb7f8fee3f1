"""How sure a number is: intervals of shares and means, and whether two models differ on the same examples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor


def wilson_interval(share: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a binomial share observed on ``num`` examples (95 % for z = 1.96).

    ( p + z²/2n ± z sqrt( p(1−p)/n + z²/4n² ) ) / (1 + z²/n)
    """
    centre = share + z * z / (2 * num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_interval(
    values: Tensor | Sequence[float], *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of ``values`` (Efron & Tibshirani 1993, ch. 13).

    The (1 ∓ level)/2 quantiles of the means of ``num_resamples`` samples, drawn with replacement.

    Args:
        values: One number an example [N], finite, at least one. Examples must be independent: no restarts.
        num_resamples: At least 1; the interval's ends jitter by about 1/sqrt(num_resamples) of its length.
        level: Coverage in (0, 1).
        seed: Of the draws: the same values and seed give the same interval.

    Raises:
        ValueError: No values, values that are not finite, or a setting outside its range.

    Example:
        >>> bootstrap_interval([3.0, 3.0, 3.0])
        (3.0, 3.0)
    """
    numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(
            f"bootstrap_interval: got values of shape {numbers.shape}, {int((~np.isfinite(numbers)).sum())} "
            "of them not finite; expected at least one, all finite. Leave the others out on purpose."
        )
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"bootstrap_interval: got num_resamples={num_resamples}, level={level}; expected num_resamples "
            ">= 1 and 0 < level < 1."
        )
    generator = np.random.default_rng(seed)
    # A hundred at a time: ten thousand values take 8 MB, not 160.
    sizes = [min(100, num_resamples - start) for start in range(0, num_resamples, 100)]
    means = np.concatenate(
        [numbers[generator.integers(len(numbers), size=(size, len(numbers)))].mean(1) for size in sizes]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class McNemar(NamedTuple):
    """Examples that only one of two models gets right, and the two-sided p-value of equal models."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(a_flags: Tensor, b_flags: Tensor) -> McNemar:
    """Return McNemar's exact test of two models on the same examples (McNemar 1947).

        p = min( 1, 2 P[ X ≤ min(b, c) ] ),  X ~ Binomial(b + c, 1/2)                                      (1)

    with b examples that only the first gets right and c that only the second does. Examples on which both
    agree say nothing about a difference: on the same images this is much sharper than comparing intervals.

    Args:
        a_flags: Truth values [N], one an example.
        b_flags: The same of the other model, of the same examples in the same order.

    Raises:
        ValueError: Lengths differ.

    Example:
        >>> import torch
        >>> mcnemar(torch.tensor([1, 1, 1, 1, 1, 0]).bool(), torch.tensor([0, 0, 0, 0, 1, 0]).bool())
        McNemar(only_a=4, only_b=0, p_value=0.125)
    """
    if a_flags.shape != b_flags.shape:
        raise ValueError(
            f"mcnemar: got {tuple(a_flags.shape)} and {tuple(b_flags.shape)}; expected the same examples."
        )
    only_a, only_b = int((a_flags & ~b_flags).sum()), int((b_flags & ~a_flags).sum())
    num, term, total = only_a + only_b, 1, 1
    for k in range(min(only_a, only_b)):  # C(n, k + 1) from C(n, k), in whole numbers
        term = term * (num - k) // (k + 1)
        total += term
    return McNemar(only_a, only_b, min(1.0, 2 * total / 2**num))
