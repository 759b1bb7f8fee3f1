"""Data that can only be read front to back: WebDataset, TFDS, streamed Hugging Face data sets.

Shards are shuffled, then images within a buffer, from ``(seed, epoch)``; the number of ranks and workers
changes which images share a batch. Resuming is exact at epoch boundaries only: within an epoch ``start``
reads and drops batches, and depends on the reader repeating its order.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from wcitrain.data.augment import crop, draw_crops, resized_crop
from wcitrain.data.pixels import to_levels
from wcitrain.data.sets import Batch, Images, Reading
from wcitrain.seeding import generator_from, seed_from


@dataclass(frozen=True, eq=False)
class StreamSet(Images):
    """Images that are decoded in the order of an iterable data set."""

    # open(is_training=, seed=, batch_size=) returns a fresh timm ``IterableImageDataset``.
    open: Callable[..., Any]
    num_images: int  # as the stream declares them
    image_size: int
    num_workers: int = 0  # fewer than the shards
    channels: int = 3  # 1: gray, 3: RGB
    limit: int | None = None  # read only so many images from the front
    can_shuffle: ClassVar[bool] = False

    def __len__(self) -> int:
        return self.num_images if self.limit is None else min(self.limit, self.num_images)

    def subset(self, n: int, *name: object) -> "StreamSet":
        """Return the first ``n`` images of the unshuffled stream; a warning where it is sorted by class."""
        return replace(self, limit=n)

    def read(self, reading: Reading) -> Iterator[Batch]:
        """Iterate over one epoch; raise ValueError where the stream ends early.

        Training (``shuffle`` and ``drop_last``) gives each rank shards of its own. Evaluation (neither) reads
        the whole stream on every rank and takes [r::w] of each batch, so that every image is seen exactly
        once. ``Batch.index`` counts the images this rank has read. An augmentation is drawn, with crop and
        flip, from the number of images that a process has read before: other worker counts augment otherwise.
        """
        is_training = reading.drop_last
        if reading.shuffle != is_training or (is_training and self.limit is not None):
            rule = "expected both to train on a whole stream or neither to measure. Pass both or neither."
            raise ValueError(f"batches: got shuffle={reading.shuffle}, drop_last={is_training}; {rule}")
        reading.check(len(self))
        reading.augmentation.check((self.channels, self.image_size, self.image_size))
        local = reading.batch_size // reading.world if is_training else reading.batch_size
        seed = seed_from(reading.seed) % 2**31
        dataset = self.open(is_training=is_training, seed=seed, batch_size=local)
        dataset.transform = _Decoding(self.image_size, self.channels, reading)
        # The reader would ask torch.distributed; this function answers to its arguments instead.
        ranks = (reading.rank, reading.world) if is_training else (0, 1)
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = ranks
        dataset.set_loader_cfg(num_workers=self.num_workers)
        dataset.set_epoch(reading.epoch)
        settings: dict[str, Any] = {"num_workers": self.num_workers, "drop_last": is_training}
        settings["pin_memory"] = torch.device(reading.device).type == "cuda"
        settings["generator"] = generator_from("cpu", reading.seed, "stream", reading.epoch)  # of the buffers
        return self._assemble(DataLoader(dataset, batch_size=local, **settings), reading, local)

    def _assemble(self, loader: DataLoader, reading: Reading, local: int) -> Iterator[Batch]:
        """Read, cut, crop and scale batch after batch of ``local`` images."""
        part, needed = slice(reading.rank, None, reading.world), len(self)  # this rank's share; what is read
        if reading.drop_last:
            part, needed = slice(None), self.num_updates(reading.batch_size) * local
        seen, white = 0, torch.tensor(255.0, device=reading.device)  # a number divides inexactly on CUDA
        labels: list[int] = []
        for number, (pixels, y) in enumerate(loader):
            keep = min(len(y), needed - seen)
            labels += y[:keep].tolist() if self.limit is not None else []
            pixels, y, index = pixels[:keep][part], y[:keep][part], torch.arange(seen, seen + keep)[part]
            seen += keep
            if number >= reading.start and len(y):
                pixels = pixels.to(reading.device)
                if not reading.augmentation.is_active:
                    pixels = _crop(pixels, reading, "augment", number)
                yield Batch(pixels.float() / white, y.to(reading.device), index.to(reading.device))
            if seen == needed:
                return _warn_if_sorted(labels, self.num_images)
        rule = f"expected {needed} of the {self.num_images} it declares. Correct it, or lower num_workers."
        raise ValueError(f"data.name: got {seen} images from the stream; {rule}")


def _warn_if_sorted(labels: list[int], num_images: int) -> None:
    """Warn of the first images of a stream whose neighbours are of one class more often than by chance.

    Of shuffled images with class shares p, Σ p² of the neighbours are; 5 standard errors are allowed.
    """
    n, shares = len(labels), np.unique(labels, return_counts=True)[1] / max(1, len(labels))
    equal = float(np.mean(np.diff(labels) == 0)) if n > 1 else 0.0
    chance = float((shares**2).sum())
    if n >= 20 and n < num_images and (len(shares) == 1 or equal > chance + 2.5 / math.sqrt(n - 1)):
        text = f"got {n} images of {len(shares)} classes from a stream's front, {equal:.0%} of neighbours"
        rule = "expected shuffled images: numbers over them are not the stream's. Shuffle its shards."
        warnings.warn(f"data.name: {text} alike; {rule}", stacklevel=2)


@dataclass
class _Decoding:
    """Decodes the images that one process reads, in that order; a policy also crops and augments them."""

    image_size: int
    channels: int
    reading: Reading
    count: int = 0  # images this process has read

    def __call__(self, image: Image.Image) -> Tensor | np.ndarray:
        size, reading = self.image_size, self.reading
        if not reading.augmentation.is_active:
            return to_levels(image, size, self.channels)
        worker: Any = get_worker_info()
        place = ("stream", worker.id if worker else 0, self.count)
        self.count += 1
        where = (reading.seed, reading.epoch, reading.rank, *place)
        if scale := reading.augmentation.crop_scale:
            image = resized_crop(image, seed_from(*where, "crop"), (size, size), scale)
        levels = to_levels(image, size, self.channels)
        pixels = _crop(torch.from_numpy(levels)[None], reading, *place)[0]
        return reading.augmentation.apply(pixels, seed_from(*where, "policy"))


def _crop(pixels: Tensor, reading: Reading, *place: object) -> Tensor:
    """Crop and mirror images at a place of one process's epoch."""
    where = (reading.seed, reading.epoch, reading.rank, *place)
    crops = draw_crops(len(pixels), reading.crop_padding, reading.flip, *where)
    return crop(pixels, crops, reading.crop_padding)
