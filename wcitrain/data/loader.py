"""Batches of images in [0, 1], as a function of (seed, epoch, position) and of nothing else.

Images are stored as ``uint8`` levels and leave as ``x = level / levels``; normalisation belongs to the model. There is
no generator to save: the order of an epoch and the crop and flip of its k-th image are drawn anew from
``(seed, epoch)``, so an interrupted epoch continues bit for bit and processes cut their parts out of one global batch.
Memory and streaming differ only in where the levels come from; what happens to them afterwards is the same code.

Legend: B global batch, C channels, H and W pixels, N images of a set, w world size, r rank.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from wcitrain.data.decoding import Decoder
from wcitrain.seeding import generator_from, seed_from

MEMORY_LIMIT = 2e9  # bytes of decoded uint8 levels up to which in_memory="auto" keeps a set in memory


class Batch(NamedTuple):
    """One rank's part of a global batch.

    ``x`` is float32 [B, C, H, W] in [0, 1], ``y`` int64 [B], and ``index`` int64 [B] the position of each image in its
    source, so that an error can name it; all three on the device that was asked for.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a batch has no use for


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images in a fixed order, held in memory or decoded batch by batch; build one with ``load``.

    ``positions`` int64 [N] are the places of the images in their source, ``y`` int64 [N] their labels, and ``pixels``
    uint8 [N, C, H, W] their levels, or None when they are streamed by ``num_workers`` processes.
    """

    decoder: Decoder
    positions: Tensor
    pixels: Tensor | None
    num_workers: int

    @classmethod
    def load(
        cls,
        decoder: Decoder,
        positions: Tensor,
        *,
        in_memory: bool | Literal["auto"] = "auto",
        num_workers: int = 2,
    ) -> "ImageSet":
        """Return the images at ``positions``; only they are read, and only now if they are kept in memory.

        Args:
            decoder: Reads one image.
            positions: Places in the source, int64 [N], N >= 1.
            in_memory: True decodes now, False at every use, "auto" decodes now up to ``MEMORY_LIMIT`` bytes.
            num_workers: Threads that decode now, or processes that decode at every use; 0 means neither.
        """
        if in_memory == "auto":
            in_memory = len(positions) * int(np.prod(decoder.shape)) <= MEMORY_LIMIT
        pixels = _decode_all(decoder, positions, num_workers) if in_memory else None
        return cls(decoder, positions, pixels, num_workers)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def y(self) -> Tensor:
        """The labels, int64 [N]."""
        return self.decoder.source.labels[self.positions]

    def take(self, rows: Tensor) -> "ImageSet":
        """Return the images at ``rows`` of this set, int64 [n], in that order."""
        pixels = None if self.pixels is None else self.pixels[rows]
        return replace(self, positions=self.positions[rows], pixels=pixels)

    def subset(self, n: int) -> "ImageSet":
        """Return the first ``n`` images of a fixed class-balanced order, or all of them when there are fewer."""
        if n < 1:
            raise ValueError(f"subset: got {n}; expected at least 1 image. Ask for more.")
        return self.take(class_order(self.y, seed_from("subset"))[:n])

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        crop_padding: int = 0,
        flip: bool = False,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over one epoch; the same arguments give the same bits, whoever asks and whenever.

        Args:
            batch_size: Images per global batch, over all ranks.
            shuffle: Draw a new order from ``(seed, epoch)``; otherwise the order of the set.
            seed: Seed of order, crops and flips.
            epoch: Epoch number, from 0.
            start: Global batches to skip; the others are the same as without skipping.
            rank: This process, 0 <= rank < world.
            world: Number of processes.
            device: Where the batch is assembled and augmented.
            crop_padding: Zeros added on every side, in pixels, before cropping back at a random place; 0 is off.
            flip: Mirror each image left to right with probability 1/2.
            drop_last: True is for training: an incomplete last batch is left out and rank r takes the slice
                [r B/w : (r+1) B/w] of each batch. False is for evaluation: rank r takes [r::w], every image is seen
                exactly once, and an empty part is skipped, so ranks may yield different numbers of batches.

        Raises:
            ValueError: At the call, for a batch larger than the set or not divisible by ``world`` with ``drop_last``.
        """
        places = rank_places(len(self), batch_size, start=start, rank=rank, world=world, drop_last=drop_last)
        order = torch.arange(len(self))
        if shuffle:
            order = torch.randperm(len(self), generator=generator_from("cpu", seed, "order", epoch))
        shift, mirror = draw_augmentation(len(self), crop_padding, flip, seed, "augment", epoch)
        return self._assemble(places, order, shift, mirror, crop_padding, torch.device(device))

    def _assemble(
        self,
        places: list[Tensor],  # this rank's positions within the epoch, one tensor a batch
        order: Tensor,  # [N] row of the set at each position within the epoch
        shift: Tensor,  # [N, 2]
        mirror: Tensor,  # [N]
        padding: int,
        device: torch.device,
    ) -> Iterator[Batch]:
        """Fetch, move, augment and scale batch after batch."""
        rows = [order[place] for place in places]
        y, levels = self.y, torch.tensor(float(self.decoder.source.levels), device=device)
        for place, row, pixels in zip(places, rows, self._fetch(rows, device), strict=True):
            pixels = pixels.to(device, non_blocking=True)
            pixels = crop_and_mirror(pixels, shift[place].to(device), mirror[place].to(device), padding)
            # Divided by a tensor: CUDA multiplies by the reciprocal of a Python number, which is off by one bit.
            yield Batch(pixels.float() / levels, y[row].to(device), self.positions[row].to(device))

    def _fetch(self, rows: list[Tensor], device: torch.device) -> Iterable[Tensor]:
        """Return the levels at each element of ``rows``, uint8 [B, C, H, W]."""
        if self.pixels is not None:
            pixels = self.pixels
            return (pixels[row] for row in rows)
        return DataLoader(
            self.decoder,
            batch_sampler=[self.positions[row].tolist() for row in rows],
            num_workers=self.num_workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # a loader without its own generator advances the global random state
        )


def _decode_all(decoder: Decoder, positions: Tensor, num_workers: int) -> Tensor:
    """Decode images with threads into one uint8 [N, C, H, W]."""
    pixels = np.empty((len(positions), *decoder.shape), dtype=np.uint8)

    def fill(rows: np.ndarray) -> None:
        for row in rows:
            pixels[row] = decoder[int(positions[row])]

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        # Many short tasks, so that a broken image stops the work soon; list() raises what a thread raised.
        list(pool.map(fill, np.array_split(np.arange(len(positions)), 1 + len(positions) // 64)))
    return torch.from_numpy(pixels)


def rank_places(
    num_images: int, batch_size: int, *, start: int, rank: int, world: int, drop_last: bool
) -> list[Tensor]:
    """Return the positions within an epoch that each batch of one rank consists of; see ``ImageSet.batches``."""
    check_batch(num_images, batch_size, rank=rank, world=world, drop_last=drop_last)
    batches = torch.arange(num_images).split(batch_size)
    if drop_last:
        batches = batches[: num_images // batch_size]
    if not 0 <= start <= len(batches):
        raise ValueError(
            f"start: got {start}; expected 0 to {len(batches)}, the batches of an epoch. "
            "Resume with the data and train.batch_size of the interrupted run."
        )
    part = (
        slice(rank * batch_size // world, (rank + 1) * batch_size // world) if drop_last else slice(rank, None, world)
    )
    return [batch[part] for batch in batches[start:] if len(batch[part])]


def check_batch(num_images: int, batch_size: int, *, rank: int, world: int, drop_last: bool) -> None:
    """Raise ValueError unless ``batch_size`` can be cut out of the images and shared by the ranks."""
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; expected at least 1. Raise it.")
    if not 0 <= rank < world:
        raise ValueError(f"rank: got {rank}; expected 0 <= rank < world={world}. Pass the number of this process.")
    if drop_last and batch_size > num_images:
        raise ValueError(
            f"train.batch_size: got {batch_size}; expected at most the {num_images} training images. "
            "Lower train.batch_size or use more data."
        )
    if drop_last and batch_size % world:
        raise ValueError(
            f"train.batch_size: got {batch_size}; expected a multiple of the {world} processes. "
            "Change train.batch_size or the number of processes."
        )


def draw_augmentation(num_images: int, crop_padding: int, flip: bool, *where: object) -> tuple[Tensor, Tensor]:
    """Draw where each image is cropped and whether it is mirrored, from a seed that names the place ``where``.

    Returns:
        ``shift`` int64 [N, 2]: top and left of the crop in the padded image, uniform on 0 .. 2 crop_padding;
        ``mirror`` bool [N]. Both on the CPU.
    """
    if crop_padding < 0:
        raise ValueError(f"data.crop_padding: got {crop_padding}; expected at least 0 pixels. Use 0 to turn it off.")
    shift = torch.randint(0, 2 * crop_padding + 1, (num_images, 2), generator=generator_from("cpu", *where, "shift"))
    mirror = torch.rand(num_images, generator=generator_from("cpu", *where, "mirror")) < 0.5
    return shift, mirror & flip


def crop_and_mirror(pixels: Tensor, shift: Tensor, mirror: Tensor, padding: int) -> Tensor:
    """Return every image zero-padded, cropped back to its size at ``shift`` and mirrored where ``mirror``.

    One gather, no loop over images:

        out[b, c, i, j] = padded[b, c, top_b + i, left_b + (W-1-j if mirror_b else j)]                        (1)

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
    return functional.pad(pixels, [padding] * 4)[image, channel, top[:, None, :, None], left[:, None, None, :]]  # (1)


def class_order(labels: Tensor, seed: int, *, proportional: bool = False) -> Tensor:
    """Return an order of the images of which every beginning is fair to the classes.

    Images are shuffled, then sorted by a key of their rank k = 0, 1, ... within a class of m images: k itself, so that
    classes take turns (round robin), or (k + 1/2) / m, so that classes keep their shares (the Sainte-Laguë method).

    Args:
        labels: int64 [N].
        seed: 63-bit seed of the shuffle.
        proportional: Keep shares instead of taking turns.

    Returns:
        A permutation, int64 [N].
    """
    # NumPy freezes the stream of RandomState for good, so a split never changes with a version of anything.
    shuffled = torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(len(labels)))
    shuffled = shuffled[torch.argsort(labels[shuffled], stable=True)]  # class after class, shuffled within each
    sizes = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[shuffled]]
    key = (rank.double() + 0.5) / sizes[labels[shuffled]] if proportional else rank
    return shuffled[torch.argsort(key, stable=True)]
