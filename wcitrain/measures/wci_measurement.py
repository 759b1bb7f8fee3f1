"""The Weight-Curvature Index of a model, from samples of the layer-wise traces, with its standard error.

    WCI = Σ_l sqrt( a_l t_l ),     a_l = ||W_l||_F²,  t_l = Tr(H_l)          (Xu & Zhang, arXiv 2410.07719v1)

The square root of a noisy mean is biased low. With K independent samples (batches) the jackknife removes the
bias of order 1/K and gives the standard error of the sum, correlations between layers included:

    θ_{-k} = Σ_l sqrt( a_l t_{l,-k} ),  θ̂ = K θ − (K−1) mean θ_{-k},  Var θ̂ = (K−1)/K Σ_k (θ_{-k} − mean)² (1)

The index is the curvature term of a PAC-Bayes bound at its best posterior N(W_l, σ_l² I) of d_l weights:

    σ_l* = ( a_l / (β t_l) )^¼ = argmin_σ ½ [ σ² t_l + a_l / (β σ²) ],     minimum  sqrt( a_l t_l / β )    (2)

A loss L + λ WCI is that bound at the temperature β = 1/λ². σ_l* says how far the weights of a layer may move
at random before the loss rises; the ratios between layers do not depend on β.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.measures.pac_bayes import posterior_sigma
from wcitrain.measures.problem import finite
from wcitrain.text import aligned, with_error


@dataclass(frozen=True)
class WCIMeasurement:
    """The index, its parts, and how they were measured."""

    layers: Sequence[str]  # names [L]
    squared_norms: Tensor  # a_l [L]
    trace: TraceEstimate  # t_l [L]; negative ones are possible where the estimator allows them
    total: float  # the index by (1); of one sample the plain value
    total_stderr: float  # infinite for one sample
    sizes: Tensor | None = None  # d_l [L]
    num_examples: int = 0
    num_probes: int = 1  # behind each of the K samples
    estimator: str = "gauss_newton"
    loss: str = ""  # whose curvature it is: "robust loss linf 8/255 PGD-10"
    mean_loss: float = math.nan  # over the same examples; NaN where nobody kept it
    target_relative_error: float | None = None  # what ``total_stderr / total`` was asked to be at most
    limited_by: str | None = None  # why not: "examples" (no more) or "stages" (planned anew too often)

    @classmethod
    def from_samples(
        cls, layers: Sequence[str], squared_norms: Tensor, samples: Tensor, weights: Tensor, **details: Any
    ) -> "WCIMeasurement":
        """Combine trace samples [K, L] of independent batches of ``weights`` [K] examples; rest: fields."""
        a = squared_norms.double().cpu()
        samples, weights = samples.double().cpu(), weights.double().cpu()
        details = {"num_examples": int(weights.sum())} | details
        trace = TraceEstimate.from_samples(samples, weights)
        plain = float((a * trace.mean.clamp_min(0)).sqrt().sum())
        num = len(samples)
        if num < 2:
            return cls(layers, a, trace, plain, float("inf"), **details)
        weighted = weights[:, None] * samples
        others = (weighted.sum(0) - weighted) / (weights.sum() - weights)[:, None]  # t_{l,-k} [K, L]
        without = (a * others.clamp_min(0)).sqrt().sum(-1)  # θ_{-k} [K]
        total = num * plain - (num - 1) * float(without.mean())
        stderr = ((num - 1) / num * (without - without.mean()).square().sum()).sqrt()
        return cls(layers, a, trace, total, float(stderr), **details)

    @property
    def per_layer(self) -> Tensor:
        """sqrt(a_l max(t_l, 0)) [L], not corrected for bias: their sum is a little below ``total``."""
        return (self.squared_norms * self.trace.mean.clamp_min(0)).sqrt()

    @property
    def per_layer_stderr(self) -> Tensor:
        """Standard errors of ``per_layer`` [L]: ½ sqrt(a_l / t_l) stderr(t_l), the delta method.

        At most sqrt(a_l stderr(t_l)), the index of a trace of one standard error, where the method fails.
        """
        t, error = self.trace.mean.clamp_min(0), self.trace.stderr
        return ((self.squared_norms / t).sqrt() / 2 * error).fmin((self.squared_norms * error).sqrt())

    @property
    def shares(self) -> Tensor:
        """Each layer's share of the sum of ``per_layer`` [L]; NaN where all traces are zero."""
        return self.per_layer / self.per_layer.sum()

    @property
    def num_negative(self) -> int:
        """Trace estimates that are negative and count as zero in the index."""
        return int((self.trace.mean < 0).sum())

    @property
    def relative_error(self) -> float:
        """Standard error over index."""
        if self.total > 0:
            return self.total_stderr / self.total
        return math.inf if self.total_stderr else 0.0

    @property
    def reached(self) -> bool | None:
        """Whether ``target_relative_error`` holds; None without one."""
        target = self.target_relative_error
        return None if target is None else self.relative_error <= target

    def posterior_sigma(self, beta: float = 1.0) -> Tensor:
        """Return σ_l* [L] of (2), in the units of the weights; infinite where the loss is flat."""
        return posterior_sigma(self.squared_norms, self.trace.mean, beta)

    def columns(self, beta: float = 1.0) -> dict[str, Tensor]:
        """Return what is known of every layer [L]; ``relative_sigma`` is σ_l* sqrt(d_l) / ||W_l||."""
        sigma = self.posterior_sigma(beta)
        columns = {
            "squared_norm": self.squared_norms,
            "trace": self.trace.mean,
            "trace_stderr": self.trace.stderr,
            "wci": self.per_layer,
            "wci_stderr": self.per_layer_stderr,
            "share": self.shares,
            "sigma": sigma,
        }
        if self.sizes is not None:
            relative = sigma * (self.sizes.cpu() / self.squared_norms).sqrt()
            columns |= {"size": self.sizes, "relative_sigma": relative}
        return columns

    def metrics(self) -> dict[str, float]:
        """Return the flat names the run log uses."""
        flat = {"wci/total": self.total, "wci/total_stderr": self.total_stderr}
        own = self.per_layer, self.trace.mean, self.trace.stderr, self.squared_norms
        prefixes = "wci", "curvature/trace", "curvature/trace_stderr", "frobenius"
        for prefix, column in zip(prefixes, own, strict=True):
            flat |= {f"{prefix}/{name}": x for name, x in zip(self.layers, column.tolist(), strict=True)}
        return flat

    def headline(self, *context: str) -> str:
        """Return one line: "WCI 163.2 ± 5.1 (train, robust loss linf 8/255 PGD-10, 1000 examples, ...)"."""
        notes = [*context, self.loss, f"{self.num_examples} examples", self.estimator]
        if self.num_negative:
            notes.append(f"{self.num_negative} of {len(self.layers)} traces negative, counted as 0")
        if self.reached is False:
            error = f"relative error {self.relative_error:.2g} instead of {self.target_relative_error:g}"
            notes.append(f"{error}: limited by {self.limited_by}")
        total = with_error(self.total, self.total_stderr)
        return f"WCI {total} ({', '.join(note for note in notes if note)})"

    def table(self, beta: float = 1.0) -> str:
        """Return aligned text, a line a layer: a_l, t_l ± error, WCI_l ± error, share, σ_l* at ``beta``."""
        rows = [["layer", "||W||_F²", "Tr(H)", "WCI", "share %", f"σ* (β={beta:.4g})"]]
        columns = [column.tolist() for column in self.columns(beta).values()]
        for name, a, t, dt, wci, dwci, share, sigma, *_ in zip(self.layers, *columns, strict=True):
            values = f"{a:.4g}", with_error(t, dt), with_error(wci, dwci), f"{100 * share:.1f}"
            rows.append([name, *values, f"{sigma:.3g}"])
        return aligned(rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a number that is not finite becomes None."""
        columns = [(key, column.double().tolist()) for key, column in self.columns().items()]
        own = "loss", "estimator", "num_examples", "num_probes", "num_negative", "target_relative_error"
        return {
            "wci": finite(self.total),
            "wci_stderr": finite(self.total_stderr),
            "relative_error": finite(self.relative_error),
            "mean_loss": finite(self.mean_loss),
            "num_chunks": self.trace.num_probes,
            **{name: getattr(self, name) for name in (*own, "reached", "limited_by")},
            "layers": {
                name: {key: finite(column[i]) for key, column in columns}
                for i, name in enumerate(self.layers)
            },
        }
