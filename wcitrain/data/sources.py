"""Data sets by name: where images, labels and class names come from, before any is chosen or decoded."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wcitrain.data.folders import is_litter, scan_folder
from wcitrain.data.pixels import ArraySource, Source, open_rgb
from wcitrain.data.sets import class_order
from wcitrain.method import Count, PositiveCount, Text, method, refuse, setting, show
from wcitrain.seeding import seed_from
from wcitrain.text import name_some

SourceName = Literal["digits", "cifar10", "cifar100", "svhn", "folder", "timm"]
# Training; validation, None where it is cut from training; test, opened later; the number of test images.
Opened = tuple[Source, Source | None, Callable[[], Source], int]
GRAY = ("torch/mnist", "torch/kmnist", "torch/fashion_mnist", "torch/qmnist")  # of timm's data sets


@method
class Data:
    """Which images are read and how they are split.

    ``digits`` are scikit-learn's, 8x8, 1,000 and 797 for testing; ``cifar10``, ``cifar100`` and ``svhn`` are
    torchvision's; ``folder`` reads ``root/<split>/<class>/<image>``; ``timm`` opens ``name``, such as
    "hfds/<user>/<set>". Names that begin with wds/, tfds/ or hfids/ are read front to back (`StreamSet`).
    """

    source: SourceName = setting("digits", "Where images come from; digits needs no files.")
    root: Text | None = setting(None, "Folder with the data; every source but digits needs it.")
    name: Text | None = setting(None, "Data set name for timm.data.create_dataset; only with source timm.")
    train_split: Text = setting("train", "Name of the training split.")
    test_split: Text = setting("test", "Name of the test split.")
    val_split: Text | None = setting(None, "Name of a validation split; null cuts one from training images.")
    download: bool = setting(False, "Fetch the data set when it is not under root.")
    num_classes: PositiveCount | None = setting(None, "Number of classes; null takes it from the data.")
    image_size: PositiveCount | None = setting(None, "Side of the square all of an image is resized to.")
    channels: Literal[1, 3] | None = setting(None, "1: gray, 3: RGB; null: 1 for digits and *mnist, else 3.")
    max_train: PositiveCount | None = setting(None, "Training images kept, in class shares; null: all.")
    max_test: PositiveCount | None = setting(None, "Test images kept, in class shares; null: all.")
    val_size: PositiveCount = setting(200, "Validation images cut from the training images, in class shares.")
    split_seed: Count = setting(0, "Seed of the subsets and of the validation cut.")
    in_memory: Literal[True, False, "auto"] = setting("auto", "Keep decoded images; auto: up to 2 GB.")
    crop_padding: Count = setting(0, "Zero padding before the random crop, in pixels; 0 does not crop.")
    flip: bool = setting(False, "Flip training images left to right at random.")
    num_workers: Count = setting(2, "Workers that decode images.")

    def __post_init__(self) -> None:
        name, splits = (self.name or "").lower(), (self.train_split, self.test_split, self.val_split)
        if self.source == "digits" and (self.root or self.download):
            key = "root" if self.root else "download"
            rule = "expected the default: digits are embedded. Remove it, or set data.source."
            refuse(key, f"got {show(getattr(self, key))} with source digits; {rule}")
        is_here = self.source == "digits" or name.startswith(("hfds/", "hfids/", "tfds/"))
        if self.root is None and not is_here:
            refuse("root", f"got null with source {self.source}; expected a folder. Set data.root.")
        if bool(name) != (self.source == "timm"):
            rule = "expected a data set name with timm alone. Change data.name or data.source."
            refuse("name", f"got {show(self.name)} with source {self.source}; {rule}")
        if len(set(splits)) < 3:
            refuse("test_split", f"got splits {name_some(splits)}; expected different ones. Rename one.")
        if self.source not in ("folder", "timm") and splits != ("train", "test", None):
            rule = f"expected none, as {self.source} has splits of its own. Remove all."
            refuse("train_split", f"got splits {name_some(splits)}; {rule}")
        if self.is_streamed and None in (self.val_split, self.image_size, self.num_classes):
            rule = "expected val_split, image_size and num_classes. Set all."
            refuse("val_split", f"got {name}, which is read front to back; {rule}")
        if self.is_streamed and (self.max_train or self.max_test or self.in_memory is True):
            rule = "expected no max_train, max_test or in_memory. Remove them."
            refuse("max_train", f"got {name}, which is read front to back; {rule}")

    @property
    def num_channels(self) -> int:
        """Channels of an image, C."""
        return self.channels or (1 if self.source == "digits" or (self.name or "").lower() in GRAY else 3)

    @property
    def is_streamed(self) -> bool:
        """Whether images can only be read front to back."""
        return (self.name or "").lower().startswith(("wds/", "tfds/", "hfids/"))


def open_digits(data: Data) -> Opened:
    """Open the 1,797 digits of scikit-learn; 797 of them, the same for ever, are the test images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels, labels, levels = digits.images.astype(np.uint8), torch.from_numpy(digits.target).long(), 16
    if data.image_size not in (None, pixels.shape[1]):  # interpolation between 17 levels would be coarse
        pixels, levels = np.round(digits.images * (255 / 16)).astype(np.uint8), 255
    order = class_order(labels, seed_from("digits test split"))
    names = tuple(str(name) for name in digits.target_names)

    def part(positions: Tensor, title: str) -> ArraySource:
        positions = positions.sort().values
        return ArraySource(labels[positions], names, title, pixels[positions.numpy()], levels=levels)

    return part(order[797:], "digits train"), None, lambda: part(order[:797], "digits test"), 797


def open_torchvision(kind: str, data: Data) -> Opened:
    """Open CIFAR10, CIFAR100 or SVHN below ``data.root``."""
    import torchvision

    def part(split: str) -> ArraySource:
        which: dict[str, Any] = {"split": split} if kind == "SVHN" else {"train": split == "train"}
        try:
            images = getattr(torchvision.datasets, kind)(data.root, download=data.download, **which)
        except RuntimeError as error:
            rule = f"expected the files of {kind}. Correct it, or set data.download=true."
            raise ValueError(f"data.root: got {data.root} ({error}); {rule}") from error
        names, title = tuple(getattr(images, "classes", map(str, range(10)))), f"{kind} {split}"
        pixels, labels = images.data, torch.as_tensor(images.labels if kind == "SVHN" else images.targets)
        pixels = pixels.transpose(0, 2, 3, 1) if kind == "SVHN" else pixels
        return ArraySource(labels, names, title, pixels)

    return part("train"), None, partial(part, "test"), 26_032 if kind == "SVHN" else 10_000


def open_folder(data: Data) -> Opened:
    """List the files of ``root/<split>/<class>/``; the training split numbers the classes."""
    splits = [split for split in (data.train_split, data.val_split, data.test_split) if split is not None]
    folders = [Path(str(data.root), split) for split in splits]
    if len({folder.resolve() for folder in folders}) < len(folders):
        rule = "expected different ones: selecting on test images is selecting the result. Rename one."
        raise ValueError(f"data.test_split: got one folder for two of {name_some(splits)}; {rule}")
    if missing := [folder for folder in folders if not folder.is_dir()]:
        rule = f"{missing[0]}/<class>/<image>. Correct data.root, or the names of the splits."
        raise ValueError(f"data.root: got {data.root}; expected images as {rule}")
    train = scan_folder(folders[0])
    *val, test = [scan_folder(folder, train.class_names) for folder in folders[1:]]
    return train, val[0] if val else None, lambda: test, len(test.labels)


@dataclass(frozen=True, eq=False)
class DatasetSource(Source):
    """A map-style data set opened by ``timm.data.create_dataset``, decoded to RGB when it is read."""

    dataset: Any  # timm ImageDataset, which has a reader, or a torchvision data set, which has not
    rows: list[int]  # where each image is in ``dataset``, which holds litter too

    def file(self, position: int) -> str | None:
        """Return the path of the image's own file; None where it is inside an archive or a table."""
        path = super().file(position)
        return path if path and os.path.isfile(path) else None

    def read(self, position: int) -> Image.Image:
        """Return one image; timm's own __getitem__ replaces an unreadable one by the next."""
        where, row = self.locate(position), self.rows[position]
        if hasattr(self.dataset, "reader"):
            with self.dataset.reader[row][0] as file:
                return open_rgb(file, where)
        return open_rgb(where, where) if self.file(position) else self.dataset[row][0].convert("RGB")


def open_timm(data: Data) -> Opened:
    """Open map-style data sets through timm, and refuse what timm would quietly mix up."""
    keys = ("train_split", "test_split", "val_split")
    splits: dict[str, str] = {key: split for key in keys if (split := getattr(data, key)) is not None}
    sources: dict[str, DatasetSource] = {}
    for key, split in splits.items():
        dataset = create_dataset(data, split)
        # torchvision sets know train and not train; timm takes any unknown name for the latter.
        is_train = getattr(dataset, "train", None)
        if is_train is not None and (key == "val_split" or is_train != (key == "train_split")):
            got = f"got {split!r}, which is the {'training' if is_train else 'test'} split of {data.name}"
            raise ValueError(f"data.{key}: {got}; expected train, test and no val_split. Change it.")
        sources[key] = _source(dataset, f"{data.name} {split}")
        names, wanted = sources[key].class_names, sources["train_split"].class_names
        if names != wanted:
            rule = f"expected those of the training split, {name_some(wanted)}. Make them equal."
            raise ValueError(f"data.{key}: got classes {name_some(names)}; {rule}")
    for other, key in combinations(sources, 2):
        # timm reads all of root when it finds no folder for a split.
        one, two = sources[other].place, sources[key].place
        if not isinstance(one, str) and set(one) & set(two):
            got = f"got {splits[key]!r}, which shares images with data.{other}={splits[other]!r}"
            raise ValueError(f"data.{key}: {got}; expected a folder for each split. Correct the names.")
    test = sources["test_split"]
    return sources["train_split"], sources.get("val_split"), lambda: test, len(test.labels)


def create_dataset(data: Data, split: str, **settings: Any) -> Any:
    """Return ``timm.data.create_dataset(...)`` of one split."""
    import timm.data

    settings |= {"root": data.root, "split": split, "download": data.download}
    if str(data.name).lower() in ("torch/folder", "torch/image_folder"):
        settings["allow_empty"] = True  # a hidden folder is no class; classes are compared here
    return timm.data.create_dataset(str(data.name), **settings)


def _source(dataset: Any, title: str) -> DatasetSource:
    """Return a map-style data set with its labels, without decoding an image if the data set allows."""
    holder = getattr(dataset, "reader", dataset)
    if hasattr(holder, "targets"):
        labels = holder.targets
    elif hasattr(holder, "iter_targets"):
        labels = list(holder.iter_targets())
    else:
        labels = [label for _, label in getattr(holder, "samples", holder)]
    numbers = torch.as_tensor(labels).long()
    class_to_idx = getattr(holder, "class_to_idx", getattr(holder, "class_name_to_idx", None))
    names = sorted(class_to_idx, key=class_to_idx.get) if class_to_idx else range(int(numbers.max()) + 1)
    if not hasattr(holder, "samples"):
        return DatasetSource(numbers, tuple(map(str, names)), title, dataset, list(range(len(numbers))))
    # A folder or an archive: images have names, and what is litter has been read as images and classes.
    is_timm, root = holder is not dataset, os.path.join(getattr(holder, "root", ""), "")
    place = dataset.filenames(absolute=True) if is_timm else [path for path, _ in holder.samples]
    rows = [row for row, path in enumerate(place) if not is_litter(path.removeprefix(root))]
    of_litter = set(numbers.tolist()) - set(numbers[rows].tolist())  # timm: the last folder is the class
    kept = [n for n, name in enumerate(names) if n not in of_litter and not is_litter(str(name))]
    renumbered = torch.full((len(names),), -1)
    renumbered[kept] = torch.arange(len(kept))
    kept_names = tuple(str(names[number]) for number in kept)
    return DatasetSource(renumbered[numbers[rows]], kept_names, [place[row] for row in rows], dataset, rows)


SOURCES: dict[str, Callable[[Data], Opened]] = {
    "digits": open_digits,
    "cifar10": partial(open_torchvision, "CIFAR10"),
    "cifar100": partial(open_torchvision, "CIFAR100"),
    "svhn": partial(open_torchvision, "SVHN"),
    "folder": open_folder,
    "timm": open_timm,
}
