"""Data sets by name and their split into training, validation and test images in [0, 1].

The test images stay where they are until somebody asks for ``Splits.test``, so that training cannot look at
them by accident. Validation images are cut from the training images or come from a split of their own; they
are never the test images. Which images are used depends on ``split_seed`` alone, and only they are decoded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from wcitrain.data.decoding import Decoder, Source
from wcitrain.data.loader import Batch, ImageSet, class_order
from wcitrain.data.sources import Opened, name_some, open_digits, open_folder, open_torchvision
from wcitrain.data.stream import StreamSet
from wcitrain.data.timm_source import create_dataset, open_timm
from wcitrain.seeding import seed_from

__all__ = ["SOURCES", "Batch", "ImageSet", "Splits", "StreamSet", "load_splits", "seed_from"]

ITERABLE_PREFIXES = ("wds", "tfds", "hfids")  # of timm data sets that can only be read front to back


SOURCES: dict[str, Callable[..., Opened]] = {
    "digits": open_digits,
    "cifar10": partial(open_torchvision, "CIFAR10"),
    "cifar100": partial(open_torchvision, "CIFAR100"),
    "svhn": partial(open_torchvision, "SVHN"),
    "folder": open_folder,
    "timm": open_timm,
}


@dataclass(frozen=True, eq=False)
class Splits:
    """Training, validation and test images of one data set; ``test`` is read at its first use.

    ``image_size`` is the side in pixels of square images, else (height, width).
    """

    train: ImageSet | StreamSet
    val: ImageSet | StreamSet
    open_test: Callable[[], ImageSet | StreamSet]
    num_classes: int
    in_chans: int
    image_size: int | tuple[int, int]
    class_names: tuple[str, ...]

    @cached_property
    def test(self) -> ImageSet | StreamSet:
        """The test images, for reporting and for nothing else."""
        return self.open_test()


def load_splits(
    source: str = "digits",
    *,
    root: str | None = None,
    name: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    val_split: str | None = None,
    download: bool = False,
    num_classes: int | None = None,
    image_size: int | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    val_size: int = 200,
    split_seed: int = 0,
    in_memory: bool | Literal["auto"] = "auto",
    num_workers: int = 2,
) -> Splits:
    """Open a data set and return its splits; all that can be wrong with the settings is raised here.

    Args:
        source: "digits" (1,797 gray 8x8 images that come with scikit-learn; 797 are for testing), "cifar10",
            "cifar100", "svhn" (torchvision), "folder" (``root/<split>/<class>/<image>``) or "timm".
        root: Folder of the data; all sources but digits need one.
        name: For timm: what ``timm.data.create_dataset`` opens, such as "hfds/<user>/<set>". Names that begin
            with wds/, tfds/ or hfids/ are read front to back and need ``val_split``, ``image_size`` and
            ``num_classes``; resuming them is exact at epoch boundaries only (``StreamSet``).
        train_split: Folder or name of the training split (folder, timm).
        test_split: Folder or name of the test split (folder, timm).
        val_split: Folder or name of a split used whole for validation; by default ``val_size`` are cut.
        download: Fetch missing data (cifar10, cifar100, svhn, timm). Let one process go before the others.
        num_classes: Checked against the data; needed only where those cannot tell.
        image_size: Side in pixels to which images are resized, aspect ratio not kept; None keeps their size.
        max_train: Use so many training images (by default all), in turns over the classes, before the cut.
        max_test: The same for the test images.
        val_size: Images cut from the training images, in proportion to the classes.
        split_seed: Chooses the images of ``max_train``, ``max_test`` and ``val_size``.
        in_memory: True decodes a split once, False at every use, "auto" once up to 2 GB of uint8 levels.
        num_workers: Threads, or processes when not in memory, that decode.

    Raises:
        ValueError: The data are missing or not usable, or settings contradict them; the recipe key is named.
    """
    if source not in SOURCES:
        raise ValueError(f"data.source: got {source!r}; expected one of {', '.join(SOURCES)}. Choose one.")
    if source != "digits" and root is None and not (source == "timm" and _is_remote(name)):
        raise ValueError(f"data.root: got None; expected the folder of data.source={source}. Set data.root.")
    splits = [split for split in (train_split, val_split, test_split) if split is not None]
    if len(set(splits)) < len(splits):
        raise ValueError(
            f"data.test_split: got splits {name_some(splits)}; expected different ones. Rename one."
        )
    if source not in ("folder", "timm") and (train_split, val_split, test_split) != ("train", None, "test"):
        raise ValueError(
            f"data.train_split: got splits {name_some(splits)}; expected the defaults, as {source} has "
            "splits of its own. Remove data.train_split, data.val_split and data.test_split."
        )
    if num_workers < 0:
        raise ValueError(f"data.num_workers: got {num_workers}; expected at least 0. Use 0 for no workers.")
    where: dict[str, Any] = {"root": root, "name": name, "download": download, "image_size": image_size}
    where |= {"train_split": train_split, "val_split": val_split, "test_split": test_split}
    if source == "timm" and (name or "").split("/")[0].lower() in ITERABLE_PREFIXES:
        if max_train is not None or max_test is not None or in_memory is True:
            raise ValueError(
                f"data.name: got {name!r} with max_train={max_train}, max_test={max_test}, "
                f"in_memory={in_memory}; expected none of these for data read front to back. Remove them."
            )
        return _open_streams(num_classes=num_classes, num_workers=num_workers, **where)

    opened = SOURCES[source](**where)
    num_classes = _check_classes(opened.train, num_classes)
    train = _choose(opened.train.labels, max_train, seed_from(split_seed, "max_train"), "data.max_train")
    _check_subset("data.max_test", max_test, opened.num_test)
    if opened.val is not None:
        _check_classes(opened.val, num_classes)
    else:
        train, val = _cut_validation(opened.train.labels, train, val_size, seed_from(split_seed, "val"))
    _check_every_class_is_trained(
        opened.train, train, num_classes, "data.val_size" if max_train is None else "data.max_train"
    )

    load = partial(ImageSet.load, in_memory=in_memory, num_workers=num_workers)
    decoder = Decoder(opened.train, image_size, first=int(train[0]))
    val_decoder = decoder if opened.val is None else Decoder(opened.val, image_size, like=decoder)

    def open_test() -> ImageSet:
        test_source = opened.open_test()
        _check_classes(test_source, num_classes)
        test = _choose(test_source.labels, max_test, seed_from(split_seed, "max_test"), "data.max_test")
        return load(Decoder(test_source, image_size, like=decoder), test)

    channels, height, width = decoder.shape
    return Splits(
        train=load(decoder, train),
        val=load(val_decoder, val if opened.val is None else torch.arange(len(opened.val.labels))),
        open_test=open_test,
        num_classes=num_classes,
        in_chans=channels,
        image_size=height if height == width else (height, width),
        class_names=opened.train.class_names,
    )


def _choose(labels: Tensor, limit: int | None, seed: int, key: str) -> Tensor:
    """Return the sorted positions of all images, or of ``limit`` that take turns over the classes."""
    _check_subset(key, limit, len(labels))
    return torch.arange(len(labels)) if limit is None else class_order(labels, seed)[:limit].sort().values


def _cut_validation(labels: Tensor, positions: Tensor, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sorted positions of training and of ``val_size`` validation images, in class proportions."""
    if not 1 <= val_size < len(positions):
        raise ValueError(
            f"data.val_size: got {val_size}; expected at least 1 and fewer than the {len(positions)} "
            "training images. Change data.val_size or raise data.max_train."
        )
    order = class_order(labels[positions], seed, proportional=True)
    return positions[order[val_size:].sort().values], positions[order[:val_size].sort().values]


def _check_subset(key: str, limit: int | None, available: int) -> None:
    """Raise ValueError unless ``limit`` images can be chosen out of the available ones."""
    if limit is not None and not 1 <= limit <= available:
        raise ValueError(
            f"{key}: got {limit}; expected 1 to the {available} images there are. Lower it or remove it."
        )


def _check_classes(source: Source, num_classes: int | None) -> int:
    """Return the number of classes; raise ValueError if it is not the one asked for or a label is outside."""
    found = len(source.class_names)
    if num_classes not in (None, found):
        raise ValueError(
            f"data.num_classes: got {num_classes}; expected {found}, the classes of the data "
            f"({name_some(source.class_names)}). Remove data.num_classes or change the data."
        )
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= found:
        raise ValueError(
            f"data.name: got labels {low} to {high}; expected 0 to {found - 1}. "
            "Choose a split in which all images are labelled."
        )
    return found


def _check_every_class_is_trained(source: Source, train: Tensor, num_classes: int, key: str) -> None:
    """Raise ValueError if a class has no training image left."""
    counts = torch.bincount(source.labels[train], minlength=num_classes)
    if missing := [source.class_names[i] for i in torch.nonzero(counts == 0).flatten().tolist()]:
        raise ValueError(
            f"{key}: got {len(train)} training images, none of class {name_some(missing)}; expected at "
            f"least one of each of the {num_classes}. Raise data.max_train or lower data.val_size."
        )


def _open_streams(
    *,
    name: str,
    root: str | None,
    train_split: str,
    val_split: str | None,
    test_split: str,
    download: bool,
    image_size: int | None,
    num_classes: int | None,
    num_workers: int,
) -> Splits:
    """Open data sets that are read front to back; what cannot be looked up must be given."""
    given = {"val_split": val_split, "image_size": image_size, "num_classes": num_classes}
    if val_split is None or image_size is None or num_classes is None:
        missing = ", ".join(f"data.{key}" for key, value in given.items() if value is None)
        raise ValueError(
            f"{missing}: got None; expected a value, as {name} is read front to back. Set {missing}."
        )

    def part(split: str) -> StreamSet:
        create = partial(create_dataset, name, root, split, download)
        num_images = create().reader.num_samples
        if not num_images:
            raise ValueError(
                f"data.name: got {name!r}, split {split!r}, without a number of images; expected one. "
                "Give it in the data set's _info.json, or in the split as timm describes."
            )
        return StreamSet(create, num_images, image_size, num_workers)

    names = tuple(map(str, range(num_classes)))
    return Splits(
        part(train_split), part(val_split), partial(part, test_split), num_classes, 3, image_size, names
    )


def _is_remote(name: str | None) -> bool:
    """Tell whether a timm data set is looked up by name, so that ``root`` is only where it is stored."""
    return (name or "").split("/")[0].lower() in ("hfds", "hfids", "tfds")
