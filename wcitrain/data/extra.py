"""Training on labelled images and on extra ones, a fixed share of every batch.

Generated images (Gowal et al. 2110.09468, Wang et al. 2302.04638), or real ones with pseudo-labels (Carmon et
al. 1905.13736). That none of them is a test image is the reader's to know.

An epoch is one sequence of places, of which a share f belongs to extra images. Place n is extra where

    e(n+1) > e(n),    e(n) = ⌊n f + 1/2⌋,                                                                  (1)

so that any B places in a row hold B f extra images if that is whole, and else the whole number below or
above: batches, micro-batches and the parts of the ranks are cuts of one sequence, each with its share.
Place n shows labelled image n - e(n) of the epoch, as without extra images, or extra image e(n).

Extra images are drawn without replacement, pass after pass over them: with X of them an epoch, the t-th of
epoch k is number c = k X + t of all, and comes from pass ⌊c/M⌋. Passes do not end with epochs.

Legend: B batch, f share, M extra images, N labelled images, X extra places of an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from wcitrain.data.folders import list_images, scan_folder
from wcitrain.data.pixels import ArraySource, Source
from wcitrain.data.sets import Batch, Epoch, Images, ImageSet, Reading
from wcitrain.data.sources import Data
from wcitrain.data.splits import Splits, choose
from wcitrain.method import Method, Positive, PositiveCount, Text, method, refuse, setting, show
from wcitrain.preserve import undisturbed
from wcitrain.seeding import generator_from, seed_from

ExtraShare = Annotated[Positive, Field(ge=0.001, le=0.999)]
Places = TypeVar("Places", int, Tensor)


@method
class Extra(Method):
    """Generated or unlabelled images beside the training images.

    A ``.npz`` holds ``image``, uint8 [N, H, W, 3] or, gray, [N, H, W], and ``label``, whole numbers [N]; it
    is read once, into N C H W bytes of memory. A folder holds ``<class>/**/<image>``, with the classes of the
    training images, or any images where labels are not read.
    """

    path: Text | None = setting(None, "A .npz or a folder of images; null: none.")
    labels: Literal["given", "pseudo"] = setting("given", "given reads them; pseudo lets a model give them.")
    labeler: Text | None = setting(None, "Exported model for pseudo-labels, such as runs/NAME-s0/model/last.")
    fraction: ExtraShare = setting(0.5, "Share of extra images in every batch, 0.001 to 0.999.")
    max_images: PositiveCount | None = setting(None, "Extra images kept, in class shares; null: all.")
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

    With ``labels="pseudo"`` all labels are -1, for `pseudo_label`. ``split_seed`` chooses ``max_images``.
    """
    path, is_labelled = Path(str(extra.path)), extra.labels == "given"
    if not path.is_dir():
        source: Source = _open_npz(path, like, is_labelled)
    elif is_labelled:
        source = scan_folder(path, like.class_names, key="extra.path")
    else:
        paths = list_images(path, "extra.path")
        source = Source(torch.full((len(paths),), -1), like.class_names, paths)
    seed = seed_from(data.split_seed, "max_images")
    positions = choose(source.labels, extra.max_images, seed, "extra.max_images")
    train: Any = like.train  # an `ImageSet`, of the same shape
    return ImageSet.load(source, positions, data.image_size, data.in_memory, data.num_workers, train)


def _open_npz(path: Path, like: Splits, is_labelled: bool) -> ArraySource:
    """Read the images, and the labels or -1, of a ``.npz``."""
    names = ("image", "label") if is_labelled else ("image",)
    try:
        # Opened here, as NumPy leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, *rest = [arrays[name] for name in names]
    except Exception as error:  # NumPy and zipfile raise many kinds for other files
        rule = f"expected a folder, or a .npz of plain arrays {' and '.join(names)}. Write it anew."
        raise ValueError(f"extra.path: got {path} ({error}); {rule}") from error
    labels = rest[0] if rest else np.full(len(images), -1)
    layout = () if like.in_chans == 1 else (like.in_chans,)
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[3:] != layout or not len(images):
        got = f"images {images.dtype} {list(images.shape)} in {path}"
        raise ValueError(f"extra.path: got {got}; expected uint8 {['N', 'H', 'W', *layout]}. Convert them.")
    is_whole = labels.shape == (len(images),) and labels.dtype.kind in "iu"
    if not is_whole or labels.min() < -(not is_labelled) or labels.max() >= like.num_classes:
        got = f"labels {labels.dtype} {list(labels.shape)} from {labels.min()} to {labels.max()} in {path}"
        rule = f"expected whole numbers [{len(images)}] from 0 to {like.num_classes - 1}. Correct them."
        raise ValueError(f"extra.path: got {got}; {rule}")
    return ArraySource(torch.from_numpy(labels.astype(np.int64)), like.class_names, str(path), images)


def pseudo_label(images: ImageSet, model: nn.Module, device: torch.device | str) -> tuple[ImageSet, float]:
    """Label images by the class a model finds most likely, in eval mode; the model is left as it was.

    Returns the images with these labels, and the mean probability of the label. Raises ValueError where the
    model has other classes than the images, or its logits are not numbers. Costs one forward pass.
    """
    num_classes = len(images.source.class_names)
    labels, confidence = [], 0.0
    with undisturbed(model, training=False), torch.no_grad():
        for x, _, _ in images.batches(500, device=device):
            logits = model(x)
            if logits.shape != (len(x), num_classes) or not bool(torch.isfinite(logits).all()):
                rule = f"expected finite ones [{len(x)}, {num_classes}]. Use a trained model of the classes."
                raise ValueError(f"extra.labeler: got logits {list(logits.shape)} of extra images; {rule}")
            best = logits.float().softmax(1).max(1)
            confidence += float(best.values.double().sum())
            labels.append(best.indices.cpu())
    return replace(images, y=torch.cat(labels)), confidence / len(images)


@dataclass(frozen=True, eq=False)
class MixedSet(Images):
    """Labelled images ``train`` and a share ``fraction`` of ``extra`` ones; measured are the labelled images.

    The images have one shape. The fraction, inside (0, 1), is rounded to a denominator up to 1000.
    """

    train: ImageSet
    extra: ImageSet
    fraction: float

    def __post_init__(self) -> None:
        if not self._num_extra(self.num_places):
            got = f"got {self.fraction} with {len(self.train)} training images"
            raise ValueError(f"extra.fraction: {got}; expected an extra image an epoch. Raise it.")

    def __len__(self) -> int:
        return len(self.train)

    def subset(self, n: int, *name: object) -> ImageSet:
        """Return ``n`` labelled images, the same as without extra images."""
        return self.train.subset(n, *name)

    @property
    def num_places(self) -> int:
        """The most places that need no more than N labelled images: ⌈n (1-f) - 1/2⌉ of n are labelled."""
        return int((len(self) + Fraction(1, 2)) / (1 - self._share))

    def read(self, reading: Reading) -> Iterator[Batch]:
        """Iterate over one epoch of training; ``Batch.index`` of an extra image is -1 - its position."""
        if not (reading.shuffle and reading.drop_last):
            got = f"got shuffle={reading.shuffle}, drop_last={reading.drop_last} with extra images"
            raise ValueError(f"batches: {got}; expected both, as for training. Measure on .train.")
        places, m, x = reading.places(self.num_places), len(self.extra), self._num_extra(self.num_places)
        begin = reading.epoch * x
        passes = range(begin // m, (begin + x - 1) // m + 1)
        generators = (generator_from("cpu", reading.seed, "extra", number) for number in passes)
        orders = [torch.randperm(m, generator=generator) for generator in generators]
        extra = Epoch(self.extra, torch.cat(orders)[begin % m :][:x], reading, "augment extra")
        return self._merge(places, self.train.epoch(reading), extra)

    def _merge(self, places: list[Tensor], labelled: Epoch, extra: Epoch) -> Iterator[Batch]:
        """Yield labelled and extra images at their places."""
        before = [self._num_extra(place) for place in places]
        masks = [self._num_extra(place + 1) > count for place, count in zip(places, before, strict=True)]
        extra_places = [count[mask] for count, mask in zip(before, masks, strict=True)]
        labelled_places = [(n - e)[~mask] for n, e, mask in zip(places, before, masks, strict=True)]
        # A small part may hold no images of one kind, and workers cannot be asked for empty batches.
        from_labelled = labelled.batches([place for place in labelled_places if len(place)])
        from_extra = extra.batches([place for place in extra_places if len(place)])
        for mask in masks:
            kinds = [] if bool(mask.all()) else [next(from_labelled)]
            if bool(mask.any()):
                batch = next(from_extra)
                kinds.append(batch._replace(index=-1 - batch.index))
            at = torch.cat([torch.nonzero(~mask), torch.nonzero(mask)]).flatten().argsort()
            at = at.to(kinds[0].x.device)
            yield Batch(*(torch.cat(tensors)[at] for tensors in zip(*kinds, strict=True)))

    def _num_extra(self, n: Places) -> Places:
        """Return e(n), the extra images among the first ``n`` places, equation (1)."""
        top, bottom = self._share.numerator, self._share.denominator
        return (2 * n * top + bottom) // (2 * bottom)

    @property
    def _share(self) -> Fraction:
        """The fraction f as people write it: 0.7 is 7/10."""
        return Fraction(self.fraction).limit_denominator(1000)
