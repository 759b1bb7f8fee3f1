"""From one image, whatever holds it, to uint8 levels of one size.

A source knows every label and how to read the image at a position; it decodes nothing until it is asked.
Images pass through PIL wherever they come from, so that sizes, modes and broken files are treated alike and
an error names the image.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True, eq=False)
class Source:
    """N images by number, their labels (int64 [N]) and what these stand for."""

    labels: Tensor
    class_names: tuple[str, ...]
    levels: int = field(default=255, kw_only=True)  # the stored value that stands for 1.0

    def read(self, position: int) -> Image.Image:
        """Return the image at ``position``, in mode "L" or "RGB"; an error names it."""
        raise NotImplementedError

    def locate(self, position: int) -> str:
        """Return where a person finds the image at ``position``."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Images already in memory: ``pixels`` uint8 [N, H, W] (gray) or [N, H, W, 3], 0 to ``levels``."""

    pixels: np.ndarray
    title: str

    def read(self, position: int) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self.pixels[position])

    def locate(self, position: int) -> str:
        """Return its place."""
        return f"{self.title} image {position}"


@dataclass(frozen=True, eq=False)
class FileSource(Source):
    """Image files, decoded to RGB when they are read."""

    paths: list[str]

    def read(self, position: int) -> Image.Image:
        """Return one image."""
        return open_rgb(self.paths[position], self.paths[position])

    def locate(self, position: int) -> str:
        """Return its place."""
        return self.paths[position]


def open_rgb(file: Any, where: str) -> Image.Image:
    """Return the image in ``file`` (a path or a binary file) as RGB, or raise ValueError."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # ``convert`` would clip
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            return image.convert("RGB")
    except Exception as error:  # PIL raises many kinds for broken files: OSError, SyntaxError, struct.error
        text = f"got an unreadable image {where} ({error}); expected an 8-bit image that PIL can decode."
        raise ValueError(f"data: {text} Replace the file or remove it.") from error


class Decoder(Dataset):
    """Reads images of one source as levels of one shape, or says which image does not fit.

    Images are resized to a square of ``image_size`` pixels (bicubic, aspect ratio not kept) unless it is
    None. The shape is that of the image at ``first``, or of the images of the decoder ``like``.
    """

    def __init__(
        self, source: Source, image_size: int | None = None, like: "Decoder | None" = None, first: int = 0
    ):
        self.source, self.image_size = source, image_size
        self.shape: tuple[int, ...] = like.shape if like else to_levels(source.read(first), image_size).shape
        self.shape_from: str = like.shape_from if like else source.locate(first)

    def __getitem__(self, position: int) -> np.ndarray:
        """Return the levels of one image, uint8 [C, H, W]; an error names it, and the one it differs from."""
        levels = to_levels(self.source.read(position), self.image_size)
        if levels.shape != self.shape:
            (_, h, w), (_, height, width) = levels.shape, self.shape
            text = f"{width}x{height} in {self.shape_from} and {w}x{h} in {self.source.locate(position)}"
            rule = "expected one size. Set data.image_size to resize them."
            raise ValueError(f"data.image_size: got None for images of different sizes, {text}; {rule}")
        return levels


def to_levels(image: Image.Image, image_size: int | None) -> np.ndarray:
    """Return an "L" or "RGB" image as uint8 [C, H, W], resized to a square of ``image_size`` unless None."""
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    levels = np.array(image)
    return levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1)
