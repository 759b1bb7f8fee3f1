"""Sources, which know every label and how to read one image, and how a file becomes pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Source:
    """N images by number, here files: their labels (int64 [N]), what these stand for, and their places."""

    labels: Tensor
    class_names: tuple[str, ...]
    place: str | list[str]  # the name of the whole, or the path of every image
    levels: int = field(default=255, kw_only=True)  # the stored value that stands for 1.0

    def read(self, position: int) -> Image.Image:
        """Return the image at ``position``, in mode "L" or "RGB"; an error names it."""
        return open_rgb(self.place[position], self.place[position])

    def file(self, position: int) -> str | None:
        """Return the path of the image's own file, None where it has none."""
        return None if isinstance(self.place, str) else self.place[position]

    def locate(self, position: int) -> str:
        """Return where a person finds the image at ``position``."""
        return f"{self.place} image {position}" if isinstance(self.place, str) else self.place[position]


@dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Images already in memory: ``pixels`` uint8 [N, H, W] (gray) or [N, H, W, 3], 0 to ``levels``."""

    pixels: np.ndarray

    def read(self, position: int) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self.pixels[position])


@contextmanager
def opened_image(file: Any, where: str) -> Iterator[Image.Image]:
    """Open an image file (a path or a binary file), not yet decoded; ValueError where it cannot be read."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # ``convert`` would clip
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            yield image
    except Exception as error:  # PIL raises many kinds for broken files: OSError, SyntaxError, struct.error
        text = f"got an unreadable image {where} ({error}); expected an 8-bit image that PIL can decode."
        raise ValueError(f"data: {text} Replace the file or remove it.") from error


def open_rgb(file: Any, where: str) -> Image.Image:
    """Return the image in ``file`` (a path or a binary file) as RGB, or raise ValueError."""
    with opened_image(file, where) as image:
        return image.convert("RGB")


def to_levels(image: Image.Image, image_size: int | None, channels: int | None = None) -> np.ndarray:
    """Return an "L" or "RGB" image as uint8 [C, H, W], resized to a square of ``image_size`` unless None.

    One channel is the luma of RGB (ITU-R 601, PIL's "L"); three of gray are equal; None takes its own.
    """
    if channels is not None and channels != len(image.getbands()):
        image = image.convert("L" if channels == 1 else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    levels = np.array(image)
    return levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1)
