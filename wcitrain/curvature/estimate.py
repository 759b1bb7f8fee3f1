"""What every trace estimator returns: the estimate never travels without its error."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
        weights = torch.ones(num, dtype=samples.dtype, device=samples.device) if weights is None else weights
        shares = (weights.to(samples) / weights.sum()).unsqueeze(1)
        mean = (shares * samples).sum(0)
        if num < 2:
            return cls(mean, torch.full_like(mean, torch.inf), num)
        variance = num / (num - 1) * (shares * (samples - mean)).square().sum(0)
        return cls(mean, variance.sqrt(), num)
