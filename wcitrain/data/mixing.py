"""Mixing the images of a batch and their labels: mixup and CutMix, by torchvision, as a function of the seed.

    mixup:   x_b ← λ x_b + (1-λ) x_{b-1},              y_b ← λ y_b + (1-λ) y_{b-1}                                (1)
    CutMix:  a box of x_b ← the same box of x_{b-1},   y_b ← λ y_b + (1-λ) y_{b-1},  λ the share that is kept      (2)

with λ ~ Beta(α, α), one λ and one box for the whole batch (in CutMix the box is clipped at the border and λ corrected).
The partner is the neighbour in the batch, which has to be shuffled. Mixing needs the images of one process only, so it
works on that process's micro-batch: other numbers of processes or micro-batches mix other pairs.

Legend: B batch, C classes, λ share of the image itself, α concentration.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from wcitrain.data.augment import seeded


@dataclass(frozen=True)
class Mixing:
    """How often and by what a batch is mixed; the default is not at all.

    Attributes:
        mixup_alpha: α of mixup (1710.09412), at least 0; 0 is off.
        cutmix_alpha: α of CutMix (1905.04899), at least 0; 0 is off.
        probability: That a batch is mixed at all, in [0, 1].
        switch_probability: That a mixed batch is cut rather than blended, in [0, 1]; used when both are on.

    Raises:
        ValueError: A value outside its range; the recipe key is named.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5

    def __post_init__(self) -> None:
        for key in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(
                    f"mixing.{key}: got {getattr(self, key)}; expected a number, at least 0. Use 0 to turn it off."
                )
        for key in ("probability", "switch_probability"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"mixing.{key}: got {getattr(self, key)}; expected 0 to 1. Change it.")

    @property
    def is_active(self) -> bool:
        """Whether a batch is ever mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def apply(self, x: Tensor, y: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft labels; torch's global random state is left alone.

        Args:
            x: Images, floating point [B, *, H, W]; not modified.
            y: Labels, int64 [B] in 0 .. num_classes - 1, on the device of ``x``.
            num_classes: C.
            seed: 63-bit seed; equal seeds mix equal batches equally, on every device.

        Returns:
            ``x`` as it came or mixed, and float32 [B, C] on its device, each row of sum 1: one-hot where nothing is mixed.

        Raises:
            ValueError: ``x`` is not a batch of floating-point images, or ``y`` is not one whole number each.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"mixing: got images {x.dtype} {list(x.shape)}; expected floating point [B, C, H, W]. Scale the batch first."
            )
        if y.shape != x.shape[:1] or y.is_floating_point():
            raise ValueError(
                f"mixing: got labels {y.dtype} {list(y.shape)} for {len(x)} images; expected whole numbers [{len(x)}]. "
                "Mix before anything else makes labels soft."
            )
        if self.is_active and len(x) < 2:
            raise ValueError("mixing: got a batch of 1 image; expected a partner for it. Use larger micro-batches.")
        with seeded(seed):
            if self.is_active and float(torch.rand(())) < self.probability:
                return self._choose(num_classes)(x, y)
        return x, functional.one_hot(y, num_classes).float()

    def _choose(self, num_classes: int) -> v2.Transform:
        """Return mixup or CutMix."""
        use_cutmix = self.cutmix_alpha > 0
        if use_cutmix and self.mixup_alpha > 0:
            use_cutmix = float(torch.rand(())) < self.switch_probability
        if use_cutmix:
            return v2.CutMix(alpha=self.cutmix_alpha, num_classes=num_classes)
        return v2.MixUp(alpha=self.mixup_alpha, num_classes=num_classes)
