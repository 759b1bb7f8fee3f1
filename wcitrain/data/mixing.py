"""Mixing the images of a batch and their labels: mixup and CutMix, by torchvision, as a function of the seed.

    mixup:   x_b ← λ x_b + (1-λ) x_{b-1},              y_b ← λ y_b + (1-λ) y_{b-1}                        (1)
    CutMix:  a box of x_b ← the same box of x_{b-1},   y_b ← λ y_b + (1-λ) y_{b-1}                        (2)

with λ ~ Beta(α, α), one λ and one box for the whole batch. In CutMix λ is the share that is kept: the box is
clipped at the border and λ corrected. The partner is the neighbour in the batch, which has to be shuffled.
Mixing works on the micro-batch of one process: other numbers of processes or micro-batches mix other pairs.

Legend: B batch, C classes, λ share of the image itself, α concentration.
"""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from wcitrain.data.augment import seeded
from wcitrain.method import Method, NonNegative, Share, method, refuse


@method
class Mixing(Method):
    """How often and by what a batch is mixed: mixup (1710.09412), CutMix (1905.04899); by default neither.

    Raises:
        ValueError: A value outside its range, or settings that mix nothing.
    """

    mixup_alpha: NonNegative = Field(default=0.0, description="Concentration α of mixup; 0: off.")
    cutmix_alpha: NonNegative = Field(default=0.0, description="Concentration α of CutMix; 0: off.")
    probability: Share = Field(default=1.0, description="Probability that a batch is mixed, in [0, 1].")
    switch_probability: Share = Field(
        default=0.5, description="Probability of CutMix where both are on, in [0, 1]."
    )

    def __post_init__(self) -> None:
        is_set = (self.probability, self.switch_probability) != (1, 0.5)
        if self.probability == 0 or (not self._kinds and is_set):
            text = "got settings that mix nothing; expected an alpha and a probability above 0, or neither."
            refuse("probability", text)
        if len(self._kinds) == 1 and self.switch_probability != 0.5:
            text = f"got {self.switch_probability:g} with one kind of mixing; expected both alphas above 0."
            refuse("switch_probability", text)

    def __str__(self) -> str:
        return " + ".join(self._kinds) or "none"

    @property
    def _kinds(self) -> list[str]:
        """The names of what is on."""
        return ["mixup"] * (self.mixup_alpha > 0) + ["CutMix"] * (self.cutmix_alpha > 0)

    @property
    def is_active(self) -> bool:
        """Whether a batch is ever mixed."""
        return bool(self._kinds)

    def apply(self, x: Tensor, y: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft labels; torch's global random state is left alone.

        Args:
            x: Images, floating point [B, *, H, W]; not modified.
            y: Labels, int64 [B] in 0 .. num_classes - 1, on the device of ``x``.
            num_classes: C.
            seed: 63-bit seed; equal seeds mix equal batches equally, on every device.

        Returns:
            ``x`` as it came or mixed, and float32 [B, C] on its device, each row of sum 1: one-hot where
            nothing is mixed.

        Raises:
            ValueError: ``x`` is not a batch of floating-point images, or ``y`` is not one whole number each.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"mixing: got images {x.dtype} {list(x.shape)}; expected floating point [B, C, H, W]."
            )
        if y.shape != x.shape[:1] or y.is_floating_point():
            raise ValueError(
                f"mixing: got labels {y.dtype} {list(y.shape)} for {len(x)} images; expected whole numbers "
                f"[{len(x)}]. Mix before anything else makes labels soft."
            )
        if self.is_active and len(x) < 2:
            raise ValueError("mixing: got a batch of 1 image; expected a partner. Use larger micro-batches.")
        with seeded(seed):
            if self.is_active and float(torch.rand(())) < self.probability:
                return self._choose(num_classes)(x, y)
        return x, functional.one_hot(y, num_classes).float()

    def _choose(self, num_classes: int) -> v2.Transform:
        """Return mixup or CutMix."""
        use_cutmix = self.cutmix_alpha > 0
        if len(self._kinds) == 2:
            use_cutmix = float(torch.rand(())) < self.switch_probability
        if use_cutmix:
            return v2.CutMix(alpha=self.cutmix_alpha, num_classes=num_classes)
        return v2.MixUp(alpha=self.mixup_alpha, num_classes=num_classes)
