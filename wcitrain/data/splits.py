"""The split of a data set into training, validation and test images in [0, 1].

Test images are opened at the first use of ``Splits.test``, so that training cannot look at them by accident.
Which images are used depends on ``split_seed`` alone, and only they are decoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor

from wcitrain.data.pixels import Source
from wcitrain.data.sets import Images, ImageSet, class_order
from wcitrain.data.sources import SOURCES, Data, create_dataset
from wcitrain.data.stream import StreamSet
from wcitrain.seeding import seed_from
from wcitrain.text import name_some


@dataclass(frozen=True, eq=False)
class Splits:
    """Training, validation and test images of one data set."""

    train: Images
    val: Images
    open_test: Callable[[], Images]  # not yet decoded
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height and width of an image
    in_memory: bool | str = "auto"  # whether test images are kept decoded, as the others are

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.shape[0]

    @cached_property
    def test_files(self) -> Images:
        """The test images as they lie there, for checks of names, labels and files; nothing is decoded."""
        return self.open_test()

    @cached_property
    def test(self) -> Images:
        """The test images, for reporting and for nothing else."""
        test = self.test_files
        return test.decoded(self.in_memory) if isinstance(test, ImageSet) else test

    def part(self, split: str) -> Images:
        """Return the images of ``"train"``, ``"val"`` or ``"test"``, the last not decoded."""
        return self.test_files if split == "test" else cast(Images, getattr(self, split))

    def renumbered(self, numbers: Sequence[int], class_names: Sequence[str]) -> "Splits":
        """Return the same images with other class numbers: ``numbers[c]`` for c, one of ``class_names``."""
        to, names = torch.tensor(numbers), tuple(class_names)

        def part(images: Any) -> Any:
            if not isinstance(images, ImageSet):
                rule = "expected the model's. Give data with class names that are not read front to back."
                raise ValueError(f"data.name: got a stream whose classes are in another order; {rule}")
            source = replace(images.source, labels=to[images.source.labels], class_names=names)
            return replace(images, source=source, y=to[images.y])

        parts: dict[str, Any] = {"train": part(self.train), "val": part(self.val)}
        return replace(self, **parts, open_test=lambda: part(self.open_test()), class_names=names)


def is_count(names: Sequence[str]) -> bool:
    """Return whether names of classes only count: 0, 1, ... They stand for names that are not known."""
    return list(names) == [str(number) for number in range(len(names))]


def match_classes(
    model: Sequence[str] | None, data: Sequence[str], where: str
) -> tuple[list[int], str | None]:
    """Match the classes of a model (None: unknown) and of data by name.

    Returns the model's number of every class of the data, and what there is to say, if anything. ValueError,
    which begins with ``where``, for classes that the model does not have.
    """
    same = list(range(len(data)))
    if model is not None and set(data) <= set(model):
        numbers = [list(model).index(name) for name in data]
        text = f"{name_some(data)} of the data are the model's {name_some(numbers)}"
        return numbers, None if list(model) == list(data) else f"classes are matched by name: {text}"
    if is_count(data) or model is None or is_count(model):
        whose, known = ("data's", model) if is_count(data) else ("model's", data)
        text = f"the names of the {whose} classes are not known: they are taken in the order"
        return same, f"{text} {name_some(known)}" if known else None
    lacking = [name for name in data if name not in model]
    got = f"got data of the classes {name_some(data, 30)}, where {name_some(lacking, 30)} are not the model's"
    rule = f"expected its own, {name_some(model, 30)}. Rename the data's, or give other data."
    raise ValueError(f"{where}: {got}; {rule}")


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
        order = class_order(labels[train], seed_from(data.split_seed, "val"))
        train, val = (train[part.sort().values] for part in (order[data.val_size :], order[: data.val_size]))
    if missing := set(range(len(names))) - set(labels[train].tolist()):
        got = f"got {len(train)} training images, none of class {name_some(names[i] for i in missing)}"
        raise ValueError(f"data.max_train: {got}; expected one of each. Raise it or lower data.val_size.")

    settings: Any = {key: getattr(data, key) for key in ("image_size", "num_workers")}
    training = ImageSet.load(source, train, **settings, in_memory=data.in_memory, channels=data.num_channels)
    validation = ImageSet.load(val_source or source, val, **settings, in_memory=data.in_memory, like=training)

    def open_test() -> ImageSet:
        source = open_source()
        _check_classes(source, len(names))
        test = choose(source.labels, data.max_test, seed_from(data.split_seed, "max_test"), "data.max_test")
        return ImageSet.load(source, test, **settings, in_memory=False, like=training)

    return Splits(training, validation, open_test, names, training.shape, data.in_memory)


def choose(labels: Tensor, limit: int | None, seed: int, key: str) -> Tensor:
    """Return the sorted positions of all images, or of ``limit`` in the shares of known classes."""
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
            return StreamSet(create, num_images, data.image_size, data.num_workers, data.num_channels)
        rule = "expected one, in the data set's _info.json or in the split. Give it."
        raise ValueError(f"data.name: got {data.name!r}, split {split!r}, without a number of images; {rule}")

    names, size = tuple(map(str, range(data.num_classes))), data.image_size
    train, val, open_test = part(data.train_split), part(data.val_split), partial(part, data.test_split)
    return Splits(train, val, open_test, names, (data.num_channels, size, size))
