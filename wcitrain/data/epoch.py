"""One epoch over a set: which image is shown at which place, and how it is cropped, mirrored and augmented.

Everything random is a function of the place within the epoch, so any places can be fetched alone, in any
order and by any process, and an image fetched twice is the same bit for bit. Without a policy the levels of a
whole batch are cropped and mirrored on the device; a policy works on single images, which ``num_workers``
processes prepare ahead of the device.

Legend: B batch, C channels, H and W pixels, n places of an epoch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from wcitrain.data.augment import Augmentation
from wcitrain.data.decoding import Decoder
from wcitrain.seeding import generator_from, seed_from


class Images(Protocol):
    """What an epoch reads of a set of N images; ``ImageSet`` is one."""

    @property
    def decoder(self) -> Decoder: ...  # noqa: D102

    @property
    def positions(self) -> Tensor: ...  # noqa: D102

    @property
    def pixels(self) -> Tensor | None: ...  # noqa: D102

    @property
    def y(self) -> Tensor: ...  # noqa: D102

    @property
    def num_workers(self) -> int: ...  # noqa: D102


class Batch(NamedTuple):
    """One rank's part of a global batch.

    ``x`` is float32 [B, C, H, W] in [0, 1], ``y`` int64 [B], and ``index`` int64 [B] the position of each
    image in its source, so that an error can name it; all three on the device that was asked for.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a batch has no use for


@dataclass(frozen=True, eq=False)
class Epoch(Dataset):
    """The images of a set in the order of one epoch.

    Attributes:
        images: The set.
        rows: Row of the set that is shown at each place, int64 [n].
        shift: Where each place's image is cropped, int64 [n, 2]; see ``draw_augmentation``.
        mirror: Whether it is mirrored, bool [n].
        crop_padding: Zeros added on every side before cropping, in pixels.
        augmentation: What follows; None is nothing.
        where: With the place, names the seed of the augmentation.
    """

    images: Images
    rows: Tensor
    shift: Tensor
    mirror: Tensor
    crop_padding: int
    augmentation: Augmentation | None
    where: tuple[object, ...]

    @classmethod
    def draw(
        cls,
        images: Images,
        rows: Tensor,
        *where: object,
        crop_padding: int,
        flip: bool,
        augmentation: Augmentation | None,
    ) -> "Epoch":
        """Return an epoch in the order ``rows``, crops and mirrors drawn from a seed that names ``where``.

        Raises:
            ValueError: The images cannot be cropped or augmented so.
        """
        if augmentation is not None:
            augmentation.check(images.decoder.shape)
        shift, mirror = draw_augmentation(len(rows), crop_padding, flip, *where)
        return cls(images, rows, shift, mirror, crop_padding, augmentation, where)

    def batches(self, places: list[Tensor], device: torch.device) -> Iterator[Batch]:
        """Yield the images at each element of ``places`` (int64 [B] of the epoch, B >= 1) as one batch."""
        images, is_augmented = self.images, self.augmentation is not None and self.augmentation.is_active
        # Divided by a tensor: CUDA multiplies by the reciprocal of a Python number, which is off by one bit.
        levels = torch.tensor(255.0 if is_augmented else float(images.decoder.source.levels), device=device)
        y = images.y
        fetched = self._augmented(places, device) if is_augmented else self._plain(places, device)
        for place, pixels in zip(places, fetched, strict=True):
            row = self.rows[place]
            yield Batch(pixels.float() / levels, y[row].to(device), images.positions[row].to(device))

    def _plain(self, places: list[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Fetch levels batch after batch; move, crop and mirror them, uint8 [B, C, H, W]."""
        for place, pixels in zip(places, self._fetch(places, device), strict=True):
            pixels = pixels.to(device, non_blocking=True)
            yield crop_and_mirror(
                pixels, self.shift[place].to(device), self.mirror[place].to(device), self.crop_padding
            )

    def _fetch(self, places: list[Tensor], device: torch.device) -> Iterable[Tensor]:
        """Return the stored levels at each element of ``places``, uint8 [B, C, H, W]."""
        images = self.images
        if images.pixels is not None:
            pixels = images.pixels
            return (pixels[self.rows[place]] for place in places)
        return self._loader(images.decoder, [images.positions[self.rows[place]] for place in places], device)

    def _augmented(self, places: list[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Move batches that were augmented image by image, 8-bit levels [B, C, H, W]."""
        return (pixels.to(device, non_blocking=True) for pixels in self._loader(self, places, device))

    def __getitems__(self, places: list[int]) -> list[Tensor]:
        """Return augmented images at some places, 8-bit levels [C, H, W]; ``DataLoader`` calls this."""
        assert self.augmentation is not None
        rows, images, levels = self.rows[places], self.images, self.images.decoder.source.levels
        if images.pixels is None:
            pixels = torch.stack(
                [torch.from_numpy(images.decoder[int(images.positions[row])]) for row in rows]
            )
        else:
            pixels = images.pixels[rows]
        if levels != 255:
            pixels = (pixels * (255 / levels)).round().to(torch.uint8)
        pixels = crop_and_mirror(pixels, self.shift[places], self.mirror[places], self.crop_padding)
        seeds = [seed_from(*self.where, "policy", place) for place in places]
        return [self.augmentation.apply(image, seed) for image, seed in zip(pixels, seeds, strict=True)]

    def _loader(self, dataset: Dataset, indices: list[Tensor], device: torch.device) -> DataLoader:
        """Return what fetches the elements of ``dataset`` at each element of ``indices``."""
        return DataLoader(
            dataset,
            batch_sampler=[index.tolist() for index in indices],
            num_workers=self.images.num_workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # without its own, a loader advances the global random state
        )


def draw_augmentation(
    num_images: int, crop_padding: int, flip: bool, *where: object
) -> tuple[Tensor, Tensor]:
    """Draw where each image is cropped and whether it is mirrored, from a seed that names ``where``.

    Returns:
        ``shift`` int64 [N, 2]: top and left of the crop in the padded image, uniform on 0 .. 2 crop_padding;
        ``mirror`` bool [N]. Both on the CPU.
    """
    if crop_padding < 0:
        raise ValueError(
            f"data.crop_padding: got {crop_padding}; expected at least 0 pixels. Use 0 to turn it off."
        )
    shift = torch.randint(
        0, 2 * crop_padding + 1, (num_images, 2), generator=generator_from("cpu", *where, "shift")
    )
    mirror = torch.rand(num_images, generator=generator_from("cpu", *where, "mirror")) < 0.5
    return shift, mirror & flip


def crop_and_mirror(pixels: Tensor, shift: Tensor, mirror: Tensor, padding: int) -> Tensor:
    """Return every image zero-padded, cropped back to its size at ``shift`` and mirrored where ``mirror``.

    One gather, no loop over images:

        out[b, c, i, j] = padded[b, c, top_b + i, left_b + (W-1-j if mirror_b else j)]                     (1)

    Args:
        pixels: [B, C, H, W], any dtype; not modified.
        shift: (top, left) in the padded image, int64 [B, 2], each in 0 .. 2 padding.
        mirror: bool [B].
        padding: Zeros on every side, in pixels.
    """
    b, c, h, w = pixels.shape
    i, j = torch.arange(h, device=pixels.device), torch.arange(w, device=pixels.device)
    top, left = shift[:, :1] + i, shift[:, 1:] + torch.where(mirror[:, None], j.flip(0), j)  # [B, H], [B, W]
    image = torch.arange(b, device=pixels.device)[:, None, None, None]
    channel = torch.arange(c, device=pixels.device)[:, None, None]
    padded = functional.pad(pixels, [padding] * 4)
    return padded[image, channel, top[:, None, :, None], left[:, None, None, :]]  # (1)
