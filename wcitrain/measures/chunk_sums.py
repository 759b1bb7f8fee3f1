"""Means over examples that are worked on in chunks: of gradients, and of numbers with their error.

Legend: N examples, K chunks, n_k examples of chunk k.

    x̄ = Σ_k n_k x_k / N,     Var x̄ = K/(K−1) Σ_k (n_k/N)² (x_k − x̄)²                                    (1)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wcitrain.measures.adversarial import Chunks, example_losses


def mean_gradient(model: nn.Module, chunks: Chunks, tensors: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """Return the mean cross-entropy over all examples and its gradient, zero for tensors without one."""
    total = count_examples(chunks)
    value, gradient = 0.0, [torch.zeros_like(t) for t in tensors]
    for x, y in chunks:
        loss = example_losses(model, x, y).sum() / total
        torch._foreach_add_(
            gradient, torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        )
        value += float(loss.detach())
    return value, gradient


def count_examples(chunks: Chunks) -> int:
    """Return N."""
    return sum(len(y) for _, y in chunks)


def sizes(chunks: Chunks) -> Tensor:
    """Return n_k [K] in float64."""
    return torch.tensor([len(y) for _, y in chunks], dtype=torch.float64)


def chunk_mean_and_error(values: Sequence[float] | Tensor, weights: Tensor) -> tuple[float, float]:
    """Return (1) for one number a chunk [K] and ``weights`` n_k [K]; the error of a single chunk is NaN."""
    values = torch.as_tensor(values, dtype=torch.float64)
    shares = weights / weights.sum()
    mean = (shares * values).sum()
    num = len(values)
    if num < 2:
        return float(mean), math.nan
    return float(mean), float((num / (num - 1) * (shares * (values - mean)).square().sum()).sqrt())
