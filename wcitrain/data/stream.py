"""Training on data that can only be read front to back: WebDataset, TFDS, streamed Hugging Face data sets.

The promises of ``ImageSet`` shrink to what such a reader keeps. Shards are shuffled, then images within a
buffer, from ``(seed, epoch)``; the number of ranks and workers changes which images share a batch. Resuming
is exact at epoch boundaries only: within an epoch ``start`` reads and drops batches, and depends on the
reader repeating its order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from wcitrain.data.augment import Augmentation
from wcitrain.data.decoding import to_levels
from wcitrain.data.epoch import Batch, crop_and_mirror, draw_augmentation
from wcitrain.data.loader import check_batch
from wcitrain.seeding import generator_from, seed_from


@dataclass(frozen=True, eq=False)
class StreamSet:
    """Images that are decoded in the order of an iterable data set; the counterpart of ``ImageSet``.

    Attributes:
        open: ``open(is_training=, seed=, batch_size=)`` returns a fresh timm ``IterableImageDataset``.
        num_images: Images in the stream, as it declares them.
        image_size: Side in pixels to which every image is resized.
        num_workers: Processes that decode; fewer than the shards.
        limit: Read only so many images from the front; None reads all.
    """

    open: Callable[..., Any]
    num_images: int
    image_size: int
    num_workers: int = 0
    limit: int | None = None

    def __len__(self) -> int:
        return self.num_images if self.limit is None else min(self.limit, self.num_images)

    def subset(self, n: int) -> "StreamSet":
        """Return the first ``n`` images of the unshuffled stream, for measuring; classes are as they come."""
        if n < 1:
            raise ValueError(f"subset: got {n}; expected at least 1 image. Ask for more.")
        return replace(self, limit=n)

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
        """Iterate over one epoch; arguments as in ``ImageSet.batches``.

        Training (``shuffle`` and ``drop_last``) gives each rank shards of its own. Evaluation (neither) reads
        the whole stream on every rank and takes [r::w] of each batch, so that every image is seen exactly
        once. ``Batch.index`` counts the images this rank has read. An augmentation is drawn, with crop and
        flip, from the number of images that a process has read before: other worker counts augment otherwise.

        Raises:
            ValueError: At the call, for one of ``shuffle`` and ``drop_last`` without the other, for training
                on a ``subset``, or for a batch size that does not fit; while reading, for an early end.
        """
        if shuffle != drop_last or (shuffle and self.limit is not None):
            raise ValueError(
                f"batches: got shuffle={shuffle}, drop_last={drop_last} for a stream of {len(self)} images; "
                "expected both to train on a whole stream or neither to measure. Pass both or neither."
            )
        check_batch(len(self), batch_size, rank=rank, world=world, drop_last=drop_last)
        local = batch_size // world if drop_last else batch_size
        dataset = self.open(is_training=drop_last, seed=seed_from(seed) % 2**31, batch_size=local)
        where = (seed, epoch, rank)
        if augmentation is not None and augmentation.is_active:
            augmentation.check((3, self.image_size, self.image_size))
            dataset.transform = _Augmenter(self.image_size, crop_padding, flip, augmentation, where)
            crop_padding, flip = 0, False
        else:
            dataset.transform = partial(to_levels, image_size=self.image_size)
        # The reader would ask torch.distributed; this function answers to its arguments instead.
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = (rank, world) if drop_last else (0, 1)
        dataset.set_loader_cfg(num_workers=self.num_workers)
        dataset.set_epoch(epoch)
        loader = DataLoader(
            dataset,
            batch_size=local,
            num_workers=self.num_workers,
            drop_last=drop_last,
            pin_memory=torch.device(device).type == "cuda",
            generator=generator_from("cpu", seed, "stream", epoch),  # seeds the workers' shuffle buffers
        )
        part = slice(None) if drop_last else slice(rank, None, world)
        needed = len(self) // batch_size * local if drop_last else len(self)
        return self._assemble(loader, part, needed, start, torch.device(device), crop_padding, flip, where)

    def _assemble(
        self,
        loader: DataLoader,
        part: slice,  # this rank's share of what it reads
        needed: int,  # images this rank reads
        start: int,
        device: torch.device,
        padding: int,
        flip: bool,
        where: tuple[int, int, int],  # names the augmentation seeds
    ) -> Iterator[Batch]:
        """Read, cut, augment and scale batch after batch."""
        # A tensor divides exactly on CUDA, a number does not.
        seen, levels = 0, torch.tensor(255.0, device=device)
        for number, (pixels, y) in enumerate(loader):
            keep = min(len(y), needed - seen)
            pixels, y, index = pixels[:keep][part], y[:keep][part], torch.arange(seen, seen + keep)[part]
            seen += keep
            if number >= start and len(y):
                shift, mirror = draw_augmentation(len(y), padding, flip, *where, "augment", number)
                pixels = crop_and_mirror(pixels.to(device), shift.to(device), mirror.to(device), padding)
                yield Batch(pixels.float() / levels, y.to(device), index.to(device))
            if seen == needed:
                return
        raise ValueError(
            f"data.name: got {seen} images from the stream; expected {needed}, of the {self.num_images} it "
            "declares. Correct the declared number, look for unreadable images, or lower data.num_workers."
        )


@dataclass
class _Augmenter:
    """Decodes, crops, mirrors and augments the images that one process reads, in the order it reads them."""

    image_size: int
    crop_padding: int
    flip: bool
    augmentation: Augmentation
    where: tuple[int, int, int]
    count: int = 0

    def __call__(self, image: Image.Image) -> Tensor:
        """Return uint8 [C, H, W]."""
        worker = get_worker_info()
        place = (*self.where, "stream", 0 if worker is None else worker.id, self.count)
        self.count += 1
        pixels = torch.from_numpy(to_levels(image, self.image_size))
        shift, mirror = draw_augmentation(1, self.crop_padding, self.flip, *place)
        return self.augmentation.apply(
            crop_and_mirror(pixels[None], shift, mirror, self.crop_padding)[0], seed_from(*place, "policy")
        )
