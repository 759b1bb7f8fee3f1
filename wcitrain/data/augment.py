"""What happens to a training image, as a function of the image and of a seed.

    pixels  ->  crop and mirror  ->  policy  ->  cutout

Policies are torchvision's transforms. They draw from torch's global generator, which is seeded for one image
and put back: an augmented image is the same in every worker process, on every rank and after every resume.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from wcitrain.method import Method, PositiveCount, PositiveShare, method, refuse, setting, show
from wcitrain.seeding import generator_from


@dataclass(frozen=True)
class Crops:
    """Where each of N images is cropped and whether it is mirrored."""

    shift: Tensor  # int64 [N, 2]: top and left of the crop in the padded image
    mirror: Tensor  # bool [N]
    padding: int  # zeros on every side

    @classmethod
    def draw(cls, num: int, padding: int, flip: bool, *where: object) -> "Crops":
        """Draw shifts, uniform on 0 .. 2 ``padding``, and fair mirrors from a seed that names ``where``."""
        shifts, coins = generator_from("cpu", *where, "shift"), generator_from("cpu", *where, "mirror")
        shift = torch.randint(0, 2 * padding + 1, (num, 2), generator=shifts)
        return cls(shift, (torch.rand(num, generator=coins) < 0.5) & flip, padding)

    def __getitem__(self, rows: Tensor | list[int]) -> "Crops":
        return Crops(self.shift[rows], self.mirror[rows], self.padding)

    def apply(self, pixels: Tensor) -> Tensor:
        """Return every image of ``pixels`` [N, C, H, W] padded, cropped back to its size and mirrored.

        One gather, no loop over images:

            out[b, c, i, j] = padded[b, c, top_b + i, left_b + (W-1-j if mirror_b else j)]                 (1)
        """
        (n, c, h, w), device = pixels.shape, pixels.device
        shift, mirror = self.shift.to(device), self.mirror.to(device)
        i, j = torch.arange(h, device=device), torch.arange(w, device=device)
        top = shift[:, :1] + i  # [N, H]
        left = shift[:, 1:] + torch.where(mirror[:, None], j.flip(0), j)  # [N, W]
        image = torch.arange(n, device=device)[:, None, None, None]
        channel = torch.arange(c, device=device)[:, None, None]
        padded = functional.pad(pixels, [self.padding] * 4)
        return padded[image, channel, top[:, None, :, None], left[:, None, None, :]]  # (1)


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
    """

    policy: Literal["none", "cutout", "autoaugment", "randaugment", "trivialaugment", "idbh"] = setting(
        "none", "Kind of augmentation."
    )
    magnitude: Annotated[int, Field(ge=0, le=30)] | None = setting(None, "Strength of randaugment; null: 9.")
    num_ops: PositiveCount | None = setting(None, "Operations of randaugment; null: 2.")
    cutout_size: PositiveCount | None = setting(
        None, "Side of the black square after any policy, in pixels; null: none."
    )
    probability: PositiveShare = setting(1.0, "Share of images on which policy and square act, in (0, 1].")
    label: ClassVar[str] = "{policy}"

    def __post_init__(self) -> None:
        unused: dict[str, int | None] = {"magnitude": None, "num_ops": None}
        if self.policy == "randaugment":
            unused = {}
        elif not self.is_active:
            unused |= {"cutout_size": None, "probability": 1}
        for key, default in unused.items():
            if (value := getattr(self, key)) != default:
                text = f"got {value:g} with policy {self.policy}, which does not use it; expected"
                refuse(key, f"{text} {show(default)}. Remove it, or choose another policy.")
        if self.policy == "cutout" and self.cutout_size is None:
            refuse("cutout_size", "got null with policy cutout; expected the square's side. Set it.")

    @property
    def is_active(self) -> bool:
        """Whether anything happens to an image."""
        return self.policy != "none"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless images of ``shape`` (C, H, W) can be augmented."""
        if self.is_active and shape[0] not in (1, 3):
            text = f"got {self.policy} for images of {shape[0]} channels; expected 1 or 3."
            raise ValueError(f"augment.policy: {text} Use policy none.")
        if self.cutout_size is not None and self.cutout_size > (side := min(shape[1:])):
            text = f"got {self.cutout_size} for images of {shape[1]}x{shape[2]} pixels"
            raise ValueError(f"augment.cutout_size: {text}; expected at most {side}. Lower it.")

    def apply(self, pixels: Tensor, seed: int) -> Tensor:
        """Return one augmented image, uint8 [C, H, W] of 255 levels; equal seeds augment equally."""
        if not self.is_active:
            return pixels
        with seeded(seed):
            return _transform(self, tuple(pixels.shape))(pixels)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's global CPU generator draw from ``seed``, and put it back on exit; CUDA's is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's generators too
        yield


@lru_cache(maxsize=16)
def _transform(augmentation: Augmentation, shape: tuple[int, ...]) -> v2.Transform:
    """Return the transform of images of one shape."""
    magnitude = 9 if augmentation.magnitude is None else augmentation.magnitude
    shift = v2.RandomAffine(degrees=0, translate=(1 / 6, 1 / 6))
    steps: list[Any] = {
        "cutout": [],
        "autoaugment": [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
        "randaugment": [v2.RandAugment(augmentation.num_ops or 2, magnitude)],
        "trivialaugment": [v2.TrivialAugmentWide()],
        "idbh": [shift, v2.RandAugment(num_ops=1, magnitude=9), v2.RandomErasing(p=0.5)],
    }[augmentation.policy]
    if side := augmentation.cutout_size:  # centred anywhere: pad by half a side, erase, cut the padding
        height, width, half = *shape[1:], side // 2
        share = side**2 / ((height + 2 * half) * (width + 2 * half))
        erase = v2.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0), value=0)
        steps += [v2.Pad(half), erase, v2.CenterCrop((height, width))]
    return v2.RandomApply(steps, p=augmentation.probability)
