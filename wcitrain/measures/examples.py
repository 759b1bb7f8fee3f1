"""Examples out of whatever yields batches: read lazily, dealt in chunks of one size."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Examples:
    """The examples of an iterable of batches, read when they are needed, at most ``limit`` of them."""

    def __init__(self, batches: Iterable[Any], limit: int | None) -> None:
        self._batches = iter(batches)
        self._left: float = math.inf if limit is None else limit
        self._x: list[Tensor] = []
        self._y: list[Tensor] = []

    def ahead(self, num: int) -> int:
        """Read until ``num`` examples are there to be taken, or all there are; return how many."""
        while (there := sum(map(len, self._x))) < num and self._left > 0:
            batch = next(self._batches, None)
            if batch is None:
                self._left = 0
                break
            x, y = _pair(batch)
            keep = int(min(len(x), self._left))
            self._left -= keep
            self._x.append(x[:keep])
            self._y.append(y[:keep])
        return there

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Take all examples in chunks of ``size``, whatever the batches were; the last one may be smaller."""
        while self.ahead(size):
            if len(self._x) > 1:
                self._x, self._y = [torch.cat(self._x)], [torch.cat(self._y)]
            x, y = self._x[0], self._y[0]
            self._x, self._y = [x[size:]], [y[size:]]
            yield x[:size], y[:size]

    def peek(self) -> tuple[Tensor, Tensor]:
        """Return the first example without taking it."""
        return self._x[0][:1], self._y[0][:1]


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels of a batch."""
    x, y, *_ = [*batch, None, None] if isinstance(batch, tuple | list) else (None, None)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or len(x) != len(y):
        rule = "expected (x, y, ...), two tensors of the same length first. Wrap the loader in a generator."
        raise ValueError(f"data: got a {type(batch).__name__} as a batch; {rule}")
    return x, y
