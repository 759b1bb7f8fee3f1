"""What happens to a training batch as a whole, as a function of the seed: label noise, then mixup or CutMix.

    noise:   y_b ← y_b with probability 1-τ, else a class drawn uniformly                                 (1)
    mixup:   x_b ← λ x_b + (1-λ) x_{b-1},              y_b ← λ y_b + (1-λ) y_{b-1}                        (2)
    CutMix:  a box of x_b ← the same box of x_{b-1},   y_b ← λ y_b + (1-λ) y_{b-1}                        (3)

Noise is a function of the seed and the image (and the epoch): no state, no order, equal on every device.

λ ~ Beta(α, α), one λ and one box for the whole batch. In CutMix λ is the share that is kept: the box is
clipped at the border and λ corrected. The partner is the neighbour in the batch, which has to be shuffled.
Mixing works on the micro-batch of one process: other numbers of processes or micro-batches mix other pairs.

Legend: B batch, C classes, λ share of the image itself, α concentration, τ share of noise.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from wcitrain.data.augment import seeded
from wcitrain.method import Method, NonNegative, Share, method, refuse, setting
from wcitrain.seeding import seed_from

UNIT = 1 << 53  # hashes are compared as whole numbers below it: float64 does not exist on every device


@method
class LabelNoise(Method):
    """Symmetric label noise (1); by default none.

    Without ``exclude_true`` a class is drawn from all C, so that a share τ (1 - 1/C) of the labels is wrong;
    with it from the C - 1 others, so that a share τ is, "symmetric" in the other reading of the word.
    """

    share: Share = setting(0.0, "Probability that a label is drawn anew, in [0, 1].")
    resample: bool = setting(True, "Draw anew in every epoch; false fixes the noise.")
    exclude_true: bool = setting(False, "Draw from the other classes only.")
    label: ClassVar[str] = "label noise {share:g}"

    def __post_init__(self) -> None:
        if self.share == 0 and (self.exclude_true or not self.resample):
            refuse("share", "got 0 beside other keys of label_noise; expected more than 0. Set it.")

    def apply(self, y: Tensor, index: Tensor, num_classes: int, *, seed: int, epoch: int) -> Tensor:
        """Return labels ``y``, int64 [B], of which a share is replaced by random ones, by (1).

        ``index``, int64 [B], tells the images apart, as ``Batch.index``; it may be negative. That of a
        `StreamSet` counts images of an epoch and names none: resample, and give the rank's seed.
        """
        draw = epoch if self.resample else None
        is_noisy = _uniform(index, UNIT, seed, "label noise", draw) < math.ceil(self.share * UNIT)
        drawn = _uniform(index, num_classes - self.exclude_true, seed, "label", draw)
        return torch.where(is_noisy, (y + 1 + drawn) % num_classes if self.exclude_true else drawn, y)


def _uniform(index: Tensor, n: int, *where: object) -> Tensor:
    """Return a number of 0 .. n - 1 for every index, int64 like it, from a seed that names ``where``.

    The finaliser of splitmix64 (Steele, Lea & Flood 2014) of index + seed: int64 products wrap around like
    unsigned ones. Modulo favours small numbers by less than n / 2^62.
    """
    wrap = 1 << 64  # an unsigned constant less this is the int64 of the same bits
    z = index * (0x9E3779B97F4A7C15 - wrap) + seed_from(*where)
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - wrap)
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - wrap)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 2) % n


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@method
class Mixing(Method):
    """How often and by what a batch is mixed: mixup (1710.09412), CutMix (1905.04899); by default neither."""

    mixup_alpha: NonNegative = setting(0.0, "Concentration α of mixup; 0: off.")
    cutmix_alpha: NonNegative = setting(0.0, "Concentration α of CutMix; 0: off.")
    probability: Share = setting(1.0, "Probability that a batch is mixed, in [0, 1].")
    switch_probability: Share = setting(0.5, "Probability of CutMix where both are on, in [0, 1].")

    def __post_init__(self) -> None:
        if self.probability == 0 or (not self.is_active and self.probability != 1):
            text = "got settings that mix nothing; expected an alpha and a probability above 0, or neither."
            refuse("probability", text)
        if not (self.mixup_alpha and self.cutmix_alpha) and self.switch_probability != 0.5:
            got = f"got {self.switch_probability:g} without two kinds of mixing"
            refuse("switch_probability", f"{got}; expected both alphas above 0.")

    def __str__(self) -> str:
        kinds = ["mixup"] * (self.mixup_alpha > 0) + ["CutMix"] * (self.cutmix_alpha > 0)
        return " + ".join(kinds) or "none"

    @property
    def is_active(self) -> bool:
        """Whether a batch is ever mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def apply(self, x: Tensor, y: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return images ``x`` (float [B, *, H, W]) as they came or mixed, and their labels as float32 [B, C].

        The labels ``y``, int64 [B], become rows of sum 1, one-hot where nothing is mixed. Equal 63-bit seeds
        mix equal batches equally, on every device; torch's global random state is left alone.
        """
        if self.is_active and len(x) < 2:
            raise ValueError("mixing: got a batch of 1 image; expected a partner. Use larger micro-batches.")
        with seeded(seed):
            if self.is_active and float(torch.rand(())) < self.probability:
                use_cutmix = self.cutmix_alpha > 0
                if use_cutmix and self.mixup_alpha > 0:
                    use_cutmix = float(torch.rand(())) < self.switch_probability
                if use_cutmix:
                    return v2.CutMix(alpha=self.cutmix_alpha, num_classes=num_classes)(x, y)
                return v2.MixUp(alpha=self.mixup_alpha, num_classes=num_classes)(x, y)
        return x, functional.one_hot(y, num_classes).float()
