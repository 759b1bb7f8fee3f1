"""What happens to training images and labels, each a function of what it acts on and of a seed.

    image:   file  ->  pixels or random resized crop  ->  shift and mirror  ->  policy  ->  cutout
    noise:   y_b ← y_b with probability 1-τ, else a class drawn uniformly                                 (1)
    mixup:   x_b ← λ x_b + (1-λ) x_{b-1},              y_b ← λ y_b + (1-λ) y_{b-1}                        (2)
    CutMix:  a box of x_b ← the same box of x_{b-1},   y_b ← λ y_b + (1-λ) y_{b-1}                        (3)

Policies and mixing are torchvision's, policy timm and the resized crop timm's. They draw from the global
generators of torch, NumPy and Python, which are seeded for one image or batch and put back: the result is the
same in every worker process, on every rank and after every resume.

λ ~ Beta(α, α), one λ and one box for the whole batch, a micro-batch of one process, which has to be shuffled.
In CutMix λ is the share that is kept: the box is clipped at the border and λ corrected.

Legend: B batch, C classes, λ share of the image itself, α concentration, τ share of noise.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from wcitrain.method import Method, NonNegative, PositiveCount, PositiveShare, Share, method, refuse, setting
from wcitrain.seeding import generator_from, seed_from

Policy = Literal["none", "cutout", "autoaugment", "randaugment", "trivialaugment", "idbh", "timm"]
RAND = r"^rand(-(m|n|inc|mmax)\d+|-(p|mstd)\d+(\.\d+)?)*$"  # parts that timm reads; it passes over others
UNIT = 1 << 53  # hashes are compared as whole numbers below it: float64 does not exist on every device


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let the global CPU generators draw from ``seed``, and put them back on exit; CUDA's is not touched."""
    with torch.random.fork_rng(devices=[]), ExitStack() as at_exit:
        at_exit.callback(random.setstate, random.getstate())
        at_exit.callback(np.random.set_state, np.random.get_state())
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA's generators too
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def resized_crop(
    image: Image.Image, seed: int, size: Sequence[int], scale: tuple[float, float]
) -> Image.Image:
    """Return timm's random resized crop of size (H, W): an area share in ``scale``, 3:4 to 4:3, bicubic."""
    with seeded(seed):
        return RandomResizedCropAndInterpolation(size, scale, interpolation="bicubic")(image)


def draw_crops(num: int, padding: int, flip: bool, *where: object) -> Tensor:
    """Return top, left (uniform on 0 .. 2 ``padding``) and mirror (0 or 1, fair) of N crops, int64 [N, 3]."""
    shifts, coins = generator_from("cpu", *where, "shift"), generator_from("cpu", *where, "mirror")
    shift = torch.randint(0, 2 * padding + 1, (num, 2), generator=shifts)
    mirror = (torch.rand(num, generator=coins) < 0.5) & flip
    return torch.cat([shift, mirror[:, None]], 1)


def crop(pixels: Tensor, crops: Tensor, padding: int) -> Tensor:
    """Return images [N, C, H, W] padded with zeros, cropped back to their size and mirrored, in one gather.

    out[b, c, i, j] = padded[b, c, top_b + i, left_b + (W-1-j if mirror_b else j)]
    """
    (n, c, h, w), device = pixels.shape, pixels.device
    top, left, mirror = crops.to(device)[:, :, None].unbind(1)  # [N, 1] each
    i, j = torch.arange(h, device=device), torch.arange(w, device=device)
    row, column = top + i, left + torch.where(mirror > 0, j.flip(0), j)
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(c, device=device)[:, None, None]
    padded = functional.pad(pixels, [padding] * 4)
    return padded[image, channel, row[:, None, :, None], column[:, None, None, :]]


@method
class Augmentation(Method):
    """What happens to an image, after crop and mirror, by default nothing; empty places become black (0).

    * ``cutout``: only the square of ``cutout_size``. As in DeVries & Taylor (1708.04552) its centre may be
      anywhere and what lies outside of the image is lost, so that less than s² pixels are erased on average.
    * ``autoaugment``: the policy that AutoAugment (1805.09501) found for CIFAR-10.
    * ``randaugment`` (1909.13719): ``num_ops`` random operations of strength ``magnitude``.
    * ``trivialaugment`` (2103.10158): one operation of a random, wide strength.
    * ``idbh``: a shift by up to a sixth, one RandAugment operation of magnitude 9, with probability 1/2 an
      erased rectangle of 2 to 33 %: not that of Li & Spratling (2301.09879), but of its kind and strength.
    * ``timm``: the RandAugment that ``config`` names in timm's words, such as rand-m9-mstd0.5-inc1.
    """

    policy: Policy = setting("none", "Kind of augmentation.")
    magnitude: Annotated[int, Field(ge=0, le=30)] | None = setting(None, "Strength of randaugment; null: 9.")
    num_ops: PositiveCount | None = setting(None, "Operations of randaugment; null: 2.")
    crop_scale: Annotated[tuple[PositiveShare, PositiveShare], Field(strict=False)] | None = setting(
        None, "Area shares, [0.08, 1] say, of a random crop of the stored image, resized; null: none."
    )
    config: Annotated[str, Field(pattern=RAND)] | None = setting(None, "RandAugment of policy timm.")
    cutout_size: PositiveCount | None = setting(None, "Side of a last black square, in pixels; null: none.")
    probability: PositiveShare = setting(1.0, "Share of images on which policy and square act, in (0, 1].")
    label: ClassVar[str] = "{policy}"

    def __post_init__(self) -> None:
        unused = [key for key in ("magnitude", "num_ops") if self.policy != "randaugment"]
        unused += [key for key in ("cutout_size", "probability") if self.policy == "none"]
        for key in unused:
            if getattr(self, key) != (1.0 if key == "probability" else None):
                got = f"got {getattr(self, key):g} with policy {self.policy}, which does not use it"
                refuse(key, f"{got}; expected the default. Remove it, or choose another policy.")
        if self.crop_scale and self.crop_scale[0] > self.crop_scale[1]:
            refuse("crop_scale", f"got {list(self.crop_scale)}; expected the smaller share first. Turn them.")
        if (self.policy == "timm") != bool(self.config):
            refuse("config", f"got {self.config} with policy {self.policy}; expected it with timm. Set both.")
        if self.policy == "cutout" and self.cutout_size is None:
            refuse("cutout_size", "got null with policy cutout; expected the square's side. Set it.")

    @property
    def is_active(self) -> bool:
        """Whether anything happens to an image."""
        return self.policy != "none" or self.crop_scale is not None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless images of ``shape`` (C, H, W) can be augmented."""
        channels, height, width = shape
        if self.is_active and channels not in ((3,) if self.policy == "timm" else (1, 3)):
            got = f"got {self.policy} for images of {channels} channels"
            raise ValueError(f"augment.policy: {got}; expected 3 (but for timm: or 1). Use policy none.")
        if self.cutout_size is not None and self.cutout_size > min(height, width):
            got = f"got {self.cutout_size} for images of {height}x{width} pixels"
            raise ValueError(f"augment.cutout_size: {got}; expected at most their side. Lower it.")

    def apply(self, pixels: Tensor, seed: int) -> Tensor:
        """Return one augmented image, uint8 [C, H, W] of 255 levels; equal seeds augment equally."""
        if self.policy == "none":
            return pixels
        with seeded(seed):
            return _transform(self, *pixels.shape[1:])(pixels)


@lru_cache(maxsize=16)
def _transform(augmentation: Augmentation, height: int, width: int) -> v2.Transform:
    """Return the transform of images of one shape."""
    magnitude = 9 if augmentation.magnitude is None else augmentation.magnitude
    fill = {"translate_const": int(0.45 * min(height, width)), "img_mean": (0, 0, 0)}
    by_timm = rand_augment_transform(augmentation.config or "rand", fill)
    for op in by_timm.ops:
        if op.name.startswith("Posterize"):  # to at least one bit: Pillow 13 refuses none, which is black
            op.level_fn = lambda *level, bits=op.level_fn: (max(1, *bits(*level)),)
    shift = v2.RandomAffine(degrees=0, translate=(1 / 6, 1 / 6))
    steps: list[Any] = {
        "cutout": [],
        "autoaugment": [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)],
        "randaugment": [v2.RandAugment(augmentation.num_ops or 2, magnitude)],
        "trivialaugment": [v2.TrivialAugmentWide()],
        "timm": [v2.ToPILImage(), by_timm, v2.PILToTensor()],
        "idbh": [shift, v2.RandAugment(num_ops=1, magnitude=9), v2.RandomErasing(p=0.5)],
    }[augmentation.policy]
    if side := augmentation.cutout_size:  # centred anywhere: pad by half a side, erase, cut the padding
        half = side // 2
        share = side**2 / ((height + 2 * half) * (width + 2 * half))
        erase = v2.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0), value=0)
        steps += [v2.Pad(half), erase, v2.CenterCrop((height, width))]
    return v2.RandomApply(steps, p=augmentation.probability)


@method
class LabelNoise(Method):
    """Symmetric label noise (1), a function of the seed, the image and the epoch; by default none.

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

        ``index``, int64 [B], tells the images apart, as ``Batch.index``. That of a `StreamSet` counts images
        of an epoch and names none: resample, and give the rank's seed.
        """
        draw = epoch if self.resample else None
        is_noisy = _uniform(index, UNIT, seed, "label noise", draw) < math.ceil(self.share * UNIT)
        drawn = _uniform(index, num_classes - self.exclude_true, seed, "label", draw)
        return torch.where(is_noisy, (y + 1 + drawn) % num_classes if self.exclude_true else drawn, y)


def _uniform(index: Tensor, n: int, *where: object) -> Tensor:
    """Return a number of 0 .. n - 1 for every index, int64 like it, from a seed that names ``where``.

    The finaliser of splitmix64 (Steele, Lea & Flood 2014) of index + seed, modulo n.
    """

    def shifted(z: Tensor, bits: int) -> Tensor:  # torch's own shift repeats the sign instead of zeros
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    wrap = 1 << 64  # an unsigned constant less this is the int64 of the same bits
    z = index * (0x9E3779B97F4A7C15 - wrap) + seed_from(*where)
    z = (z ^ shifted(z, 30)) * (0xBF58476D1CE4E5B9 - wrap)
    z = (z ^ shifted(z, 27)) * (0x94D049BB133111EB - wrap)
    return shifted(z ^ shifted(z, 31), 2) % n


@method
class Mixing(Method):
    """How often and by what a batch is mixed: mixup (1710.09412), CutMix (1905.04899); by default neither."""

    mixup_alpha: NonNegative = setting(0.0, "Concentration α of mixup; 0: off.")
    cutmix_alpha: NonNegative = setting(0.0, "Concentration α of CutMix; 0: off.")
    probability: Share = setting(1.0, "Probability that a batch is mixed, in [0, 1].")
    switch_probability: Share = setting(0.5, "Probability of CutMix where both are on, in [0, 1].")

    def __post_init__(self) -> None:
        if self.probability == 0 or (not self.is_active and self.probability != 1):
            refuse("probability", "got settings that mix nothing; expected an alpha and above 0. Set both.")
        if not (self.mixup_alpha and self.cutmix_alpha) and self.switch_probability != 0.5:
            got = f"got {self.switch_probability:g} without two kinds of mixing"
            refuse("switch_probability", f"{got}; expected both alphas above 0. Remove it.")

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
        mix equal batches equally, on every device; torch's global random state is left alone. ValueError for
        a single image that would be mixed.
        """
        if self.is_active and len(x) < 2:
            raise ValueError("mixing: got a batch of 1 image; expected a partner. Use larger micro-batches.")
        with seeded(seed):
            if self.is_active and float(torch.rand(())) < self.probability:
                use_cutmix = self.cutmix_alpha > 0
                if use_cutmix and self.mixup_alpha > 0:
                    use_cutmix = float(torch.rand(())) < self.switch_probability
                kind, alpha = (v2.CutMix, self.cutmix_alpha) if use_cutmix else (v2.MixUp, self.mixup_alpha)
                return kind(alpha=alpha, num_classes=num_classes)(x, y)
        return x, functional.one_hot(y, num_classes).float()
