"""Sets of images, whose batches are a function of how they are read and of nothing else.

Images are stored as ``uint8`` levels and leave as ``x = level / levels``; normalisation belongs to the model.
There is no generator to save: an epoch's order and what happens to its k-th image are drawn anew from
``(seed, epoch)``, so an interrupted epoch continues bit for bit. An epoch is one sequence of places, cut
front to back into global batches, these into the parts of the processes and into micro-batches.

Without a policy whole batches are cropped and mirrored on the device. A policy works on one image at a time
on the CPU: crop, mirror and policy then run in ``num_workers`` processes while the device computes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wcitrain.data.augment import Augmentation, Crops
from wcitrain.data.decoding import Decoder
from wcitrain.seeding import generator_from, seed_from

MEMORY_LIMIT = 2e9  # bytes of decoded uint8 levels up to which in_memory="auto" keeps a set in memory


class Batch(NamedTuple):
    """One rank's part of a global batch, on the device that was asked for.

    ``index`` is the position of each image in its source, so that an error can name it.
    """

    x: Tensor  # float32 [B, C, H, W] in [0, 1]
    y: Tensor  # int64 [B]
    index: Tensor  # type: ignore[assignment]  # int64 [B]; hides tuple.index, which nobody needs


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
        rule = ""
        if self.drop_last and self.batch_size > num_places:
            rule = f"at most the {num_places} training images. Lower it or use more data"
        elif self.drop_last and self.batch_size % self.world:
            rule = f"a multiple of the {self.world} processes. Change one of them"
        if rule:
            raise ValueError(f"train.batch_size: got {self.batch_size}; expected {rule}.")

    def places(self, num_places: int) -> list[Tensor]:
        """Return the places of an epoch that make up each batch of this rank, int64 [B/w] each."""
        self.check(num_places)
        size, rank, world = self.batch_size, self.rank, self.world
        batches = torch.arange(num_places).split(size)
        part = slice(rank, None, world)
        if self.drop_last:
            batches = batches[: num_places // size]
            part = slice(rank * size // world, (rank + 1) * size // world)
        if not 0 <= self.start <= len(batches):
            text = f"got {self.start}; expected 0 to {len(batches)}, the batches of an epoch."
            raise ValueError(f"start: {text} Resume with the data and batch size of the interrupted run.")
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
    def subset(self, n: int) -> "Images":
        """Return ``n`` images to measure on, always the same, or all where there are fewer."""

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


@dataclass(frozen=True, eq=False)
class ImageSet(Images):
    """N labelled images in a fixed order, in memory or decoded batch by batch; build one with ``load``."""

    decoder: Decoder
    positions: Tensor  # int64 [N], in the source
    pixels: Tensor | None  # uint8 [N, C, H, W] levels, unless decoded batch by batch
    num_workers: int  # processes that decode, and that augment by a policy

    @classmethod
    def load(
        cls, decoder: Decoder, positions: Tensor, in_memory: bool | str = "auto", num_workers: int = 2
    ) -> "ImageSet":
        """Return the images at ``positions`` (int64 [N], N >= 1) of the decoder's source; only they are read.

        ``in_memory`` True decodes now, by threads, False at every use, "auto" now up to `MEMORY_LIMIT` bytes.
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
        return self.take(class_order(self.y, seed_from("subset"))[:n])

    def with_labels(self, y: Tensor) -> "ImageSet":
        """Return the same images with other labels, int64 [N]."""
        labels = self.decoder.source.labels.clone()
        labels[self.positions] = y
        decoder = copy(self.decoder)
        decoder.source = replace(decoder.source, labels=labels)
        return replace(self, decoder=decoder)

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
        reading.augmentation.check(images.decoder.shape)
        self.images, self.rows, self.reading = images, rows, reading
        self.where = (reading.seed, name, reading.epoch)
        self.crops = Crops.draw(len(rows), reading.crop_padding, reading.flip, *self.where)

    def batches(self, places: list[Tensor]) -> Iterator[Batch]:
        """Yield the images at each element of ``places`` (int64 [B] of the epoch, B >= 1) as one batch."""
        device, is_augmented = torch.device(self.reading.device), self.reading.augmentation.is_active
        # Divided by a tensor: CUDA multiplies by the reciprocal of a Python number, which is off by one bit.
        white = torch.tensor(255.0 if is_augmented else float(self._levels), device=device)
        y = self.images.y
        for place, pixels in zip(places, self._fetch(places, device), strict=True):
            row, pixels = self.rows[place], pixels.to(device, non_blocking=True)
            if not is_augmented:
                pixels = self.crops[place].apply(pixels)
            yield Batch(pixels.float() / white, y[row].to(device), self.images.positions[row].to(device))

    def _fetch(self, places: list[Tensor], device: torch.device) -> Iterable[Tensor]:
        """Return stored, or else augmented, levels at each element of ``places``, uint8 [B, C, H, W]."""
        images = self.images
        dataset: Dataset = images.decoder
        if self.reading.augmentation.is_active:
            dataset, indices = self, places
        elif images.pixels is not None:
            return (images.pixels[self.rows[place]] for place in places)
        else:
            indices = [images.positions[self.rows[place]] for place in places]
        settings: dict[str, Any] = {"num_workers": images.num_workers, "pin_memory": device.type == "cuda"}
        settings["generator"] = (
            torch.Generator()
        )  # without its own, a loader advances the global random state
        return DataLoader(dataset, batch_sampler=[index.tolist() for index in indices], **settings)

    def __getitems__(self, places: list[int]) -> list[Tensor]:
        """Return augmented images at some places, 8-bit levels [C, H, W]; ``DataLoader`` calls this."""
        images, rows = self.images, self.rows[places]
        if images.pixels is None:
            decoded = [images.decoder[int(position)] for position in images.positions[rows]]
            pixels = torch.from_numpy(np.stack(decoded))
        else:
            pixels = images.pixels[rows]
        if self._levels != 255:
            pixels = (pixels * (255 / self._levels)).round().to(torch.uint8)
        pixels = self.crops[places].apply(pixels)
        seeds = [seed_from(*self.where, "policy", place) for place in places]
        apply = self.reading.augmentation.apply
        return [apply(image, seed) for image, seed in zip(pixels, seeds, strict=True)]

    @property
    def _levels(self) -> int:
        return self.images.decoder.source.levels


def _decode_all(decoder: Decoder, positions: Tensor, num_workers: int) -> Tensor:
    """Decode images with threads into one uint8 [N, C, H, W]."""
    pixels = np.empty((len(positions), *decoder.shape), dtype=np.uint8)

    def fill(rows: Tensor) -> None:
        for row in rows.tolist():
            pixels[row] = decoder[int(positions[row])]

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        # Many short tasks, so that a broken image stops the work soon; list() raises what a thread raised.
        list(pool.map(fill, torch.arange(len(positions)).split(64)))
    return torch.from_numpy(pixels)


def class_order(labels: Tensor, seed: int, *, proportional: bool = False) -> Tensor:
    """Return an order of the images, int64 [N], of which every beginning is fair to the classes.

    Images are shuffled by a 63-bit seed, then sorted by a key of their rank k = 0, 1, ... within a class of
    m images: k itself, so that classes take turns (round robin), or, if ``proportional``, (k + 1/2) / m, so
    that classes keep their shares (the Sainte-Laguë method).
    """
    # NumPy freezes the stream of RandomState for good, so a split never changes with a version of anything.
    shuffled = torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(len(labels)))
    shuffled = shuffled[torch.argsort(labels[shuffled], stable=True)]  # class after class
    sizes = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[shuffled]]
    key = (rank.double() + 0.5) / sizes[labels[shuffled]] if proportional else rank
    return shuffled[torch.argsort(key, stable=True)]
