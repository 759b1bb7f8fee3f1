"""Data sets by name: where images, labels and class names come from, before any is chosen or decoded."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wcitrain.data.decoding import ArraySource, FileSource, Source, open_rgb
from wcitrain.data.sets import class_order
from wcitrain.data.settings import Data
from wcitrain.seeding import seed_from

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class Opened(NamedTuple):
    """What a source holds before anything is selected; ``val`` is None where it is cut from ``train``."""

    train: Source
    val: Source | None
    open_test: Callable[[], Source]
    num_test: int


def open_digits(data: Data) -> Opened:
    """Open the 1,797 digits of scikit-learn; 797 of them, the same for ever, are the test images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels, labels, levels = digits.images.astype(np.uint8), torch.from_numpy(digits.target).long(), 16
    if data.image_size not in (None, pixels.shape[1]):  # interpolation between 17 levels would be coarse
        pixels, levels = np.round(digits.images * (255 / 16)).astype(np.uint8), 255
    order = class_order(labels, seed_from("digits test split"), proportional=True)
    names = tuple(str(name) for name in digits.target_names)

    def part(positions: Tensor, title: str) -> ArraySource:
        positions = positions.sort().values
        return ArraySource(labels[positions], names, pixels[positions.numpy()], title, levels=levels)

    return Opened(part(order[797:], "digits train"), None, lambda: part(order[:797], "digits test"), 797)


def open_torchvision(kind: str, data: Data) -> Opened:
    """Open CIFAR10, CIFAR100 or SVHN below ``data.root``."""
    import torchvision

    def part(split: str) -> ArraySource:
        which: dict[str, Any] = {"split": split} if kind == "SVHN" else {"train": split == "train"}
        try:
            images = getattr(torchvision.datasets, kind)(data.root, download=data.download, **which)
        except RuntimeError as error:
            text = f"got {data.root} without {kind}, or with a damaged one ({error}); expected its files."
            raise ValueError(f"data.root: {text} Correct it, or set data.download=true.") from error
        if kind == "SVHN":
            pixels, labels = images.data.transpose(0, 2, 3, 1), images.labels
        else:
            pixels, labels = images.data, images.targets  # [N, H, W, 3]
        names = tuple(getattr(images, "classes", map(str, range(10))))
        return ArraySource(torch.as_tensor(labels).long(), names, pixels, f"{kind} {split}")

    return Opened(part("train"), None, partial(part, "test"), 26_032 if kind == "SVHN" else 10_000)


# ---- folders -----------------------------------------------------------------------------------------------


def open_folder(data: Data) -> Opened:
    """List the files of ``root/<split>/<class>/``; the training split numbers the classes."""
    root = Path(str(data.root))
    splits = (data.train_split, data.val_split, data.test_split)
    folders = [root / split for split in splits if split is not None]
    for folder in folders:
        if not folder.is_dir():
            there = name_some(sorted(path.name for path in root.glob("*"))) or "nothing"
            text = f"got no folder {folder} ({root} holds {there}); expected one for each split."
            raise ValueError(f"data.root: {text} Correct it, or data.train_split, val_split or test_split.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        text = f"got splits {name_some(folders)}, two of which are one folder; expected different ones:"
        raise ValueError(f"data.test_split: {text} selecting on test images is selecting the result.")
    train = scan_folder(folders[0])
    *val, test = [scan_folder(folder, train.class_names) for folder in folders[1:]]
    return Opened(train, val[0] if val else None, lambda: test, len(test.labels))


def scan_folder(folder: Path, classes: tuple[str, ...] | None = None, key: str = "data.root") -> FileSource:
    """List ``folder/<class>/**/<image>``; nothing is decoded and hidden files and folders are ignored.

    ``classes`` number the labels, by default those there, sorted; ``key`` is the recipe key that errors name.
    """
    there = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not there:
        text = f"got {folder} without class folders; expected one folder of images per class."
        raise ValueError(f"{key}: {text} Sort the images into folders.")
    classes = classes or there
    if unknown := [name for name in there if name not in classes]:
        text = f"got classes {name_some(unknown)} in {folder}; expected only those of the training folder,"
        raise ValueError(f"{key}: {text} {name_some(classes)}. Remove them or add training images.")
    found = [(path, classes.index(name)) for name in there for path in list_images(folder / name, key)]
    paths, labels = zip(*found, strict=True)
    return FileSource(torch.tensor(labels), classes, list(paths))


def list_images(folder: Path, key: str) -> list[str]:
    """Return the sorted paths of the images below ``folder``; raise ValueError where there are none."""
    paths = sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file[0] != "." and file.lower().endswith(IMAGE_SUFFIXES)
    )
    if not paths:
        text = f"got no images in {folder}; expected files that end in {' '.join(IMAGE_SUFFIXES)}."
        raise ValueError(f"{key}: {text} Add images or remove the folder.")
    return paths


def name_some(names: Iterable[object]) -> str:
    """Return the first few of many names: "cat, dog (+3)"."""
    texts = [str(name) for name in names]
    more = f" (+{len(texts) - 5})" if len(texts) > 5 else ""
    return ", ".join(texts[:5]) + more


# ---- timm --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DatasetSource(Source):
    """A map-style data set opened by ``timm.data.create_dataset``, decoded to RGB when it is read."""

    dataset: Any  # timm ImageDataset, which has a reader, or a torchvision data set, which has not
    title: str

    def read(self, position: int) -> Image.Image:
        """Return one image."""
        # timm's own __getitem__ replaces an unreadable image by the next one; its reader does not.
        if hasattr(self.dataset, "reader"):
            with self.dataset.reader[position][0] as file:
                return open_rgb(file, self.locate(position))
        return self.dataset[position][0].convert("RGB")

    def locate(self, position: int) -> str:
        """Return its place."""
        try:
            return str(self.dataset.filename(position, absolute=True))
        except (AttributeError, AssertionError, KeyError):
            return f"{self.title} image {position}"


def open_timm(data: Data) -> Opened:
    """Open map-style data sets through timm, and refuse what timm would quietly mix up."""
    keys = ("train_split", "test_split", "val_split")
    splits = {key: split for key in keys if (split := getattr(data, key)) is not None}
    datasets = {key: create_dataset(data, split) for key, split in splits.items()}
    sources = {key: _source(datasets[key], f"{data.name} {split}") for key, split in splits.items()}
    train, test = sources["train_split"], sources["test_split"]
    for key, dataset in datasets.items():
        # torchvision sets know train and not train; timm takes any unknown name for the latter.
        is_train = getattr(dataset, "train", None)
        if is_train is not None and (key == "val_split" or is_train != (key == "train_split")):
            kind = "training" if is_train else "test"
            text = f"got {splits[key]!r}, which is the {kind} split of {data.name}"
            rule = "expected train_split=train, test_split=test and no val_split. Change it."
            raise ValueError(f"data.{key}: {text}; {rule}")
        if (names := sources[key].class_names) != train.class_names:
            text = f"got classes {name_some(names)}; expected those of the training split,"
            raise ValueError(f"data.{key}: {text} {name_some(train.class_names)}. Make them equal.")
    for other, key in combinations(datasets, 2):
        # timm reads all of root when it finds no folder for a split.
        if _paths(datasets[key]) & _paths(datasets[other]):
            text = f"got {splits[key]!r}, which shares images with data.{other}={splits[other]!r};"
            raise ValueError(f"data.{key}: {text} expected a folder for each split. Correct the names.")
    return Opened(train, sources.get("val_split"), lambda: test, len(test.labels))


def create_dataset(data: Data, split: str, **settings: Any) -> Any:
    """Return ``timm.data.create_dataset(...)`` of one split."""
    import timm.data

    place: Any = {"root": data.root, "split": split, "download": data.download}
    return timm.data.create_dataset(str(data.name), **place, **settings)


def _source(dataset: Any, title: str) -> DatasetSource:
    """Return a map-style data set with its labels, without decoding an image if the data set allows."""
    holder = getattr(dataset, "reader", dataset)
    if hasattr(holder, "targets"):
        labels = holder.targets
    elif hasattr(holder, "iter_targets"):
        labels = list(holder.iter_targets())
    else:
        pairs = getattr(holder, "samples", None) or (holder[position] for position in range(len(holder)))
        labels = [label for _, label in pairs]
    numbers = torch.as_tensor(labels).long()
    class_to_idx = getattr(holder, "class_to_idx", None)
    names = sorted(class_to_idx, key=class_to_idx.get) if class_to_idx else range(int(numbers.max()) + 1)
    return DatasetSource(numbers, tuple(map(str, names)), dataset, title)


def _paths(dataset: Any) -> set[str]:
    """Return the image files of a folder data set, empty for others."""
    if hasattr(dataset, "reader"):
        return set(dataset.filenames(absolute=True)) if hasattr(dataset.reader, "samples") else set()
    return {path for path, _ in getattr(dataset, "samples", ())}


SOURCES: dict[str, Callable[[Data], Opened]] = {
    "digits": open_digits,
    "cifar10": partial(open_torchvision, "CIFAR10"),
    "cifar100": partial(open_torchvision, "CIFAR100"),
    "svhn": partial(open_torchvision, "SVHN"),
    "folder": open_folder,
    "timm": open_timm,
}
