"""Batches of images in [0, 1], as a function of (seed, epoch, position) and of nothing else.

Images are stored as ``uint8`` levels and leave as ``x = level / levels``; normalisation belongs to the model.
There is no generator to save: the order of an epoch and the crop and flip of its k-th image are drawn anew
from ``(seed, epoch)``, so an interrupted epoch continues bit for bit and processes cut their parts out of one
global batch. Memory and streaming differ only in where the levels come from; what happens to them afterwards
is the same code. An augmentation policy works on one image at a time on the CPU, so crop, mirror and policy
then run in ``num_workers`` processes while the device computes; without a policy whole batches are cropped
and mirrored on the device.

An epoch is one sequence of images and batches are cut from it front to back: a batch of B images equals its
micro-batches of B/a images in a row, if ``start`` counts micro-batches.

Legend: a micro-batches a batch, B global batch, C channels, H and W pixels, N images, w world size, r rank.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from wcitrain.data.augment import Augmentation
from wcitrain.data.decoding import Decoder
from wcitrain.data.epoch import Batch, Epoch, crop_and_mirror, draw_augmentation
from wcitrain.seeding import generator_from, seed_from

__all__ = [
    "Batch",
    "ImageSet",
    "check_batch",
    "class_order",
    "crop_and_mirror",
    "draw_augmentation",
    "rank_places",
]

MEMORY_LIMIT = 2e9  # bytes of decoded uint8 levels up to which in_memory="auto" keeps a set in memory


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labelled images in a fixed order, held in memory or decoded batch by batch; build one with ``load``.

    ``positions`` int64 [N] are the places of the images in their source, ``y`` int64 [N] their labels, and
    ``pixels`` uint8 [N, C, H, W] their levels, or None when they are streamed by ``num_workers`` processes.
    As many processes augment by a policy.
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
            num_workers: Threads that decode now, or processes that decode or augment at every use; 0: none.
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
        """Return the first ``n`` images of a fixed class-balanced order, or all where there are fewer."""
        if n < 1:
            raise ValueError(f"subset: got {n}; expected at least 1 image. Ask for more.")
        return self.take(class_order(self.y, seed_from("subset"))[:n])

    def with_labels(self, y: Tensor) -> "ImageSet":
        """Return the same images with other labels, int64 [N]."""
        labels = self.decoder.source.labels.clone()
        labels[self.positions] = y
        decoder = copy(self.decoder)
        decoder.source = replace(cast(Any, decoder.source), labels=labels)
        return replace(self, decoder=decoder)

    def num_updates(self, batch_size: int) -> int:
        """Return the whole batches of ``batch_size`` images, over ranks and micro-batches, in one epoch."""
        return len(self) // batch_size

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
        augmentation: Augmentation | None = None,
    ) -> Iterator[Batch]:
        """Iterate over one epoch; the same arguments give the same bits, whoever asks and whenever.

        Args:
            batch_size: Images per global batch, over all ranks.
            shuffle: Draw a new order from ``(seed, epoch)``; otherwise the order of the set.
            seed: Seed of order, crops, flips and augmentation.
            epoch: Epoch number, from 0.
            start: Global batches to skip; the others are the same as without skipping.
            rank: This process, 0 <= rank < world.
            world: Number of processes.
            device: Where the batch is assembled and augmented.
            crop_padding: Zeros on every side, in pixels, before cropping back at a random place; 0 is off.
            flip: Mirror each image left to right with probability 1/2.
            drop_last: True is for training: an incomplete last batch is left out and rank r takes the slice
                [r B/w : (r+1) B/w] of each batch. False is for evaluation: rank r takes [r::w], every image
                is seen exactly once; empty parts are skipped, so ranks may differ in numbers of batches.
            augmentation: What follows crop and flip, image by image; None is nothing. It sees 8-bit levels:
                images with fewer levels are rescaled to 255 and rounded.

        Raises:
            ValueError: At the call, for a batch larger than the set or not divisible by ``world`` with
                ``drop_last``, or for images that the augmentation does not fit.
        """
        places = rank_places(len(self), batch_size, start=start, rank=rank, world=world, drop_last=drop_last)
        settings = {"crop_padding": crop_padding, "flip": flip, "augmentation": augmentation}
        return self.draw_epoch(seed, epoch, shuffle=shuffle, **settings).batches(places, torch.device(device))

    def draw_epoch(self, seed: int, epoch: int, *, shuffle: bool, **settings: Any) -> Epoch:
        """Return the whole set in the order and with the crops of an epoch; arguments as in ``batches``."""
        order = torch.arange(len(self))
        if shuffle:
            order = torch.randperm(len(self), generator=generator_from("cpu", seed, "order", epoch))
        return Epoch.draw(self, order, seed, "augment", epoch, **settings)


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
    """Return the positions in an epoch that make up each batch of one rank; see ``ImageSet.batches``."""
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
        slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        if drop_last
        else slice(rank, None, world)
    )
    return [batch[part] for batch in batches[start:] if len(batch[part])]


def check_batch(num_images: int, batch_size: int, *, rank: int, world: int, drop_last: bool) -> None:
    """Raise ValueError unless ``batch_size`` can be cut out of the images and shared by the ranks."""
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; expected at least 1. Raise it.")
    if not 0 <= rank < world:
        raise ValueError(
            f"rank: got {rank}; expected 0 <= rank < world={world}. Pass the number of this process."
        )
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


def class_order(labels: Tensor, seed: int, *, proportional: bool = False) -> Tensor:
    """Return an order of the images, int64 [N], of which every beginning is fair to the classes.

    Images are shuffled, then sorted by a key of their rank k = 0, 1, ... within a class of m images: k
    itself, so that classes take turns (round robin), or (k + 1/2) / m, so that classes keep their shares (the
    Sainte-Laguë method).

    Args:
        labels: int64 [N].
        seed: 63-bit seed of the shuffle.
        proportional: Keep shares instead of taking turns.
    """
    # NumPy freezes the stream of RandomState for good, so a split never changes with a version of anything.
    shuffled = torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(len(labels)))
    # Class after class, shuffled within each.
    shuffled = shuffled[torch.argsort(labels[shuffled], stable=True)]
    sizes = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[shuffled]]
    key = (rank.double() + 0.5) / sizes[labels[shuffled]] if proportional else rank
    return shuffled[torch.argsort(key, stable=True)]
