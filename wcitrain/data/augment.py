"""Augmentation of one image at a time, by torchvision's transforms, as a function of the image and of a seed.

    pixels  ->  crop and mirror (``loader``)  ->  policy  ->  cutout                                              (1)

Which operations exist and how strong they are is torchvision's; this file names them, checks the settings, and takes
care that nothing else is touched: the operations draw from torch's global generator, which is seeded for one image and
put back. An augmented image is therefore the same in every worker process, on every rank and after every resume.

Legend: C channels, H and W pixels, s side of the erased square.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms import v2

Policy = Literal["none", "cutout", "autoaugment", "randaugment", "trivialaugment", "idbh"]


@dataclass(frozen=True)
class Augmentation:
    """What happens to an image after crop and mirror; the default is nothing.

    Places that an operation leaves empty become black (0). Sizes of shifts are fractions of the image.

    Attributes:
        policy: "none"; "cutout": only the square of ``cutout_size``; "autoaugment": the policy that AutoAugment
            (1805.09501) found for CIFAR-10; "randaugment" (1909.13719): ``num_ops`` random operations of strength
            ``magnitude``; "trivialaugment" (2103.10158): one operation of a random, wide strength; "idbh": a shift by up
            to a sixth of the image, one RandAugment operation of magnitude 9, and with probability 1/2 an erased
            rectangle of 2 to 33 % of the image. The last resembles the augmentation of Li & Spratling (2301.09879) for
            adversarial training in kind and strength, out of torchvision's parts; it is not theirs. Its shift replaces
            ``crop_padding``.
        magnitude: Strength of "randaugment", 0 to 30; None is 9. For no other policy.
        num_ops: Operations of "randaugment", at least 1; None is 2. For no other policy.
        cutout_size: Side s in pixels of a black square, after any policy but "none"; None is no square. As in DeVries &
            Taylor (1708.04552) its centre may be anywhere and what lies outside of the image is lost, so that less than
            s² pixels are erased on average; torchvision's RandomErasing, which "idbh" uses, stays inside.
        probability: Of an image to be augmented at all, in (0, 1]; applies to policy and square together.

    Raises:
        ValueError: A value outside its range, or one that would have no effect; the recipe key is named.
    """

    policy: Policy = "none"
    magnitude: int | None = None
    num_ops: int | None = None
    cutout_size: int | None = None
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ValueError(
                f"augment.policy: got {self.policy!r}; expected one of {', '.join(get_args(Policy))}. Choose one."
            )
        if self.policy != "randaugment" and (self.magnitude, self.num_ops) != (None, None):
            raise ValueError(
                f"augment.magnitude, augment.num_ops: got {self.magnitude}, {self.num_ops} for policy {self.policy}; "
                "expected None, as only randaugment has them. Remove them."
            )
        if self.magnitude is not None and not 0 <= self.magnitude <= 30:
            raise ValueError(f"augment.magnitude: got {self.magnitude}; expected 0 to 30. Change it.")
        if self.num_ops is not None and self.num_ops < 1:
            raise ValueError(f"augment.num_ops: got {self.num_ops}; expected at least 1. Raise it or use policy none.")
        if self.cutout_size is not None and self.cutout_size < 1:
            raise ValueError(
                f"augment.cutout_size: got {self.cutout_size}; expected at least 1 pixel. Use None for no square."
            )
        if self.policy == "cutout" and self.cutout_size is None:
            raise ValueError("augment.cutout_size: got None; expected the side of the square in pixels. Set it.")
        if self.policy == "none" and self.cutout_size is not None:
            raise ValueError(
                f"augment.cutout_size: got {self.cutout_size} for policy none; expected None. Use policy cutout."
            )
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"augment.probability: got {self.probability}; expected more than 0 and at most 1. Use policy none for 0."
            )
        if self.policy == "none" and self.probability != 1:
            raise ValueError(
                f"augment.probability: got {self.probability} for policy none; expected 1, as nothing happens. Remove it."
            )

    @property
    def is_active(self) -> bool:
        """Whether anything happens to an image."""
        return self.policy != "none"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless images of ``shape`` (C, H, W) can be augmented."""
        channels, height, width = shape
        if self.is_active and channels not in (1, 3):
            raise ValueError(
                f"augment.policy: got {self.policy} for images of {channels} channels; expected gray or RGB images. Use none."
            )
        if self.cutout_size is not None and self.cutout_size > min(height, width):
            raise ValueError(
                f"augment.cutout_size: got {self.cutout_size} for images of {height}x{width} pixels; expected at most "
                f"{min(height, width)}. Lower it."
            )

    def apply(self, pixels: Tensor, seed: int) -> Tensor:
        """Return one augmented image; torch's, NumPy's and Python's global random states are left alone.

        Args:
            pixels: uint8 [C, H, W] on the CPU, 255 is white; not modified.
            seed: 63-bit seed; equal seeds augment equal images equally.

        Returns:
            uint8 [C, H, W].

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
    steps: list[Any] = {
        "cutout": lambda: [],
        "autoaugment": lambda: [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
        "randaugment": lambda: [v2.RandAugment(_or(augmentation.num_ops, 2), _or(augmentation.magnitude, 9))],
        "trivialaugment": lambda: [v2.TrivialAugmentWide()],
        "idbh": lambda: [
            v2.RandomAffine(degrees=0, translate=(1 / 6, 1 / 6)),
            v2.RandAugment(num_ops=1, magnitude=9),
            v2.RandomErasing(p=0.5),
        ],
    }[augmentation.policy]()
    if augmentation.cutout_size is not None:
        steps += _cutout(augmentation.cutout_size, *shape[1:])
    return v2.RandomApply(steps, p=augmentation.probability)


def _cutout(side: int, height: int, width: int) -> list[Any]:
    """Return what erases a square with its centre anywhere: pad by half a side, erase inside, cut the padding off."""
    half = side // 2
    share = side**2 / ((height + 2 * half) * (width + 2 * half))
    erase = v2.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0), value=0)
    return [v2.Pad(half), erase, v2.CenterCrop((height, width))]


def _or(value: int | None, default: int) -> int:
    """Return ``value``, or ``default`` for None."""
    return default if value is None else value
