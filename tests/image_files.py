"""Image files to read, and what is asked of the batches that are read from them."""

import random

import numpy as np
import torch
from PIL import Image


def write_image(path, *, size=(6, 6), seed=0):
    """Write random pixels and return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_two_classes(root, *, train, test):
    """Write so many images of 6x6 pixels of each class, cat and ant."""
    for split, count in {"train": train, "test": test}.items():
        for c, name in enumerate(["cat", "ant"]):
            for i in range(count):
                path = root / split / name / f"{i:02d}.png"
                write_image(path, seed=1000 * c + i + 500 * (split == "test"))


def assert_equal(batches, others):
    """Bitwise, and not for want of batches."""
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        for tensor, expected in zip(batch, other, strict=True):
            assert torch.equal(tensor, expected)


def global_states():
    """Return the states of every global random generator."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
