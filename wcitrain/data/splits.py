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

from wcitrain.data.sets import Images, ImageSet, Source, class_order
from wcitrain.data.sources import SOURCES, Data, create_dataset, name_some
from wcitrain.data.stream import StreamSet
from wcitrain.seeding import seed_from


@dataclass(frozen=True, eq=False)
class Splits:
    """Training, validation and test images of one data set."""

    train: Images
    val: Images
    open_test: Callable[[], Images]
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height and width of an image

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.shape[0]

    @cached_property
    def test(self) -> Images:
        """The test images, for reporting and for nothing else."""
        return self.open_test()


def load_splits(data: Data) -> Splits:
    """Open a data set; raise ValueError, with the recipe key, where data are missing or do not fit."""
    if data.is_streamed:
        return _open_streams(data)
    source, val_source, open_source, num_test = SOURCES[data.source](data)
    names, labels = source.class_names, source.labels
    _check_classes(source, data.num_classes)
    check_limit("data.max_test", data.max_test, num_test)
    train = choose(labels, data.max_train, seed_from(data.split_seed, "max_train"), "data.max_train")
    if val_source is not None:
        _check_classes(val_source, len(names))
        val = torch.arange(len(val_source.labels))
    elif data.val_size >= len(train):
        rule = f"expected fewer than the {len(train)} training images. Lower it."
        raise ValueError(f"data.val_size: got {data.val_size}; {rule}")
    else:
        order = class_order(labels[train], seed_from(data.split_seed, "val"), proportional=True)
        train, val = (train[part.sort().values] for part in (order[data.val_size :], order[: data.val_size]))
    if missing := set(range(len(names))) - set(labels[train].tolist()):
        got = f"got {len(train)} training images, none of class {name_some(names[i] for i in missing)}"
        raise ValueError(f"data.max_train: {got}; expected one of each. Raise it or lower data.val_size.")

    settings: Any = {key: getattr(data, key) for key in ("image_size", "in_memory", "num_workers")}
    training = ImageSet.load(source, train, **settings)
    validation = ImageSet.load(val_source or source, val, **settings, like=training)

    def open_test() -> ImageSet:
        source = open_source()
        _check_classes(source, len(names))
        test = choose(source.labels, data.max_test, seed_from(data.split_seed, "max_test"), "data.max_test")
        return ImageSet.load(source, test, **settings, like=training)

    return Splits(training, validation, open_test, names, training.shape)


def choose(labels: Tensor, limit: int | None, seed: int, key: str) -> Tensor:
    """Return the sorted positions of all images, or of ``limit`` that take turns over known classes."""
    check_limit(key, limit, len(labels))
    if limit is None:
        return torch.arange(len(labels))
    if int(labels.min()) >= 0:
        return class_order(labels, seed)[:limit].sort().values
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return order[:limit].sort().values


def check_limit(key: str, limit: int | None, available: int) -> None:
    """Raise ValueError unless ``limit`` images can be chosen out of the available ones."""
    if limit is not None and limit > available:
        raise ValueError(f"{key}: got {limit}; expected 1 to the {available} images there are. Lower it.")


def _check_classes(source: Source, num_classes: int | None) -> None:
    """Raise ValueError if the number of classes is not the one asked for or a label is outside."""
    num, low, high = len(source.class_names), int(source.labels.min()), int(source.labels.max())
    if num_classes not in (None, num):
        rule = f"expected {num}, those of the data ({name_some(source.class_names)}). Remove it."
        raise ValueError(f"data.num_classes: got {num_classes}; {rule}")
    if low < 0 or high >= num:
        rule = f"expected 0 to {num - 1}. Choose a labelled split."
        raise ValueError(f"data.name: got labels {low} to {high}; {rule}")


def _open_streams(data: Any) -> Splits:
    """Open data sets that are read front to back; `Data` has seen to size, classes and splits."""

    def part(split: str) -> StreamSet:
        create = partial(create_dataset, data, split)
        if num_images := create().reader.num_samples:
            return StreamSet(create, num_images, data.image_size, data.num_workers)
        rule = "expected one, in the data set's _info.json or in the split. Give it."
        raise ValueError(f"data.name: got {data.name!r}, split {split!r}, without a number of images; {rule}")

    names, size = tuple(map(str, range(data.num_classes))), data.image_size
    open_test = partial(part, data.test_split)
    return Splits(part(data.train_split), part(data.val_split), open_test, names, (3, size, size))
