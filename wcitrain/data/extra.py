"""Extra training images: generated sets as ``.npz``, image folders, pseudo-labels for missing labels.

Generated images are the largest single gain in adversarial training (Gowal et al. 2110.09468, Wang et al.
2302.04638); real unlabelled images with pseudo-labels came before (Carmon et al. 1905.13736). `MixedSet` puts
a share of them into every batch. That none of them is a test image is the reader's to know.
"""

import zipfile
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from wcitrain.data.decoding import ArraySource, Decoder, FileSource
from wcitrain.data.sets import ImageSet
from wcitrain.data.settings import Data
from wcitrain.data.sources import list_images, name_some, scan_folder
from wcitrain.data.splits import Splits, check_limit, choose
from wcitrain.method import Method, Positive, PositiveCount, Text, method, refuse, setting, show
from wcitrain.preserve import undisturbed
from wcitrain.seeding import generator_from, seed_from


@method
class Extra(Method):
    """Generated or unlabelled images beside the training images.

    A ``.npz`` holds ``image`` or ``images``, uint8 [N, H, W, C] or [N, C, H, W] (gray also [N, H, W]), and
    ``label`` or ``labels``, whole numbers [N]; it is read once, into N C H W bytes of memory. A folder holds
    ``<class>/**/<image>``, with the classes of the training images, or any images where labels are not read.
    """

    path: Text | None = setting(None, "A .npz or a folder of images; null: none.")
    labels: Literal["given", "pseudo"] = setting("given", "given reads them; pseudo lets a model give them.")
    labeler: Text | None = setting(None, "Exported model for pseudo-labels, such as runs/NAME-s0/model/last.")
    fraction: Annotated[Positive, Field(ge=0.001, le=0.999)] = setting(
        0.5, "Share of extra images in every batch, 0.001 to 0.999."
    )
    max_images: PositiveCount | None = setting(
        None, "Extra images kept, in turns over the classes if labelled; null: all."
    )
    label: ClassVar[str] = "extra {labels} {fraction:g}"

    def __post_init__(self) -> None:
        others = (self.labels, self.labeler, self.fraction, self.max_images)
        if self.path is None and others != ("given", None, 0.5, None):
            refuse("path", "got null beside other keys of extra; expected a .npz or a folder. Set it.")
        if (self.labels == "pseudo") != (self.labeler is not None):
            rule = "an exported model for pseudo, null for given. Change one of them."
            refuse("labeler", f"got {show(self.labeler)} with labels {self.labels}; expected {rule}")


def load_extra(extra: Extra, data: Data, like: Splits) -> ImageSet:
    """Open extra training images of the channels, size and classes of ``like``, which ``data`` described.

    With ``labels="pseudo"`` all labels are -1, for `pseudo_label`. ``split_seed`` chooses the images of
    ``max_images``. Raises ValueError where images are missing, unreadable or do not fit.
    """
    path, is_labelled = Path(str(extra.path)), extra.labels == "given"
    source: ArraySource | FileSource
    if not path.is_dir():
        source = _open_npz(path, like, is_labelled)
    elif is_labelled:
        source = scan_folder(path, like.class_names, key="extra.path")
    else:
        paths = list_images(path, "extra.path")
        source = FileSource(torch.full((len(paths),), -1), like.class_names, paths)
    seed, limit = (data.split_seed, "max_images"), extra.max_images
    if is_labelled:
        positions = choose(source.labels, limit, seed_from(*seed), "extra.max_images")
    else:
        check_limit("extra.max_images", limit, len(source.labels))
        order = torch.randperm(len(source.labels), generator=generator_from("cpu", *seed))
        positions = order[:limit].sort().values
    try:
        decoder = Decoder(source, data.image_size, first=int(positions[0]))
        if decoder.shape == like.shape:
            if isinstance(source, ArraySource) and decoder.shape[1:] == source.pixels.shape[1:3]:
                levels = torch.from_numpy(source.pixels)  # no second copy where all are taken
                levels = levels if len(positions) == len(levels) else levels[positions]
                levels = levels[:, None] if levels.ndim == 3 else levels.permute(0, 3, 1, 2)
                return ImageSet(decoder, positions, levels, data.num_workers)
            return ImageSet.load(decoder, positions, data.in_memory, data.num_workers)
    except ValueError as error:  # an image that cannot be read, or sizes that differ
        raise ValueError(f"extra.path: {error}") from error
    text = f"got images {list(decoder.shape)} in {path}; expected {list(like.shape)}, those of training."
    raise ValueError(f"extra.path: {text} Convert them, or set data.image_size.")


def pseudo_label(images: ImageSet, model: nn.Module, device: torch.device | str) -> tuple[ImageSet, float]:
    """Label images by the class a model finds most likely, in eval mode; the model is left as it was.

    Returns the images with these labels, and the mean probability of the label. Raises ValueError where the
    model has other classes than the images, or its logits are not numbers. Costs one forward pass.
    """
    num_classes = len(images.decoder.source.class_names)
    labels, confidence = [], 0.0
    with undisturbed(model, training=False), torch.no_grad():
        for x, _, index in images.batches(500, device=device):
            logits = model(x)
            if logits.shape != (len(x), num_classes) or not bool(torch.isfinite(logits).all()):
                text = f"got logits {list(logits.shape)} with minimum {float(logits.min())} on images that"
                rule = f"expected finite ones [{len(x)}, {num_classes}]. Use a trained model of the classes."
                raise ValueError(f"extra.labels: {text} begin with number {int(index[0])}; {rule}")
            best = logits.float().softmax(1).max(1)
            confidence += float(best.values.double().sum())
            labels.append(best.indices.cpu())
    return images.with_labels(torch.cat(labels)), confidence / len(images)


def _open_npz(path: Path, like: Splits, is_labelled: bool) -> ArraySource:
    """Read a ``.npz`` into [N, H, W, C], or [N, H, W] if gray."""
    if path.suffix != ".npz":
        raise ValueError(f"extra.path: got {path}; expected a .npz or a folder of images. Correct it.")
    try:
        # Opened here, as NumPy leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            keys = name_some(arrays)
            wanted = ("image", "label") if is_labelled else ("image",)
            images, numbers = (  # None where there is none
                next((arrays[key] for key in (name, f"{name}s") if key in arrays and name in wanted), None)
                for name in ("image", "label")
            )
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        text = f"got {path}, which NumPy cannot read without pickle ({error}); expected plain arrays."
        raise ValueError(f"extra.path: {text} Write it anew with numpy.savez.") from error
    channels, num_classes, here = like.in_chans, like.num_classes, f"in {path}; expected"
    if images is None or (is_labelled and numbers is None):
        text = "images and, unless extra.labels=pseudo, labels. Add or rename them."
        raise ValueError(f"extra.path: got arrays {keys} {here} {text}")
    got = f"images {images.dtype} {list(images.shape)}"
    if images.ndim == 4 and images.shape[3] != channels and images.shape[1] == channels:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == channels == 1:
        images = images[..., 0]
    is_of_channels = images.ndim == (3 if channels == 1 else 4) and images.shape[3:] in ((), (channels,))
    if images.dtype != np.uint8 or not is_of_channels or not len(images):
        layouts = f"uint8 [N, H, W, {channels}] or [N, {channels}, H, W]. Convert them."
        raise ValueError(f"extra.path: got {got} {here} {layouts}")
    if numbers is None:
        return ArraySource(torch.full((len(images),), -1), like.class_names, images, str(path))
    is_whole = numbers.shape == (len(images),) and numbers.dtype.kind in "iu"
    if not is_whole or numbers.min() < 0 or numbers.max() >= num_classes:
        got = f"labels {numbers.dtype} {list(numbers.shape)} from {numbers.min()} to {numbers.max()}"
        text = f"whole numbers [{len(images)}] from 0 to {num_classes - 1}. Correct them."
        raise ValueError(f"extra.path: got {got} {here} {text}")
    return ArraySource(torch.from_numpy(numbers.astype(np.int64)), like.class_names, images, str(path))
