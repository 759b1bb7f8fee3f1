"""Training on labelled images and on extra ones, a fixed share of every batch.

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
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from wcitrain.data.sets import Batch, Epoch, Images, ImageSet, Reading
from wcitrain.seeding import generator_from

Places = TypeVar("Places", int, Tensor)


@dataclass(frozen=True, eq=False)
class MixedSet(Images):
    """Labelled images ``train`` and a share ``fraction`` of ``extra`` ones; measured are the labelled images.

    The images have one shape. The fraction, inside (0, 1), is rounded to a denominator up to 1000. Raises
    ValueError where an epoch would hold no extra image or labels are missing.
    """

    train: ImageSet
    extra: ImageSet
    fraction: float

    def __post_init__(self) -> None:
        if not self._num_extra(self.num_places):
            text = f"got {self.fraction} with {len(self.train)} training images; expected at least one"
            raise ValueError(f"extra.fraction: {text} extra image an epoch. Raise it.")
        low, high = int(self.extra.y.min()), int(self.extra.y.max())
        num = len(self.train.decoder.source.class_names)
        if low < 0 or high >= num:
            text = f"got labels {low} to {high}; expected 0 to {num - 1}. Give images pseudo-labels first."
            raise ValueError(f"extra.labels: {text}")

    def __len__(self) -> int:
        return len(self.train)

    def subset(self, n: int) -> ImageSet:
        """Return ``n`` labelled images, the same as without extra images."""
        return self.train.subset(n)

    @property
    def num_places(self) -> int:
        """The most places that need no more than N labelled images: ⌈n (1-f) - 1/2⌉ of n are labelled."""
        return int((len(self) + Fraction(1, 2)) / (1 - self._share))

    def read(self, reading: Reading) -> Iterator[Batch]:
        """Iterate over one epoch of training; ``Batch.index`` of an extra image is -1 - its position."""
        if not (reading.shuffle and reading.drop_last):
            got = f"shuffle={reading.shuffle}, drop_last={reading.drop_last} for labelled and extra images"
            text = "expected both True, as they are for training. Measure on .train."
            raise ValueError(f"batches: got {got}; {text}")
        places = reading.places(self.num_places)
        extra = Epoch(self.extra, self._extra_rows(reading), reading, "augment extra")
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

    def _extra_rows(self, reading: Reading) -> Tensor:
        """Return the rows of ``extra`` that an epoch shows, int64 [X]."""
        m, x = len(self.extra), self._num_extra(self.num_places)
        begin = reading.epoch * x
        passes = range(begin // m, (begin + x - 1) // m + 1)
        generators = (generator_from("cpu", reading.seed, "extra", number) for number in passes)
        orders = [torch.randperm(m, generator=generator) for generator in generators]
        return torch.cat(orders)[begin % m :][:x]

    def _num_extra(self, n: Places) -> Places:
        """Return e(n), the extra images among the first ``n`` places, equation (1)."""
        top, bottom = self._share.numerator, self._share.denominator
        return (2 * n * top + bottom) // (2 * bottom)

    @property
    def _share(self) -> Fraction:
        """The fraction f as people write it: 0.7 is 7/10."""
        return Fraction(self.fraction).limit_denominator(1000)
