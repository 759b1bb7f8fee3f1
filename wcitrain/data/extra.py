"""Extra training images: generated sets as ``.npz``, image folders, pseudo-labels for missing labels.

Generated images are the largest single gain in adversarial training (Gowal et al. 2110.09468, Wang et al.
2302.04638); real unlabelled images with pseudo-labels came before (Carmon et al. 1905.13736). This file reads
both as an ``ImageSet``; ``mixed.MixedSet`` puts a share of them into every batch. That none of them is a test
image is the reader's to know.

Legend: C channels, H and W pixels, K classes, N images.
"""

import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wcitrain.data.decoding import Decoder
from wcitrain.data.loader import ImageSet, class_order
from wcitrain.data.sources import IMAGE_SUFFIXES, ArraySource, FileSource, list_images, name_some, scan_folder
from wcitrain.data.splits import Splits
from wcitrain.preserve import undisturbed
from wcitrain.seeding import generator_from, seed_from


def load_extra(
    path: str | Path,
    *,
    like: Splits,
    labels: Literal["given", "pseudo"] = "given",
    max_images: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    in_memory: bool | Literal["auto"] = "auto",
    num_workers: int = 2,
) -> ImageSet:
    """Open extra training images of the channels, size and classes of a data set.

    Args:
        path: A ``.npz`` with ``image`` or ``images``, uint8 [N, H, W, C] or [N, C, H, W] (gray also [N, H,
            W]), and ``label`` or ``labels``, whole numbers [N]: read once, N C H W bytes of memory. Or a
            folder of images: with labels ``<class>/**/<image>``, in which classes are numbered by their names
            in ``like``, whatever their order; without, any images below it.
        like: The data set whose training they extend.
        labels: "given" reads labels; "pseudo" ignores any and makes all of them -1, for ``pseudo_label``.
        max_images: Use so many: in turns over the classes, or at random without labels; None uses all.
        seed: Chooses the images of ``max_images``.
        image_size: Side in pixels to which they are resized, as ``data.image_size``; None keeps their size.
        in_memory: For folders, as in ``load_splits``; a ``.npz`` is always in memory.
        num_workers: Threads or processes that decode, and processes that augment.

    Raises:
        ValueError: Images are missing, unreadable or do not fit; ``extra.path`` or another key is named.
    """
    path = Path(path)
    if labels not in ("given", "pseudo"):
        raise ValueError(f"extra.labels: got {labels!r}; expected given or pseudo. Choose one.")
    if not path.exists():
        raise ValueError(
            f"extra.path: got {path}, which is not there; expected a .npz or a folder. Correct extra.path."
        )
    source: ArraySource | FileSource
    if path.is_dir():
        source = _open_folder(path, like.class_names, labels)
    elif path.suffix == ".npz":
        source = _open_npz(path, like, labels)
    else:
        raise ValueError(f"extra.path: got {path}; expected a .npz or a folder of images. Convert it.")
    positions = _choose(source.labels, max_images, seed)
    try:
        decoder = Decoder(source, image_size, first=int(positions[0]))
        _check_shape(decoder, like, path)
        if isinstance(source, ArraySource) and decoder.shape[1:] == source.pixels.shape[1:3]:
            # No second copy.
            return ImageSet(decoder, positions, _as_levels(source.pixels, positions), num_workers)
        return ImageSet.load(decoder, positions, in_memory=in_memory, num_workers=num_workers)
    except ValueError as error:
        if str(error).startswith("extra."):
            raise
        # An image that cannot be read, or sizes that differ.
        raise ValueError(f"extra.path: {error}") from error


class PseudoLabels(NamedTuple):
    """Images with the labels that a model gave them, and what to look at before they are trained on.

    ``counts`` are images a class, int64 [K]; ``mean_confidence`` is the mean probability of that class.
    """

    images: ImageSet
    counts: Tensor
    mean_confidence: float


def pseudo_label(
    images: ImageSet, model: nn.Module, *, batch_size: int = 500, device: torch.device | str = "cpu"
) -> PseudoLabels:
    """Label images by the class a model finds most likely, in eval mode; the model is left as it was found.

    ``result.images.y`` can be stored, and given back with ``images.with_labels``, so that a resumed run on
    another device trains on the same labels. Costs one forward pass.

    Args:
        images: Any images; their labels do not matter.
        model: Logits [B, K] of images in [0, 1], on ``device``.
        batch_size: Images per forward pass.
        device: Where the model is.

    Raises:
        ValueError: The model has other classes than the images, or its logits are not numbers.
    """
    num_classes = len(images.decoder.source.class_names)
    found, confidence = [], 0.0
    with undisturbed(model, training=False), torch.no_grad():
        for x, _, index in images.batches(batch_size, device=device):
            logits = model(x)
            if logits.shape != (len(x), num_classes) or not bool(torch.isfinite(logits).all()):
                raise ValueError(
                    f"extra.labels: got logits {list(logits.shape)} with minimum {float(logits.min())} on "
                    f"images that begin with number {int(index[0])}; expected finite ones "
                    f"[{len(x)}, {num_classes}]. Use a trained model of these classes."
                )
            best = logits.float().softmax(1).max(1)
            confidence += float(best.values.double().sum())
            found.append(best.indices.cpu())
    y = torch.cat(found)
    return PseudoLabels(images.with_labels(y), torch.bincount(y, minlength=num_classes), confidence / len(y))


def _open_npz(path: Path, like: Splits, labels: str) -> ArraySource:
    """Read a ``.npz`` into [N, H, W, C], or [N, H, W] if gray."""
    try:
        # Opened here, as NumPy leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            keys = list(arrays)
            images = _first(arrays, ("image", "images"))
            numbers = _first(arrays, ("label", "labels")) if labels == "given" else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"extra.path: got {path}, which NumPy cannot read without pickle ({error}); expected plain "
            "arrays. Write it anew with numpy.savez."
        ) from error
    if images is None:
        raise ValueError(
            f"extra.path: got arrays {name_some(keys)} in {path}; expected image or images. Rename one."
        )
    channels = like.in_chans
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
        raise ValueError(
            f"extra.path: got images {images.dtype} {list(images.shape)} in {path}; expected uint8 "
            f"[N, H, W, {channels}] or [N, {channels}, H, W]. Convert them."
        )
    if images.ndim == 4 and images.shape[3] != channels and images.shape[1] == channels:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == channels == 1:
        images = images[..., 0]
    if (channels == 1) != (images.ndim == 3) or (images.ndim == 4 and images.shape[3] != channels):
        raise ValueError(
            f"extra.path: got images {list(images.shape)} in {path}; expected {channels} channels."
        )
    if labels == "given":
        if numbers is None:
            raise ValueError(
                f"extra.path: got arrays {name_some(keys)} in {path}; expected label or labels too. Add "
                "them, or set extra.labels=pseudo."
            )
        if numbers.shape != (len(images),) or numbers.dtype.kind not in "iu":
            raise ValueError(
                f"extra.path: got labels {numbers.dtype} {list(numbers.shape)} in {path}; expected whole "
                f"numbers [{len(images)}], one for each image. Convert them."
            )
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= like.num_classes:
            raise ValueError(
                f"extra.path: got labels {low} to {high} in {path}; expected 0 to {like.num_classes - 1}. "
                "Correct them, or set extra.labels=pseudo."
            )
        y = torch.from_numpy(numbers.astype(np.int64))
    else:
        y = torch.full((len(images),), -1)
    return ArraySource(images, y, like.class_names, str(path))


def _first(arrays: np.lib.npyio.NpzFile, keys: tuple[str, ...]) -> np.ndarray | None:
    """Return the first array there is under one of the keys."""
    return next((arrays[key] for key in keys if key in arrays), None)


def _open_folder(path: Path, classes: tuple[str, ...], labels: str) -> FileSource:
    """List the images of a folder, by class if their labels are used."""
    if labels == "given":
        if not any(entry.is_dir() and entry.name[0] != "." for entry in path.iterdir()):
            raise ValueError(
                f"extra.path: got {path} without class folders; expected <class>/<image>. Sort the images "
                "into folders, or set extra.labels=pseudo."
            )
        return scan_folder(path, classes, key="extra.path")
    paths = list_images(path)
    if not paths:
        raise ValueError(
            f"extra.path: got no images in {path}; expected files that end in {' '.join(IMAGE_SUFFIXES)}. "
            "Correct extra.path."
        )
    return FileSource(paths, torch.full((len(paths),), -1), classes)


def _choose(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Return the sorted positions of all images, or of ``limit`` of them."""
    if limit is None:
        return torch.arange(len(labels))
    if not 1 <= limit <= len(labels):
        raise ValueError(
            f"extra.max_images: got {limit}; expected 1 to the {len(labels)} images there are. Lower it."
        )
    if labels[0] < 0:
        order = torch.randperm(len(labels), generator=generator_from("cpu", seed, "max_images"))
    else:
        order = class_order(labels, seed_from(seed, "max_images"))
    return order[:limit].sort().values


def _check_shape(decoder: Decoder, like: Splits, path: Path) -> None:
    """Raise ValueError unless images look like those of the data set."""
    size = like.image_size if isinstance(like.image_size, tuple) else (like.image_size, like.image_size)
    if decoder.shape != (like.in_chans, *size):
        raise ValueError(
            f"extra.path: got images {list(decoder.shape)} in {path}; expected {[like.in_chans, *size]}, "
            "the channels, height and width of the training images. Convert them, or set data.image_size."
        )


def _as_levels(pixels: np.ndarray, positions: Tensor) -> Tensor:
    """Return a view, or a copy of some, of [N, H, W] or [N, H, W, C] as uint8 [N, C, H, W]."""
    chosen = pixels if len(positions) == len(pixels) else pixels[positions.numpy()]
    return torch.from_numpy(chosen[:, None] if chosen.ndim == 3 else chosen.transpose(0, 3, 1, 2))
