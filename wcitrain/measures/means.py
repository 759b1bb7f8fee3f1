"""Examples in chunks, their losses, and means over them: of gradients, of numbers with their error.

Legend: N examples, B examples a chunk, K chunks, n_k examples of chunk k.

    x̄ = Σ_k n_k x_k / N,     Var x̄ = K/(K−1) Σ_k (n_k/N)² (x_k − x̄)²                                    (1)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wcitrain.curvature.loss import gradients_of
from wcitrain.params import precise
from wcitrain.preserve import normal

Pair = tuple[Tensor, Tensor]  # images [B, *dims] in [0, 1] and classes [B]
Chunks = Sequence[Pair]  # on the model's device


def read_pairs(batches: Iterable[Any], limit: int | None = None) -> Iterator[Pair]:
    """Yield images and labels of what yields (x, y, ...), at most ``limit`` examples, no batch too many."""
    left = math.inf if limit is None else limit
    for batch in batches:
        x, y, *_ = [*batch, None, None] if isinstance(batch, tuple | list) else (None, None)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or len(x) != len(y):
            rule = "(x, y, ...), two tensors of the same length first. Wrap the loader in a generator"
            raise ValueError(f"data: got a {type(batch).__name__} as a batch; expected {rule}.")
        keep = int(min(len(x), left))
        yield normal(x[:keep]), normal(y[:keep])
        left -= keep
        if left <= 0:
            return


def in_chunks(pairs: Iterable[Pair], size: int) -> Iterator[Pair]:
    """Yield examples in chunks of ``size``, whatever the batches were; the last one may be smaller."""
    held: Pair | None = None
    for pair in pairs:
        x, y = pair if held is None else (torch.cat(both) for both in zip(held, pair, strict=True))
        while len(y) >= size:
            yield x[:size], y[:size]
            x, y = x[size:], y[size:]
        held = x, y
    if held is not None and len(held[1]):
        yield held


def example_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of every example [B]."""
    return F.cross_entropy(precise(model(x)), y, reduction="none")


def losses_of(model: nn.Module, chunks: Chunks) -> Tensor:
    """Return the cross-entropy of all examples [N] in float64 on the CPU, no graph."""
    with torch.no_grad():
        return torch.cat([example_losses(model, x, y) for x, y in chunks]).double().cpu()


def mean_gradient(model: nn.Module, chunks: Chunks, tensors: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """Return the mean cross-entropy over all examples and its gradient, zero for tensors without one."""
    total = count_examples(chunks)
    value, gradient = 0.0, [torch.zeros_like(t) for t in tensors]
    for x, y in chunks:
        loss = example_losses(model, x, y).sum() / total
        part = gradients_of(loss, tensors, partial(_total, model, x, y))
        used = [(sum_, g.detach()) for sum_, g in zip(gradient, part, strict=True) if g is not None]
        if used:
            torch._foreach_add_(*map(list, zip(*used, strict=True)))
        value += float(loss.detach())
    return value, gradient


def _total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return example_losses(model, x, y).sum()


def count_examples(chunks: Chunks) -> int:
    """Return N."""
    return sum(len(y) for _, y in chunks)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of [N] values and its standard error; NaN for a single one."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def chunk_mean_and_error(values: Sequence[float] | Tensor, chunks: Chunks) -> tuple[float, float]:
    """Return (1) for one number a chunk [K]; the error of a single chunk is NaN."""
    values = torch.as_tensor(values, dtype=torch.float64)
    weights = torch.tensor([len(y) for _, y in chunks], dtype=torch.float64)
    shares = weights / weights.sum()
    mean = (shares * values).sum()
    num = len(values)
    if num < 2:
        return float(mean), math.nan
    return float(mean), float((num / (num - 1) * (shares * (values - mean)).square().sum()).sqrt())
