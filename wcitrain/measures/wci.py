"""The Weight-Curvature Index of a model, from samples of the layer-wise traces, with its standard error.

    WCI = Σ_l sqrt( a_l t_l ),     a_l = ||W_l||_F²,  t_l = Tr(H_l)          (Xu & Zhang, arXiv 2410.07719v1)

The square root of a noisy mean is biased low. With K independent samples (batches) the jackknife removes the bias of order
1/K and gives the standard error of the sum, correlations between layers included:

    θ_{-k} = Σ_l sqrt( a_l t_{l,-k} ),   θ̂ = K θ − (K−1) mean θ_{-k},   Var θ̂ = (K−1)/K Σ_k (θ_{-k} − mean)²      (1)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from wcitrain.curvature import TraceEstimate


@dataclass(frozen=True)
class WCIMeasurement:
    """The index and its parts.

    Args:
        layers: Names [L].
        squared_norms: a_l [L].
        trace: t_l [L] with standard errors.
        total, total_stderr: The index by (1). With one sample there is no jackknife: the plain value, infinite error.
    """

    layers: Sequence[str]
    squared_norms: Tensor
    trace: TraceEstimate
    total: float
    total_stderr: float

    @classmethod
    def from_samples(
        cls, layers: Sequence[str], squared_norms: Tensor, samples: Tensor, weights: Tensor
    ) -> "WCIMeasurement":
        """Combine trace samples [K, L] of independent batches with ``weights`` [K] examples each."""
        a = squared_norms.double().cpu()
        samples, weights = samples.double().cpu(), weights.double().cpu()
        trace = TraceEstimate.from_samples(samples, weights)
        plain = float(_index(a, trace.mean))
        num = len(samples)
        if num < 2:
            return cls(layers, a, trace, plain, float("inf"))
        weighted = weights[:, None] * samples
        without = _index(a, (weighted.sum(0) - weighted) / (weights.sum() - weights)[:, None])  # θ_{-k} [K]
        total = num * plain - (num - 1) * float(without.mean())
        stderr = ((num - 1) / num * (without - without.mean()).square().sum()).sqrt()
        return cls(layers, a, trace, total, float(stderr))

    @property
    def per_layer(self) -> Tensor:
        """sqrt(a_l max(t_l, 0)) [L], not corrected for bias."""
        return (self.squared_norms * self.trace.mean.clamp_min(0)).sqrt()

    def metrics(self) -> dict[str, float]:
        """Return the flat names the run log uses."""
        flat = {"wci/total": self.total, "wci/total_stderr": self.total_stderr}
        columns = (self.per_layer, self.trace.mean, self.trace.stderr, self.squared_norms)
        prefixes = ("wci", "curvature/trace", "curvature/trace_stderr", "frobenius")
        for prefix, column in zip(prefixes, columns, strict=True):
            flat |= {f"{prefix}/{name}": value for name, value in zip(self.layers, column.tolist(), strict=True)}
        return flat


def _index(a: Tensor, t: Tensor) -> Tensor:
    """Return Σ_l sqrt(a_l max(t_l, 0)) over the last dimension."""
    return (a * t.clamp_min(0)).sqrt().sum(-1)
