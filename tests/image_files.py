"""Image files to read, streams in memory, and what is asked of the batches that are read from them."""

import random
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from wcitrain.data import Data, load_splits


def load(source="digits", **settings):
    """Open a data set without worker processes."""
    return load_splits(Data(source, **{"num_workers": 0} | settings))


def write_image(path, *, size=(6, 6), seed=0):
    """Write random pixels and return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_classes(root, *, train, test):
    """Write so many images of 6x6 pixels of each class, cat and ant."""
    for split, count in {"train": train, "test": test}.items():
        for c, name in enumerate(["cat", "ant"]):
            for i in range(count):
                path = root / split / name / f"{i:02d}.png"
                write_image(path, seed=1000 * c + i + 500 * (split == "test"))


def write_shares(root, counts, seed=0):
    """Write so many random images of 6x6 pixels into each folder, such as ``{"train/cat": 190}``."""
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name / f"{i:03d}.png", seed=seed + 1000 * number + i)


class FakeStream(IterableDataset):
    """Stands in for timm's IterableImageDataset: images of one red value each, endless when training."""

    def __init__(self, is_training=False, seed=0, declared=10, num_images=10, **_):
        self.reader = SimpleNamespace(num_samples=declared, dist_rank=0, dist_num_replicas=1)
        self.set_loader_cfg = dict  # takes settings
        self.is_training, self.seed, self.epoch, self.num_images = is_training, seed, 0, num_images

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.arange(self.num_images)
        while True:
            if self.is_training:
                order = np.random.RandomState((self.seed + self.epoch) % 2**31).permutation(order)
            for i in order[self.reader.dist_rank :: self.reader.dist_num_replicas]:
                yield self.transform(Image.new("RGB", (6, 6), (int(i) + 5, 0, 0))), int(i) % 2
            if not self.is_training:
                return


def assert_equal(batches, others):
    """Bitwise, and not for want of batches."""
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        for tensor, expected in zip(batch, other, strict=True):
            assert torch.equal(tensor, expected)


def joined(batches):
    """Return the tensors of several batches as one batch."""
    return [torch.cat(tensors) for tensors in zip(*batches, strict=True)]


def joined_ranks(parts):
    """Return the batches of all ranks, part by part put together."""
    return [joined(batches) for batches in zip(*parts, strict=True)]


def global_states():
    """Return the states of every global random generator."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
