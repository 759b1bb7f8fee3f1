"""Map-style data sets of ``timm.data.create_dataset``, and guards against what timm would quietly mix up."""

from dataclasses import dataclass
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor

from wcitrain.data.decoding import open_rgb
from wcitrain.data.sources import Opened, name_some


@dataclass(frozen=True, eq=False)
class DatasetSource:
    """A map-style data set opened by ``timm.data.create_dataset``, decoded to RGB when it is read."""

    dataset: Any  # timm ImageDataset, which has a reader, or a torchvision data set, which has not
    labels: Tensor
    class_names: tuple[str, ...]
    title: str
    levels: int = 255

    def read(self, position: int) -> Image.Image:
        """Return the image at ``position``; raise ValueError with its place if it cannot be read."""
        # timm's own __getitem__ replaces an unreadable image by the next one; its reader does not.
        if hasattr(self.dataset, "reader"):
            with self.dataset.reader[position][0] as file:
                return open_rgb(file, self.locate(position))
        return self.dataset[position][0].convert("RGB")

    def locate(self, position: int) -> str:
        """Return the path if the data set knows it, else its name and the position."""
        try:
            return str(self.dataset.filename(position, absolute=True))
        except (AttributeError, AssertionError, KeyError):
            return f"{self.title} image {position}"


def open_timm(
    *,
    name: str | None,
    root: str | None,
    train_split: str,
    val_split: str | None,
    test_split: str,
    download: bool,
    **_: Any,
) -> Opened:
    """Open map-style data sets through timm, and refuse what timm would quietly mix up."""
    splits = {"data.train_split": train_split, "data.test_split": test_split}
    if val_split is not None:
        splits["data.val_split"] = val_split
    datasets = {key: create_dataset(name, root, split, download) for key, split in splits.items()}
    sources = {key: _dataset_source(datasets[key], f"{name} {split}") for key, split in splits.items()}
    train = sources["data.train_split"]
    for key, dataset in datasets.items():
        # torchvision sets know train and not train; timm takes any unknown name for the latter.
        if hasattr(dataset, "train") and (
            key == "data.val_split" or dataset.train != (key == "data.train_split")
        ):
            raise ValueError(
                f"{key}: got {splits[key]!r}, which is the {'training' if dataset.train else 'test'} split "
                f"of {name}; expected train_split=train, test_split=test and no val_split. Change it."
            )
        # timm reads all of root when it finds no folder for a split.
        if key != "data.train_split" and _paths(dataset) & _paths(datasets["data.train_split"]):
            raise ValueError(
                f"{key}: got {splits[key]!r}, which shares images with data.train_split={train_split!r}; "
                f"expected a folder for each split in {root}. Add the folders or correct the names."
            )
        if sources[key].class_names != train.class_names:
            raise ValueError(
                f"{key}: got classes {name_some(sources[key].class_names)}; expected those of the training "
                f"split, {name_some(train.class_names)}. Make them equal."
            )
    if val_split is not None and _paths(datasets["data.val_split"]) & _paths(datasets["data.test_split"]):
        raise ValueError(
            f"data.val_split: got {val_split!r}, which shares images with data.test_split={test_split!r}; "
            "expected different images. Correct the names, or remove data.val_split to cut some."
        )
    test = sources["data.test_split"]
    return Opened(train, sources.get("data.val_split"), lambda: test, len(test.labels))


def create_dataset(name: str | None, root: str | None, split: str, download: bool, **settings: Any) -> Any:
    """Return ``timm.data.create_dataset(...)``, or raise ValueError with the settings and its reason."""
    if not name:
        raise ValueError("data.name: got None; expected what timm.data.create_dataset opens. Set data.name.")
    try:
        return timm.data.create_dataset(name, root=root, split=split, download=download, **settings)
    except Exception as error:  # assertions, missing packages, missing files, ...: each reader has its own
        raise ValueError(
            f"data.name: got {name!r} (root {root!r}, split {split!r}); expected what "
            f"timm.data.create_dataset opens. It said: {type(error).__name__}: {error}."
        ) from error


def _dataset_source(dataset: Any, title: str) -> DatasetSource:
    """Return a map-style data set with its labels, without decoding an image if the data set allows."""
    holder = getattr(dataset, "reader", dataset)
    if hasattr(holder, "targets"):
        labels = holder.targets
    elif hasattr(holder, "samples"):
        labels = [label for _, label in holder.samples]
    elif hasattr(holder, "iter_targets"):
        labels = list(holder.iter_targets())
    else:
        labels = [holder[position][1] for position in range(len(holder))]
    numbers = torch.as_tensor(labels).long()
    class_to_idx = getattr(holder, "class_to_idx", None)
    names = sorted(class_to_idx, key=class_to_idx.get) if class_to_idx else range(int(numbers.max()) + 1)
    return DatasetSource(dataset, numbers, tuple(map(str, names)), title)


def _paths(dataset: Any) -> set[str]:
    """Return the image files of a folder data set, empty for others."""
    if hasattr(dataset, "reader"):
        return set(dataset.filenames(absolute=True)) if hasattr(dataset.reader, "samples") else set()
    return {path for path, _ in getattr(dataset, "samples", ())}
