"""Symmetric label noise, a function of (seed, image[, epoch]): no state, no order, equal on every device.

    y' = y with probability 1 - τ,  else a class drawn uniformly                                          (1)

Legend: N labels, C classes, τ share.
"""

import math

import torch
from torch import Tensor

from wcitrain.seeding import seed_from

UNIT = 1 << 53  # hashes are compared as whole numbers below it: float64 does not exist on every device


def noisy_labels(
    y: Tensor,
    index: Tensor,
    *,
    share: float,
    num_classes: int,
    seed: int,
    epoch: int | None = None,
    exclude_true: bool = False,
) -> Tensor:
    """Return labels of which a share is replaced by random ones, equation (1).

    Args:
        y: Labels, int64 [N] in 0 .. num_classes - 1; not modified.
        index: What tells the images apart, int64 [N], as in ``Batch.index`` of an ``ImageSet`` or a
            ``MixedSet``; may be negative. That of a ``StreamSet`` counts images of an epoch and names none:
            give ``epoch`` and the rank's seed.
        share: τ, the probability that a label is drawn anew, in [0, 1].
        num_classes: C, at least 2.
        seed: Seed of the noise.
        epoch: Draw anew in each epoch, which smooths labels on average; None fixes the noise for the whole
            training, so that it can be memorised.
        exclude_true: Draw from the C - 1 other classes, so that a share τ of the labels is wrong ("symmetric"
            in the other reading of the word). False: from all C, so that a share τ (1 - 1/C) is wrong.

    Raises:
        ValueError: ``share`` or ``num_classes`` is outside its range, or the shapes differ.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"label_noise.share: got {share}; expected 0 to 1. Change it.")
    if num_classes < 2:
        raise ValueError(f"label_noise: got {num_classes} classes; expected at least 2. Use no label noise.")
    if y.shape != index.shape:
        raise ValueError(
            f"noisy_labels: got labels {list(y.shape)} and indices {list(index.shape)}; expected the same."
        )
    is_noisy = _uniform(index, UNIT, seed, "label noise", epoch) < math.ceil(share * UNIT)
    if exclude_true:
        drawn = (y + 1 + _uniform(index, num_classes - 1, seed, "label", epoch)) % num_classes
    else:
        drawn = _uniform(index, num_classes, seed, "label", epoch)
    return torch.where(is_noisy, drawn, y)


def _uniform(index: Tensor, n: int, *where: object) -> Tensor:
    """Return a number of 0 .. n - 1 for every index, int64 like it, from a seed that names ``where``.

    The finaliser of splitmix64 (Steele, Lea & Flood 2014) of index + seed: int64 products wrap around like
    unsigned ones. Modulo favours small numbers by less than n / 2^62.
    """
    z = index * _signed(0x9E3779B97F4A7C15) + _signed(seed_from(*where))
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 2) % n


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(z: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit number."""
    return z - (1 << 64) if z >= 1 << 63 else z
