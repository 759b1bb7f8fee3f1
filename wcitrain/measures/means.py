"""Losses of examples that come in chunks, and means over them: of gradients, of numbers with their error.

Legend: N examples, B examples a chunk, K chunks, n_k examples of chunk k.

    x̄ = Σ_k n_k x_k / N,     Var x̄ = K/(K−1) Σ_k (n_k/N)² (x_k − x̄)²                                    (1)
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Chunks = Sequence[tuple[Tensor, Tensor]]  # images [B, *dims] in [0, 1] and classes [B], on the model's device


def example_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of every example [B]."""
    return F.cross_entropy(model(x), y, reduction="none")


def losses_of(model: nn.Module, chunks: Chunks) -> Tensor:
    """Return the cross-entropy of all examples [N] in float64 on the CPU, no graph."""
    with torch.no_grad():
        return torch.cat([example_losses(model, x, y) for x, y in chunks]).double().cpu()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of [N] values and its standard error; NaN for a single one."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def mean_gradient(model: nn.Module, chunks: Chunks, tensors: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """Return the mean cross-entropy over all examples and its gradient, zero for tensors without one."""
    total = count_examples(chunks)
    value, gradient = 0.0, [torch.zeros_like(t) for t in tensors]
    for x, y in chunks:
        loss = example_losses(model, x, y).sum() / total
        part = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(gradient, part)
        value += float(loss.detach())
    return value, gradient


def count_examples(chunks: Chunks) -> int:
    """Return N."""
    return sum(len(y) for _, y in chunks)


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
