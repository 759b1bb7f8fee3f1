"""From one image, whatever holds it, to uint8 levels of one size.

Images pass through PIL wherever they come from, so that sizes, modes and broken files are treated alike and
an error names the image. Threads, streaming processes and iterable data sets all decode here.

Legend: C channels, H and W pixels, N images.
"""

from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


class Source(Protocol):
    """A numbered collection of labelled images, read one at a time."""

    @property
    def labels(self) -> Tensor:
        """Class of every image, int64 [N]."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels stand for."""

    @property
    def levels(self) -> int:
        """The stored value that stands for 1.0."""

    def read(self, position: int) -> Image.Image:
        """Return the image at ``position``, in mode "L" or "RGB"."""

    def locate(self, position: int) -> str:
        """Return words by which a person finds the image at ``position``."""


def open_rgb(file: Any, where: str) -> Image.Image:
    """Return the image in ``file`` (a path or a binary file) as RGB.

    Raises:
        ValueError: PIL cannot read it, or it has more than 8 bits a channel, which ``convert`` would clip.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            return image.convert("RGB")
    except (
        Exception
    ) as error:  # PIL raises many kinds for broken files: OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"data: got an unreadable image {where} ({error}); expected an 8-bit image that PIL can decode. "
            "Replace the file or remove it."
        ) from error


class Decoder(Dataset):
    """Reads images of one source as levels of one shape, or says which image does not fit.

    Args:
        source: Where the images come from.
        image_size: Side in pixels to which images are resized (bicubic, aspect ratio not kept); None: as is.
        like: The decoder whose first image fixes the shape; by default the image at ``first`` fixes it.
        first: Position of that image.
    """

    def __init__(
        self, source: Source, image_size: int | None = None, like: "Decoder | None" = None, first: int = 0
    ):
        self.source = source
        self.image_size = image_size
        self.shape: tuple[int, ...] = like.shape if like else self._read(first).shape
        self.shape_from: str = like.shape_from if like else source.locate(first)

    def __getitem__(self, position: int) -> np.ndarray:
        """Return the levels of one image, uint8 [C, H, W].

        Raises:
            ValueError: The image cannot be read or has another size than the first one; both files are named.
        """
        levels = self._read(position)
        if levels.shape != self.shape:
            raise ValueError(
                f"data.image_size: got None for images of different sizes, {_size(self.shape)} in "
                f"{self.shape_from} and {_size(levels.shape)} in {self.source.locate(position)}; expected "
                "one size. Set data.image_size to the pixels they should be resized to."
            )
        return levels

    def _read(self, position: int) -> np.ndarray:
        """Read, resize and lay out one image as [C, H, W]."""
        return to_levels(self.source.read(position), self.image_size)


def to_levels(image: Image.Image, image_size: int | None) -> np.ndarray:
    """Return an "L" or "RGB" image as uint8 [C, H, W], resized to a square of ``image_size`` unless None."""
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    levels = np.array(image)
    return levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1)


def _size(shape: tuple[int, ...]) -> str:
    """Return "width x height" as people write it."""
    return f"{shape[2]}x{shape[1]}"
