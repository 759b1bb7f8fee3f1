"""Data sets from arrays and folders: where their images, labels and class names come from.

A source knows every label and how to read the image at a position; it decodes nothing until it is asked.

Legend: H and W pixels, N images.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from wcitrain.data.decoding import Source, open_rgb
from wcitrain.data.loader import class_order
from wcitrain.seeding import seed_from

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images already in memory: ``pixels`` uint8 [N, H, W] (gray) or [N, H, W, 3], 0 to ``levels``."""

    pixels: np.ndarray
    labels: Tensor
    class_names: tuple[str, ...]
    title: str
    levels: int = 255

    def read(self, position: int) -> Image.Image:
        """Return the image at ``position``."""
        return Image.fromarray(self.pixels[position])

    def locate(self, position: int) -> str:
        """Return the name of the set and the position."""
        return f"{self.title} image {position}"


@dataclass(frozen=True, eq=False)
class FileSource:
    """Image files with their labels, decoded to RGB when they are read."""

    paths: list[str]
    labels: Tensor
    class_names: tuple[str, ...]
    levels: int = 255

    def read(self, position: int) -> Image.Image:
        """Return the image at ``position``; raise ValueError with its path if it cannot be read."""
        return open_rgb(self.paths[position], self.paths[position])

    def locate(self, position: int) -> str:
        """Return the path."""
        return self.paths[position]


def scan_folder(
    folder: Path, classes: tuple[str, ...] | None = None, *, key: str = "data.root"
) -> FileSource:
    """List ``folder/<class>/**/<image>``; nothing is decoded and hidden files and folders are ignored.

    Args:
        folder: One split of an image folder.
        classes: The classes of the training split, which number the labels; by default those found, sorted.
        key: The recipe key that errors name.

    Raises:
        ValueError: No class folders, a class folder without images, or a class that is not in ``classes``.
    """
    found = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not found:
        raise ValueError(
            f"{key}: got {folder} without folders; expected one folder of images per class. Add them."
        )
    classes = found if classes is None else classes
    if unknown := [name for name in found if name not in classes]:
        raise ValueError(
            f"{key}: got classes {name_some(unknown)} in {folder}; expected only those of the training "
            f"folder, {name_some(classes)}. Remove them or add training images."
        )
    paths: list[str] = []
    labels: list[int] = []
    for name in found:
        images = list_images(folder / name)
        if not images:
            raise ValueError(
                f"{key}: got no images in {folder / name}; expected files that end in "
                f"{' '.join(IMAGE_SUFFIXES)}. Add images or remove the folder."
            )
        paths += images
        labels += [classes.index(name)] * len(images)
    return FileSource(paths, torch.tensor(labels), classes)


def list_images(folder: Path) -> list[str]:
    """Return the sorted paths of the images below ``folder``."""
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file[0] != "." and file.lower().endswith(IMAGE_SUFFIXES)
    )


class Opened(NamedTuple):
    """What a source holds before anything is selected; ``val`` is None where it is cut from ``train``."""

    train: Source
    val: Source | None
    open_test: Callable[[], Source]
    num_test: int


def open_digits(*, image_size: int | None, **_: Any) -> Opened:
    """Open the 1,797 digits of scikit-learn; 797 of them, the same for ever, are the test images."""
    digits = load_digits()
    pixels, labels = digits.images.astype(np.uint8), torch.from_numpy(digits.target).long()
    levels = 16
    if image_size not in (None, pixels.shape[1]):  # interpolation between 17 levels would be coarse
        pixels, levels = np.round(digits.images * (255 / 16)).astype(np.uint8), 255
    order = class_order(labels, seed_from("digits test split"), proportional=True)
    names = tuple(str(name) for name in digits.target_names)

    def part(positions: Tensor, title: str) -> ArraySource:
        positions = positions.sort().values
        return ArraySource(pixels[positions.numpy()], labels[positions], names, title, levels)

    return Opened(part(order[797:], "digits train"), None, lambda: part(order[:797], "digits test"), 797)


def open_torchvision(kind: str, *, root: str, download: bool, **_: Any) -> Opened:
    """Open CIFAR10, CIFAR100 or SVHN below ``root``."""

    def part(is_train: bool) -> ArraySource:
        which: dict[str, Any] = (
            {"split": "train" if is_train else "test"} if kind == "SVHN" else {"train": is_train}
        )
        try:
            data = getattr(torchvision.datasets, kind)(root, download=download, **which)
        except RuntimeError as error:
            raise ValueError(
                f"data.root: got {root} without {kind}, or with a damaged one ({error}); expected the files "
                f"that torchvision looks for in {Path(root).resolve()}. Correct data.root, or set "
                "data.download=true."
            ) from error
        pixels = data.data.transpose(0, 2, 3, 1) if kind == "SVHN" else data.data  # [N, H, W, 3]
        labels = torch.as_tensor(data.labels if kind == "SVHN" else data.targets).long()
        names = tuple(getattr(data, "classes", map(str, range(10))))
        return ArraySource(pixels, labels, names, f"{kind} {'train' if is_train else 'test'}")

    return Opened(part(True), None, lambda: part(False), 26_032 if kind == "SVHN" else 10_000)


def open_folder(*, root: str, train_split: str, val_split: str | None, test_split: str, **_: Any) -> Opened:
    """List the files of ``root/<split>/<class>/``; the training split numbers the classes."""
    folders = [Path(root, split) for split in (train_split, val_split, test_split) if split is not None]
    for folder in [Path(root), *folders]:
        if not folder.is_dir():
            there = (
                name_some(sorted(p.name for p in Path(root).iterdir())) if Path(root).is_dir() else "nothing"
            )
            raise ValueError(
                f"data.root: got no folder {folder} ({root} holds {there or 'nothing'}); expected one "
                "folder per split. Correct data.root, data.train_split, data.val_split or data.test_split."
            )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(
            f"data.test_split: got splits {name_some([str(f) for f in folders])}, two of which are one "
            "folder; expected different ones: selecting on test images is selecting the result."
        )
    train = scan_folder(folders[0])
    *val, test = [scan_folder(folder, train.class_names) for folder in folders[1:]]
    return Opened(train, val[0] if val else None, lambda: test, len(test.labels))


def name_some(names: Any) -> str:
    """Return the first few of many names: "cat, dog (+3)"."""
    names = list(names)
    more = f" (+{len(names) - 5})" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more
