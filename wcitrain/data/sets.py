"""Sets of images, whose batches are a function of how they are read and of nothing else.

A source knows every label and how to read the image at a position; it decodes nothing until it is asked.
Images are stored as ``uint8`` levels and leave as ``x = level / levels``; normalisation belongs to the model.
An epoch is one sequence of places, cut front to back into global batches, these into the parts of the
processes and into micro-batches. Its order and what happens to its k-th image are drawn anew from
``(seed, epoch)``, so an interrupted epoch continues bit for bit.

Whole batches are cropped and mirrored on the device. With a policy, which works on one image at a time, all
this runs on the CPU, in ``num_workers`` processes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wcitrain.data.augment import Augmentation, crop, draw_crops, resized_crop
from wcitrain.data.pixels import ArraySource, Source, to_levels
from wcitrain.seeding import generator_from, seed_from

MEMORY_LIMIT = 2e9  # bytes of decoded uint8 levels up to which in_memory="auto" keeps a set in memory


class Batch(NamedTuple):
    """One rank's part of a global batch, on the device that was asked for."""

    x: Tensor  # float32 [B, C, H, W] in [0, 1]
    y: Tensor  # int64 [B]
    index: Tensor  # type: ignore[assignment]  # int64 [B], positions in the source; hides tuple.index


@dataclass(frozen=True)
class Reading:
    """How one epoch over a set is read; equal readings give equal bits, whoever asks and whenever.

    ``drop_last``, for training, leaves out an incomplete last batch, and rank r of w takes the slice
    [r B/w : (r+1) B/w] of each. Without it, for evaluation, rank r takes [r::w], so that every image is seen
    exactly once; empty parts are skipped, so ranks may differ in numbers of batches.
    """

    batch_size: int  # images per global batch, over all ranks
    shuffle: bool = False  # draw a new order from ``(seed, epoch)``
    seed: int = 0  # of order, crops, flips and augmentation
    epoch: int = 0
    start: int = 0  # global batches to skip; the others are the same as without skipping
    rank: int = 0  # this process
    world: int = 1  # number of processes
    device: torch.device | str = "cpu"  # where batches go, and are cropped and mirrored
    crop_padding: int = 0  # zeros on every side, in pixels, before cropping back at a random place
    flip: bool = False  # mirror each image left to right with probability 1/2
    drop_last: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)

    def check(self, num_places: int) -> None:
        """Raise ValueError unless batches can be cut out of an epoch and shared by the ranks."""
        if self.drop_last and (self.batch_size > num_places or self.batch_size % self.world):
            rule = f"at most the {num_places} training images, a multiple of the {self.world} processes"
            raise ValueError(f"train.batch_size: got {self.batch_size}; expected {rule}. Change it.")

    def places(self, num_places: int) -> list[Tensor]:
        """Return the places of an epoch that make up each batch of this rank, int64 [B/w] each."""
        self.check(num_places)
        size, rank, world = self.batch_size, self.rank, self.world
        batches, part = torch.arange(num_places).split(size), slice(rank, None, world)
        if self.drop_last:
            batches = batches[: num_places // size]
            part = slice(rank * size // world, (rank + 1) * size // world)
        if not 0 <= self.start <= len(batches):
            rule = f"0 to {len(batches)}, the batches of an epoch. Resume with the former data and batch size"
            raise ValueError(f"start: got {self.start}; expected {rule}.")
        return [batch[part] for batch in batches[self.start :] if len(batch[part])]


class Images(ABC):
    """What a set of images is: in memory, in files, in a stream, or mixed of two sets."""

    can_shuffle: ClassVar[bool] = True  # else it is read front to back, and no image has a place of its own

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, reading: Reading) -> Iterator[Batch]:
        """Iterate over one epoch; raise ValueError, at the call, where the set cannot be read so."""

    @abstractmethod
    def subset(self, n: int, *name: object) -> "Images":
        """Return ``n`` images to measure on, in class shares, or all where there are fewer.

        They are always the same for one ``name``; the first of them are a subset too.
        """

    @property
    def num_places(self) -> int:
        """The images that an epoch of training shows."""
        return len(self)

    def num_updates(self, batch_size: int) -> int:
        """Return the whole batches of ``batch_size`` images, over ranks and micro-batches, in one epoch."""
        return self.num_places // batch_size

    def batches(self, batch_size: int, **settings: Any) -> Iterator[Batch]:
        """Iterate over one epoch; ``settings`` (device, shuffle, seed, ...) are those of `Reading`."""
        return self.read(Reading(batch_size, **settings))


@dataclass(frozen=True)
class Pairs:
    """Batches (x, y) of images, read anew whenever they are iterated over."""

    images: Images
    batch_size: int
    device: str

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x, y) for x, y, _ in self.images.batches(self.batch_size, device=self.device))


@dataclass(frozen=True, eq=False)
class ImageSet(Images):
    """N labelled images in a fixed order, in memory or decoded batch by batch; build one with ``load``."""

    source: Source
    positions: Tensor  # int64 [N], in the source
    y: Tensor  # int64 [N]
    pixels: Tensor | None  # uint8 [N, C, H, W] levels, unless decoded batch by batch
    image_size: int | None  # side of the squares that images are resized to, else None
    shape: Any  # (C, H, W) of every image
    shape_from: str  # the place of the image that was the first to have it
    num_workers: int  # processes that decode, and that augment by a policy

    @classmethod
    def load(
        cls,
        source: Source,
        positions: Tensor,
        image_size: int | None = None,
        in_memory: bool | str = "auto",
        num_workers: int = 2,
        like: "ImageSet | None" = None,
        channels: int | None = None,
    ) -> "ImageSet":
        """Return the images at ``positions`` (int64 [N], N >= 1) of a source; only they are read.

        Their shape is that of ``like``'s images, or of the first one with ``channels``, by default its own.
        They are ``decoded(in_memory)``.
        """
        first, y = int(positions[0]), source.labels[positions]
        shape: Any = like.shape if like else to_levels(source.read(first), image_size, channels).shape
        shape_from = like.shape_from if like else source.locate(first)
        images = cls(source, positions, y, None, image_size, shape, shape_from, num_workers)
        return images.decoded(in_memory)

    def decoded(self, in_memory: bool | str) -> "ImageSet":
        """Return the images with their pixels: True decodes now, by threads, False at every use.

        "auto" decodes now up to `MEMORY_LIMIT` bytes. Arrays that have the shape already are kept.
        """
        source, positions, shape = self.source, self.positions, self.shape
        if isinstance(source, ArraySource) and in_memory:
            stored = torch.from_numpy(source.pixels)
            stored = stored[:, None] if stored.ndim == 3 else stored.permute(0, 3, 1, 2)
            if stored.shape[1:] == shape:
                is_whole = torch.equal(positions, torch.arange(len(stored)))
                return replace(self, pixels=stored if is_whole else stored[positions])
        if not in_memory or (in_memory == "auto" and len(positions) * math.prod(shape) > MEMORY_LIMIT):
            return self
        levels = np.empty((len(positions), *shape), dtype=np.uint8)
        with ThreadPoolExecutor(max(1, self.num_workers)) as pool:
            for rows in torch.arange(len(positions)).split(1024):  # a broken image stops the work soon
                levels[rows] = list(pool.map(self.__getitem__, rows.tolist()))
        return replace(self, pixels=torch.from_numpy(levels))

    def __getitem__(self, row: int) -> np.ndarray:
        """Decode one image, uint8 [C, H, W]; an error names it, and the one it differs from."""
        position = int(self.positions[row])
        levels = to_levels(self.source.read(position), self.image_size, self.shape[0])
        self.refuse_shape(levels.shape, position)
        return levels

    def cropped(self, row: int, seed: int, scale: tuple[float, float]) -> np.ndarray:
        """Return a `resized_crop` of an image as it is stored, uint8 [C, H, W] of 255 levels."""
        white = 255 / self.source.levels
        image = self.source.read(int(self.positions[row])).point(lambda level: round(white * level))
        return to_levels(resized_crop(image, seed, self.shape[1:], scale), None, self.shape[0])

    def refuse_shape(self, shape: Sequence[int], position: int) -> None:
        """Raise ValueError unless ``shape``, of the image at ``position``, is that of the set."""
        if tuple(shape) != tuple(self.shape):
            got = f"{list(shape)} in {self.source.locate(position)}"
            rule = f"expected {list(self.shape)} as in {self.shape_from}. Set it to resize images."
            raise ValueError(f"data.image_size: got {got}; {rule}")

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, rows: Tensor) -> "ImageSet":
        """Return the images at ``rows`` of this set, int64 [n], in that order."""
        pixels = None if self.pixels is None else self.pixels[rows]
        return replace(self, positions=self.positions[rows], y=self.y[rows], pixels=pixels)

    def subset(self, n: int, *name: object) -> "ImageSet":
        """Return the first ``n`` images of an order that keeps class shares, or all where there are fewer."""
        return self.take(class_order(self.y, seed_from("subset", *name))[:n])

    def read(self, reading: Reading) -> Iterator[Batch]:
        """Iterate over one epoch."""
        return self.epoch(reading).batches(reading.places(len(self)))

    def epoch(self, reading: Reading) -> "Epoch":
        """Return the whole set in the order and with the crops of an epoch."""
        rows = torch.arange(len(self))
        if reading.shuffle:
            generator = generator_from("cpu", reading.seed, "order", reading.epoch)
            rows = torch.randperm(len(self), generator=generator)
        return Epoch(self, rows, reading, "augment")


class Epoch(Dataset):
    """Rows of a set (int64 [n]) in the order of an epoch, with their crops; ``name`` names what is drawn.

    Everything random is a function of the place, so any process can fetch any places, in any order.
    """

    def __init__(self, images: ImageSet, rows: Tensor, reading: Reading, name: str) -> None:
        reading.augmentation.check(images.shape)
        self.images, self.rows, self.reading = images, rows, reading
        self.where = (reading.seed, name, reading.epoch)
        self.crops = draw_crops(len(rows), reading.crop_padding, reading.flip, *self.where)
        self.levels = images.source.levels

    def batches(self, places: list[Tensor]) -> Iterator[Batch]:
        """Yield the images at each element of ``places`` (int64 [B] of the epoch, B >= 1) as one batch."""
        images, reading, rows = self.images, self.reading, [self.rows[place] for place in places]
        device, is_augmented = torch.device(reading.device), reading.augmentation.is_active
        fetched: Iterable[Tensor]
        if images.pixels is not None and not is_augmented:
            fetched = (images.pixels[row] for row in rows)
        else:
            dataset: Any = self if is_augmented else images
            indices = places if is_augmented else rows
            settings: dict[str, Any] = {"num_workers": images.num_workers}
            settings["pin_memory"] = device.type == "cuda"
            settings["generator"] = torch.Generator()  # else a loader advances the global random state
            fetched = DataLoader(dataset, batch_sampler=[index.tolist() for index in indices], **settings)
        # Divided by a tensor: CUDA multiplies by the reciprocal of a Python number, which is off by one bit.
        white = torch.tensor(255.0 if is_augmented else float(self.levels), device=device)
        for place, row, pixels in zip(places, rows, fetched, strict=True):
            pixels = pixels.to(device, non_blocking=True)
            if not is_augmented:
                pixels = crop(pixels, self.crops[place], reading.crop_padding)
            yield Batch(pixels.float() / white, images.y[row].to(device), images.positions[row].to(device))

    def __getitems__(self, places: list[int]) -> list[Tensor]:
        """Return augmented images at some places, 8-bit levels [C, H, W]; ``DataLoader`` calls this."""
        images, rows, reading = self.images, self.rows[places], self.reading
        if scale := reading.augmentation.crop_scale:
            seeds = [seed_from(*self.where, "crop", place) for place in places]
            crops = [images.cropped(*one, scale) for one in zip(rows.tolist(), seeds, strict=True)]
            pixels = torch.from_numpy(np.stack(crops))
        elif images.pixels is None:
            pixels = torch.from_numpy(np.stack([images[row] for row in rows.tolist()]))
        else:
            pixels = images.pixels[rows]
        if self.levels != 255 and not scale:
            pixels = (pixels * (255 / self.levels)).round().to(torch.uint8)
        pixels = crop(pixels, self.crops[places], reading.crop_padding)
        seeds = [seed_from(*self.where, "policy", place) for place in places]
        return [reading.augmentation.apply(image, seed) for image, seed in zip(pixels, seeds, strict=True)]


def class_order(labels: Tensor, seed: int) -> Tensor:
    """Return an order of the images, int64 [N], of which every beginning keeps the classes' shares.

    Images are shuffled by a 63-bit seed, then sorted by (k + 1/2) / m, where k = 0, 1, ... is the rank within
    a class of m images (the Sainte-Laguë method). Classes of equal size take turns.
    """
    # NumPy freezes the stream of RandomState for good, so a split never changes with a version of anything.
    shuffled = torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(len(labels)))
    shuffled = shuffled[torch.argsort(labels[shuffled], stable=True)]  # class after class
    sizes = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[shuffled]]
    return shuffled[torch.argsort((rank.double() + 0.5) / sizes[labels[shuffled]], stable=True)]
