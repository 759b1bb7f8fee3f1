"""Folders of images: which files count, in which order, and what is litter of other programs."""

import os
from pathlib import Path

import torch

from wcitrain.data.pixels import Source
from wcitrain.text import name_some

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# What archives, file browsers and network drives leave behind, in lower case; some of it holds small copies.
LITTER = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "#recycle", "@recycle", "$recycle.bin"}
LITTER |= {"lost+found"}


def is_litter(path: str) -> bool:
    """Return whether a part of ``path``, which begins inside the data, is hidden or litter."""
    return any(part[0] == "." or part.lower() in LITTER for part in path.split(os.sep) if part)


def scan_folder(folder: Path, classes: tuple[str, ...] | None = None, key: str = "data.root") -> Source:
    """List ``folder/<class>/**/<image>`` without litter; nothing is decoded.

    ``classes`` number the labels, by default those there, sorted; ``key`` is the recipe key that errors name.
    """
    there = tuple(sorted(one.name for one in folder.iterdir() if one.is_dir() and not is_litter(one.name)))
    if not there:
        raise ValueError(f"{key}: got {folder} without class folders; expected some. Sort the images.")
    classes = classes or there
    if unknown := [name for name in there if name not in classes]:
        rule = f"expected only those of the training folder, {name_some(classes)}. Remove them."
        raise ValueError(f"{key}: got classes {name_some(unknown)} in {folder}; {rule}")
    found = [(path, classes.index(name)) for name in there for path in list_images(folder / name, key)]
    paths, labels = zip(*found, strict=True)
    return Source(torch.tensor(labels), classes, list(paths))


def list_images(folder: Path, key: str) -> list[str]:
    """Return the sorted paths of the images below ``folder``, without litter; ValueError where are none."""
    paths = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_litter(name)]  # os.walk does not enter the others
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not is_litter(name)]
        paths += [os.path.join(parent, name) for name in images]
    if not paths:
        rule = f"expected files that end in {' '.join(IMAGE_SUFFIXES)}. Add some or remove it."
        raise ValueError(f"{key}: got no images in {folder}; {rule}")
    return sorted(paths)
