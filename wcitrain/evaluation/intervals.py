"""Intervals of shares."""

import math


def wilson_interval(share: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a binomial share observed on ``num`` examples (95 % for z = 1.96).

    ( p + z²/2n ± z sqrt( p(1−p)/n + z²/4n² ) ) / (1 + z²/n)
    """
    centre = share + z * z / (2 * num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
