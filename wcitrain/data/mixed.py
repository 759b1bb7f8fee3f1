"""Training on labelled images and on extra ones, a fixed share of every batch.

An epoch is one sequence of places, of which a share f belongs to extra images. Place n is extra where

    e(n+1) > e(n),    e(n) = ⌊n f + 1/2⌋,                                                                  (1)

so that any B places in a row hold B f extra images if that is whole, and else the whole number below or
above. This depends on nothing but the place: the batch, its micro-batches and the parts of the ranks are cuts
of one sequence, each with its share. Place n shows labelled image n - e(n) of the epoch or extra image e(n);
the labelled ones are those of training without extra images, in the same order, with the same crops. The
epoch ends with the labelled images.

Extra images are drawn without replacement, pass after pass over them: with X of them an epoch, the t-th of
epoch k is number c = k X + t of all, and comes from pass ⌊c/M⌋. Passes do not end with epochs.

Legend: B batch, f share, M extra images, N labelled images, X extra places of an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from wcitrain.data.augment import Augmentation
from wcitrain.data.decoding import Decoder
from wcitrain.data.epoch import Batch, Epoch
from wcitrain.data.loader import ImageSet, rank_places
from wcitrain.seeding import generator_from

Places = TypeVar("Places", int, Tensor)


@dataclass(frozen=True, eq=False)
class MixedSet:
    """The counterpart of ``ImageSet`` for training with extra images; measured are its labelled images.

    Attributes:
        train: The labelled images; they decide the length of an epoch.
        extra: Images of the same shape and classes, labelled or pseudo-labelled; streams have own workers.
        fraction: Share f of extra images in a batch, 0.001 to 0.999, rounded to a denominator up to 1000.

    Raises:
        ValueError: The sets do not fit together or the fraction is out of range; the recipe key is named.
    """

    train: ImageSet
    extra: ImageSet
    fraction: float

    def __post_init__(self) -> None:
        if not 0.001 <= self.fraction <= 0.999:
            raise ValueError(
                f"extra.fraction: got {self.fraction}; expected 0.001 to 0.999 of a batch. Remove extra to "
                "use none."
            )
        for images, name in ((self.train, "training"), (self.extra, "extra")):
            if not isinstance(images, ImageSet):
                raise ValueError(
                    f"extra.path: got {name} images of type {type(images).__name__}; expected an ImageSet, "
                    "as a stream cannot be mixed. Use another data.name or no extra images."
                )
        if self.extra.decoder.shape != self.train.decoder.shape:
            raise ValueError(
                f"extra.path: got images {list(self.extra.decoder.shape)}; expected "
                f"{list(self.train.decoder.shape)} of the training images. Convert, or set data.image_size."
            )
        if not self._num_extra(self.num_places):
            raise ValueError(
                f"extra.fraction: got {self.fraction} with {len(self.train)} training images; expected at "
                "least one extra image an epoch. Raise it."
            )
        num_classes = len(self.train.decoder.source.class_names)
        low, high = int(self.extra.y.min()), int(self.extra.y.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"extra.labels: got labels {low} to {high}; expected 0 to {num_classes - 1}. Give images "
                "without labels pseudo-labels first."
            )

    def __len__(self) -> int:
        """The labelled images; an epoch passes over them once."""
        return len(self.train)

    @property
    def decoder(self) -> Decoder:
        """Of the labelled images."""
        return self.train.decoder

    @property
    def positions(self) -> Tensor:
        """Of the labelled images."""
        return self.train.positions

    @property
    def y(self) -> Tensor:
        """Of the labelled images."""
        return self.train.y

    def take(self, rows: Tensor) -> ImageSet:
        """Return the labelled images at ``rows``."""
        return self.train.take(rows)

    def subset(self, n: int) -> ImageSet:
        """Return ``n`` labelled images, the same as without extra images."""
        return self.train.subset(n)

    @cached_property
    def num_places(self) -> int:
        """Labelled and extra images of an epoch: the most places that need no more than N labelled ones.

        Of n places ⌈n (1-f) - 1/2⌉ are labelled, so n (1-f) <= N + 1/2.
        """
        return int((len(self) + Fraction(1, 2)) / (1 - self._share))

    def num_updates(self, batch_size: int) -> int:
        """Return the whole batches of an epoch: ⌊N / (B - E)⌋ where E = B f extra images a batch is whole."""
        return self.num_places // batch_size

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        crop_padding: int = 0,
        flip: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
    ) -> Iterator[Batch]:
        """Iterate over one epoch of training.

        Arguments are those of ``ImageSet.batches``, ``shuffle`` and ``drop_last`` both True.
        ``Batch.index`` of an extra image is -1 - its position, so that it is never taken for a labelled one.

        Raises:
            ValueError: At the call, for measuring with extra images, or for a batch that does not fit.
        """
        if not (shuffle and drop_last):
            raise ValueError(
                f"batches: got shuffle={shuffle}, drop_last={drop_last} for labelled and extra images; "
                "expected both True, as they are for training. Measure on .train or .subset(n)."
            )
        places = rank_places(self.num_places, batch_size, start=start, rank=rank, world=world, drop_last=True)
        settings: dict[str, Any] = {"crop_padding": crop_padding, "flip": flip, "augmentation": augmentation}
        labelled = self.train.draw_epoch(seed, epoch, shuffle=True, **settings)
        rows = self._extra_rows(seed, epoch)
        extra = Epoch.draw(self.extra, rows, seed, "augment extra", epoch, **settings)
        return self._merge(places, labelled, extra, torch.device(device))

    def _merge(
        self, places: list[Tensor], labelled: Epoch, extra: Epoch, device: torch.device
    ) -> Iterator[Batch]:
        """Yield labelled and extra images at their places."""
        before = [self._num_extra(place) for place in places]
        is_extra = [self._num_extra(place + 1) > count for place, count in zip(places, before, strict=True)]
        parts = list(zip(places, before, is_extra, strict=True))
        extra_places = [count[mask] for _, count, mask in parts]
        labelled_places = [(place - count)[~mask] for place, count, mask in parts]
        # A small part may hold no images of one kind, and workers cannot be asked for empty batches.
        from_labelled = labelled.batches([place for place in labelled_places if len(place)], device)
        from_extra = extra.batches([place for place in extra_places if len(place)], device)
        for mask in is_extra:
            kinds = [] if bool(mask.all()) else [next(from_labelled)]
            if bool(mask.any()):
                batch = next(from_extra)
                kinds.append(batch._replace(index=-1 - batch.index))
            at = torch.cat([torch.nonzero(~mask), torch.nonzero(mask)]).flatten().argsort().to(device)
            yield Batch(*(torch.cat(tensors)[at] for tensors in zip(*kinds, strict=True)))

    def _extra_rows(self, seed: int, epoch: int) -> Tensor:
        """Return the rows of ``extra`` that an epoch shows, int64 [X]."""
        m, x = len(self.extra), self._num_extra(self.num_places)
        first = epoch * x // m
        passes = range(first, ((epoch + 1) * x - 1) // m + 1)
        orders = [
            torch.randperm(m, generator=generator_from("cpu", seed, "extra", number)) for number in passes
        ]
        return torch.cat([torch.arange(0), *orders])[epoch * x - first * m :][:x]

    def _num_extra(self, n: Places) -> Places:
        """Return e(n), the extra images among the first ``n`` places, equation (1)."""
        top, bottom = self._share.numerator, self._share.denominator
        return (2 * n * top + bottom) // (2 * bottom)

    @cached_property
    def _share(self) -> Fraction:
        """The fraction f as people write it: 0.7 is 7/10."""
        return Fraction(self.fraction).limit_denominator(1000)
