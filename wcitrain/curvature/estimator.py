"""What an estimator of the layers' traces is, and what it returns.

Legend: L layers, K probes, t_l = Tr(H_l), W weights, g(W) gradient of the loss, shape_l ≥ 0 held constant.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.curvature.passes import Passes, Step, carry_nan
from wcitrain.method import Method
from wcitrain.params import Layers, select_layers

NEGATIVE = 3.0  # standard errors below zero from which a trace counts as negative


@dataclass(frozen=True)
class TraceEstimate:
    """Layer-wise traces with their standard errors."""

    mean: Tensor  # estimates of t_l [L]; may be negative for an indefinite Hessian
    stderr: Tensor  # of the mean [L]; infinite when there was a single probe
    num_probes: int  # independent draws behind the mean

    @classmethod
    def from_samples(cls, samples: Tensor, weights: Tensor | None = None) -> "TraceEstimate":
        """Combine independent unbiased samples [K, L] with ``weights`` [K], their numbers of examples.

        mean = Σ_k w_k x_k / Σ w,     Var(mean) = K/(K-1) · Σ_k w_k² (x_k − mean)² / (Σ w)²
        """
        num = len(samples)
        weights = samples.new_ones(num) if weights is None else weights
        shares = (weights.to(samples) / weights.sum()).unsqueeze(1)
        mean = (shares * samples).sum(0)
        if num < 2:
            return cls(mean, torch.full_like(mean, torch.inf), num)
        variance = num / (num - 1) * (shares * (samples - mean)).square().sum(0)
        return cls(mean, variance.sqrt(), num)


class Estimator(Method):
    """The contract: which layers it takes, draws of their traces, and the gradient of their weighted sum."""

    # It takes differences of gradients at moved weights: these must be float32, and move for nothing else.
    moves_weights: ClassVar[bool] = False

    def layers(self, model: nn.Module, layers: str, *, split_qkv: bool = False) -> Layers:
        """Return the layers whose traces it can estimate, of those asked for."""
        return select_layers(model, layers, split_qkv=split_qkv)

    def draw(self, passes: Passes, num_probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return independent draws of t_l [K, L], no graph, and the loss."""
        raise NotImplementedError

    def add_gradient(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Leave g(W) + strength · ∇ Σ_l shape_l t_l in ``.grad`` and return the loss and estimates of t_l.

        With ``strength`` zero it only measures, and the gradient left is the plain one, bit for bit.
        """
        raise NotImplementedError

    def extra_passes(self, is_active: bool) -> tuple[int, int]:
        """Return the forward and backward passes beyond one each; a differentiated backward counts twice."""
        raise NotImplementedError


def twice_differentiable() -> AbstractContextManager[None]:
    """Compute attention by its plain formula inside: its fused kernels have no second derivative.

    Around forward and backward passes, for activation checkpoints repeat the forward in the backward. Other
    passes keep the kernels: torch's switches are as before on exit, on exceptions too.
    """
    return sdpa_kernel(SDPBackend.MATH)


def backward_with(passes: Passes, total: Tensor, traces: Tensor, shape: Tensor, strength: float) -> Step:
    """Backward through loss + strength · Σ_l shape_l t_l; the loss returned is NaN where that sum is."""
    shown, penalized = total.detach(), total
    if strength:
        added = ((strength * shape).to(traces) * traces).sum().to(total.dtype)
        shown, penalized = carry_nan(shown, added.detach()), total + added
    passes.backward(penalized)
    return Step(shown, traces.detach().to(shape))
