"""Augmentation of one image at a time, by torchvision's transforms, as a function of the image and of a seed.

    pixels  ->  crop and mirror (``loader``)  ->  policy  ->  cutout

Which operations exist and how strong they are is torchvision's; this file names them, checks the settings,
and takes care that nothing else is touched: the operations draw from torch's global generator, which is
seeded for one image and put back. An augmented image is therefore the same in every worker process, on every
rank and after every resume.

Legend: C channels, H and W pixels, s side of the erased square.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import v2

from wcitrain.method import Method, PositiveCount, PositiveShare, method, refuse


@method
class Augmentation(Method):
    """What happens to an image after crop and mirror; the default is nothing.

    Places that an operation leaves empty become black (0). Sizes of shifts are fractions of the image.

    * ``cutout``: only the square of ``cutout_size``. As in DeVries & Taylor (1708.04552) its centre may be
      anywhere and what lies outside of the image is lost, so that less than s² pixels are erased on average;
      torchvision's RandomErasing, which ``idbh`` uses, stays inside.
    * ``autoaugment``: the policy that AutoAugment (1805.09501) found for CIFAR-10.
    * ``randaugment`` (1909.13719): ``num_ops`` random operations of strength ``magnitude``.
    * ``trivialaugment`` (2103.10158): one operation of a random, wide strength.
    * ``idbh``: a shift by up to a sixth of the image, one RandAugment operation of magnitude 9, and with
      probability 1/2 an erased rectangle of 2 to 33 % of the image. It resembles the augmentation of Li &
      Spratling (2301.09879) for adversarial training in kind and strength, out of torchvision's parts; it is
      not theirs. Its shift replaces ``crop_padding``.

    Raises:
        ValueError: A value outside its range, or one that would have no effect.
    """

    policy: Literal["none", "cutout", "autoaugment", "randaugment", "trivialaugment", "idbh"] = Field(
        default="none", description="Kind of augmentation."
    )
    magnitude: Annotated[int, Field(ge=0, le=30)] | None = Field(
        default=None, description="Strength of randaugment, 0 to 30; null: 9."
    )
    num_ops: PositiveCount | None = Field(default=None, description="Operations of randaugment; null: 2.")
    cutout_size: PositiveCount | None = Field(
        default=None, description="Side of the black square after any policy, in pixels; null: none."
    )
    probability: PositiveShare = Field(
        default=1.0, description="Probability that policy and square act on an image, in (0, 1]."
    )
    label: ClassVar[str] = "{policy}"

    def __post_init__(self) -> None:
        for key in ("magnitude", "num_ops"):
            if self.policy != "randaugment" and (value := getattr(self, key)) is not None:
                refuse(key, f"got {value} with policy {self.policy}; expected null: only randaugment has it.")
        if self.policy == "cutout" and self.cutout_size is None:
            refuse("cutout_size", "got null with policy cutout; expected the square's side. Set it.")
        if self.policy == "none" and self.cutout_size is not None:
            text = f"got {self.cutout_size} with policy none; expected null. Use policy cutout."
            refuse("cutout_size", text)
        if self.policy == "none" and self.probability != 1:
            text = f"got {self.probability:g} with policy none; expected 1, as nothing happens. Remove it."
            refuse("probability", text)

    @property
    def is_active(self) -> bool:
        """Whether anything happens to an image."""
        return self.policy != "none"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless images of ``shape`` (C, H, W) can be augmented."""
        channels, height, width = shape
        if self.is_active and channels not in (1, 3):
            raise ValueError(
                f"augment.policy: got {self.policy} for images of {channels} channels; expected 1 or 3."
            )
        if self.cutout_size is not None and self.cutout_size > min(height, width):
            raise ValueError(
                f"augment.cutout_size: got {self.cutout_size} for images of {height}x{width} pixels; "
                f"expected at most {min(height, width)}. Lower it."
            )

    def apply(self, pixels: Tensor, seed: int) -> Tensor:
        """Return one augmented image; torch's, NumPy's and Python's global random states are left alone.

        Args:
            pixels: uint8 [C, H, W] on the CPU, 255 is white; not modified.
            seed: 63-bit seed; equal seeds augment equal images equally.

        Raises:
            ValueError: The shape cannot be augmented; see ``check``.
        """
        if not self.is_active:
            return pixels
        with seeded(seed):
            return _transform(self, tuple(pixels.shape))(pixels)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's global CPU generator draw from ``seed``, and put it back on exit; CUDA's is not touched."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's generators too
    try:
        yield
    finally:
        torch.set_rng_state(state)


@lru_cache(maxsize=16)
def _transform(augmentation: Augmentation, shape: tuple[int, ...]) -> v2.Transform:
    """Return the transform of images of one shape."""
    augmentation.check(shape)
    magnitude = 9 if augmentation.magnitude is None else augmentation.magnitude
    shift = v2.RandomAffine(degrees=0, translate=(1 / 6, 1 / 6))
    steps: list[Any] = {
        "cutout": [],
        "autoaugment": [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
        "randaugment": [v2.RandAugment(augmentation.num_ops or 2, magnitude)],
        "trivialaugment": [v2.TrivialAugmentWide()],
        "idbh": [shift, v2.RandAugment(num_ops=1, magnitude=9), v2.RandomErasing(p=0.5)],
    }[augmentation.policy]
    if augmentation.cutout_size is not None:
        steps += _cutout(augmentation.cutout_size, *shape[1:])
    return v2.RandomApply(steps, p=augmentation.probability)


def _cutout(side: int, height: int, width: int) -> list[Any]:
    """Return what erases a square with its centre anywhere: pad by half a side, erase, cut the padding."""
    half = side // 2
    share = side**2 / ((height + 2 * half) * (width + 2 * half))
    erase = v2.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0), value=0)
    return [v2.Pad(half), erase, v2.CenterCrop((height, width))]
