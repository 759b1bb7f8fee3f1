"""The split of a data set into training, validation and test images in [0, 1].

Test images are opened at the first use of ``Splits.test``, so that training cannot look at them by accident.
Which images are used depends on ``split_seed`` alone, and only they are decoded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from wcitrain.data.decoding import Decoder, Source
from wcitrain.data.sets import Images, ImageSet, class_order
from wcitrain.data.settings import Data
from wcitrain.data.sources import SOURCES, create_dataset, name_some
from wcitrain.data.stream import StreamSet
from wcitrain.seeding import seed_from


@dataclass(frozen=True, eq=False)
class Splits:
    """Training, validation and test images of one data set."""

    train: Images
    val: Images
    open_test: Callable[[], Images]
    num_classes: int
    in_chans: int
    image_size: int | tuple[int, int]  # side in pixels of square images, else (height, width)
    class_names: tuple[str, ...]

    @cached_property
    def test(self) -> Images:
        """The test images, for reporting and for nothing else."""
        return self.open_test()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        size = self.image_size
        return (self.in_chans, *(size if isinstance(size, tuple) else (size, size)))


def load_splits(data: Data) -> Splits:
    """Open a data set; raise ValueError, with the recipe key, where data are missing or do not fit."""
    if data.is_streamed:
        return _open_streams(data)
    opened = SOURCES[data.source](data)
    num_classes = _check_classes(opened.train, data.num_classes)
    labels = opened.train.labels
    train = choose(labels, data.max_train, seed_from(data.split_seed, "max_train"), "data.max_train")
    check_limit("data.max_test", data.max_test, opened.num_test)
    if opened.val is not None:
        _check_classes(opened.val, num_classes)
        val = torch.arange(len(opened.val.labels))
    else:
        if data.val_size >= len(train):
            text = f"got {data.val_size}; expected fewer than the {len(train)} training images. Lower it."
            raise ValueError(f"data.val_size: {text}")
        order = class_order(labels[train], seed_from(data.split_seed, "val"), proportional=True)
        train, val = (train[part.sort().values] for part in (order[data.val_size :], order[: data.val_size]))
    counts = torch.bincount(labels[train], minlength=num_classes)
    if missing := [opened.train.class_names[i] for i in torch.nonzero(counts == 0).flatten().tolist()]:
        key = "data.val_size" if data.max_train is None else "data.max_train"
        text = f"got {len(train)} training images, none of class {name_some(missing)}; expected one of each."
        raise ValueError(f"{key}: {text} Raise data.max_train or lower data.val_size.")

    load = partial(ImageSet.load, in_memory=data.in_memory, num_workers=data.num_workers)
    decoder = Decoder(opened.train, data.image_size, first=int(train[0]))
    val_decoder = decoder if opened.val is None else Decoder(opened.val, data.image_size, like=decoder)

    def open_test() -> ImageSet:
        source = opened.open_test()
        _check_classes(source, num_classes)
        test = choose(source.labels, data.max_test, seed_from(data.split_seed, "max_test"), "data.max_test")
        return load(Decoder(source, data.image_size, like=decoder), test)

    channels, height, width = decoder.shape
    size = height if height == width else (height, width)
    sets = load(decoder, train), load(val_decoder, val)
    return Splits(*sets, open_test, num_classes, channels, size, opened.train.class_names)


def choose(labels: Tensor, limit: int | None, seed: int, key: str) -> Tensor:
    """Return the sorted positions of all images, or of ``limit`` that take turns over the classes."""
    check_limit(key, limit, len(labels))
    return torch.arange(len(labels)) if limit is None else class_order(labels, seed)[:limit].sort().values


def check_limit(key: str, limit: int | None, available: int) -> None:
    """Raise ValueError unless ``limit`` images can be chosen out of the available ones."""
    if limit is not None and limit > available:
        text = f"got {limit}; expected 1 to the {available} images there are. Lower it or remove it."
        raise ValueError(f"{key}: {text}")


def _check_classes(source: Source, num_classes: int | None) -> int:
    """Return the number of classes; raise ValueError if it is not the one asked for or a label is outside."""
    num = len(source.class_names)
    if num_classes not in (None, num):
        text = f"got {num_classes}; expected {num}, those of the data ({name_some(source.class_names)})."
        raise ValueError(f"data.num_classes: {text} Remove it or change the data.")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= num:
        text = f"got labels {low} to {high}; expected 0 to {num - 1}. Choose a labelled split."
        raise ValueError(f"data.name: {text}")
    return num


def _open_streams(data: Data) -> Splits:
    """Open data sets that are read front to back."""
    size: Any = data.image_size  # neither is None for a stream, see `Data`
    num_classes: Any = data.num_classes

    def part(split: str) -> StreamSet:
        create = partial(create_dataset, data, split)
        if num_images := create().reader.num_samples:
            return StreamSet(create, num_images, size, data.num_workers)
        text = f"got {data.name!r}, split {split!r}, without a number of images; expected one."
        raise ValueError(f"data.name: {text} Give it in the data set's _info.json, or in the split.")

    sets, names = (part(data.train_split), part(str(data.val_split))), tuple(map(str, range(num_classes)))
    return Splits(*sets, partial(part, data.test_split), num_classes, 3, size, names)
