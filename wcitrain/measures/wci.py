"""The Weight-Curvature Index of a model, from samples of the layer-wise traces, with its standard error.

    WCI = Σ_l sqrt( a_l t_l ),     a_l = ||W_l||_F²,  t_l = Tr(H_l)          (Xu & Zhang, arXiv 2410.07719v1)

The square root of a noisy mean is biased low. With K independent samples (batches) the jackknife removes the
bias of order 1/K and gives the standard error of the sum, correlations between layers included:

    θ_{-k} = Σ_l sqrt( a_l t_{l,-k} ),  θ̂ = K θ − (K−1) mean θ_{-k},  Var θ̂ = (K−1)/K Σ_k (θ_{-k} − mean)² (1)

The index is the curvature term of a PAC-Bayes bound at its best posterior N(W_l, σ_l² I) of d_l weights:

    σ_l* = ( a_l / (β t_l) )^¼ = argmin_σ ½ [ σ² t_l + a_l / (β σ²) ],     minimum  sqrt( a_l t_l / β )    (2)

A loss L + λ WCI is that bound at the temperature β = 1/λ². σ_l* says how far the weights of a layer may move
at random before the loss rises, σ_l* sqrt(d_l) / ||W_l|| the same as a share of their norm; the ratios
between layers do not depend on β.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.measures.pac_bayes import posterior_sigma


@dataclass(frozen=True)
class WCIMeasurement:
    """The index, its parts, and how they were measured.

    Args:
        layers: Names [L].
        squared_norms: a_l [L].
        trace: t_l [L] with standard errors; negative estimates are possible where the estimator allows them.
        total, total_stderr: The index by (1); of one sample the plain value, with infinite error.
        sizes: d_l [L], where known.
        num_examples: Examples behind it.
        num_probes: Probes behind each of the K samples.
        estimator: Name of the trace estimator.
        loss: The loss whose curvature it is, such as "robust loss linf 8/255 PGD-10".
        mean_loss: That loss, over the same examples; NaN where nobody kept it.
        target_relative_error: What ``total_stderr / total`` was asked to be at most.
        limited_by: Why not: ``"examples"`` (there were no more) or ``"stages"`` (planned anew too often).
    """

    layers: Sequence[str]
    squared_norms: Tensor
    trace: TraceEstimate
    total: float
    total_stderr: float
    sizes: Tensor | None = None
    num_examples: int = 0
    num_probes: int = 1
    estimator: str = "gauss_newton"
    loss: str = ""
    mean_loss: float = math.nan
    target_relative_error: float | None = None
    limited_by: str | None = None

    @classmethod
    def from_samples(
        cls, layers: Sequence[str], squared_norms: Tensor, samples: Tensor, weights: Tensor, **details: Any
    ) -> "WCIMeasurement":
        """Combine trace samples [K, L] of independent batches with ``weights`` [K] examples each.

        ``details`` are fields.
        """
        a = squared_norms.double().cpu()
        samples, weights = samples.double().cpu(), weights.double().cpu()
        details = {"num_examples": int(weights.sum())} | details
        trace = TraceEstimate.from_samples(samples, weights)
        plain = float(_index(a, trace.mean))
        num = len(samples)
        if num < 2:
            return cls(layers, a, trace, plain, float("inf"), **details)
        weighted = weights[:, None] * samples
        without = _index(a, (weighted.sum(0) - weighted) / (weights.sum() - weights)[:, None])  # θ_{-k} [K]
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

        Where the error of t_l is large against t_l the method fails; sqrt(a_l stderr(t_l)), the index of a
        trace of one standard error, bounds it.
        """
        t, error = self.trace.mean.clamp_min(0), self.trace.stderr
        return ((self.squared_norms / t).sqrt() / 2 * error).fmin((self.squared_norms * error).sqrt())

    @property
    def shares(self) -> Tensor:
        """Each layer's share of the sum of ``per_layer`` [L]; NaN where all traces are zero."""
        return self.per_layer / self.per_layer.sum()

    @property
    def num_negative(self) -> int:
        """How many trace estimates are negative and count as zero in the index."""
        return int((self.trace.mean < 0).sum())

    @property
    def relative_error(self) -> float:
        """Standard error over index."""
        return (
            self.total_stderr / self.total if self.total > 0 else float("inf") if self.total_stderr else 0.0
        )

    @property
    def reached(self) -> bool | None:
        """Whether ``target_relative_error`` holds; None without one."""
        return (
            None if self.target_relative_error is None else self.relative_error <= self.target_relative_error
        )

    def posterior_sigma(self, beta: float = 1.0) -> Tensor:
        """Return σ_l* [L] of (2), in the units of the weights; infinite where the loss is flat.

        Args:
            beta: Temperature of the bound, > 0. Training on L + λ WCI means 1/λ²; the default is λ = 1.
        """
        return posterior_sigma(self.squared_norms, self.trace.mean, beta)

    def relative_sigma(self, beta: float = 1.0) -> Tensor:
        """Return σ_l* sqrt(d_l) / ||W_l|| [L]: the posterior's noise as a share of the layer's norm."""
        if self.sizes is None:
            raise ValueError(
                "relative_sigma: got no layer sizes; expected them. Pass sizes= to from_samples."
            )
        return self.posterior_sigma(beta) * (self.sizes.cpu() / self.squared_norms).sqrt()

    def metrics(self) -> dict[str, float]:
        """Return the flat names the run log uses."""
        flat = {"wci/total": self.total, "wci/total_stderr": self.total_stderr}
        columns = (self.per_layer, self.trace.mean, self.trace.stderr, self.squared_norms)
        prefixes = ("wci", "curvature/trace", "curvature/trace_stderr", "frobenius")
        for prefix, column in zip(prefixes, columns, strict=True):
            flat |= {
                f"{prefix}/{name}": value for name, value in zip(self.layers, column.tolist(), strict=True)
            }
        return flat

    def headline(self, *context: str) -> str:
        """Return one line: "WCI 163.2 ± 5.1 (train, robust loss linf 8/255 PGD-10, 1000 examples, ...)"."""
        notes = [*context, self.loss, f"{self.num_examples} examples", self.estimator]
        if self.num_negative:
            notes.append(f"{self.num_negative} of {len(self.layers)} traces negative, counted as 0")
        if self.reached is False:
            notes.append(
                f"relative error {self.relative_error:.2g} instead of {self.target_relative_error:g}: "
                f"limited by {self.limited_by}"
            )
        return (
            f"WCI {with_error(self.total, self.total_stderr)} ({', '.join(note for note in notes if note)})"
        )

    def table(self, beta: float = 1.0) -> str:
        """Return aligned text, a line a layer: a_l, t_l ± error, WCI_l ± error, share, σ_l* at ``beta``."""
        header = ["layer", "||W||_F²", "Tr(H)", "WCI", "share %", f"σ* (β={beta:.4g})"]
        columns = [
            list(self.layers),
            [f"{a:.4g}" for a in self.squared_norms.tolist()],
            [
                with_error(*pair)
                for pair in zip(self.trace.mean.tolist(), self.trace.stderr.tolist(), strict=True)
            ],
            [
                with_error(*pair)
                for pair in zip(self.per_layer.tolist(), self.per_layer_stderr.tolist(), strict=True)
            ],
            [f"{100 * share:.1f}" for share in self.shares.tolist()],
            [f"{sigma:.3g}" for sigma in self.posterior_sigma(beta).tolist()],
        ]
        rows = [header, *map(list, zip(*columns, strict=True))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
                ]
            )
            for row in rows
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a number that is not finite becomes None."""
        per_layer = {
            "squared_norm": self.squared_norms,
            "trace": self.trace.mean,
            "trace_stderr": self.trace.stderr,
            "wci": self.per_layer,
            "wci_stderr": self.per_layer_stderr,
            "share": self.shares,
            "sigma": self.posterior_sigma(),
        }
        if self.sizes is not None:
            per_layer |= {"size": self.sizes, "relative_sigma": self.relative_sigma()}
        return {
            "wci": _finite(self.total),
            "wci_stderr": _finite(self.total_stderr),
            "relative_error": _finite(self.relative_error),
            "loss": self.loss,
            "mean_loss": _finite(self.mean_loss),
            "estimator": self.estimator,
            "num_examples": self.num_examples,
            "num_chunks": self.trace.num_probes,
            "num_probes": self.num_probes,
            "num_negative": self.num_negative,
            "target_relative_error": self.target_relative_error,
            "reached": self.reached,
            "limited_by": self.limited_by,
            "layers": {
                name: {key: _finite(float(column[i])) for key, column in per_layer.items()}
                for i, name in enumerate(self.layers)
            },
        }


def with_error(value: float, error: float) -> str:
    """Return "163.2 ± 5.1": the error with two significant digits, the value with as many decimals."""
    if not (math.isfinite(error) and math.isfinite(value)) or error <= 0:
        return f"{value:.4g} ± {error:.2g}"
    exponent = math.floor(math.log10(error))
    if exponent < -4 or abs(value) >= 1e6:  # too small or too large for plain decimals
        digits = max(0, math.floor(math.log10(max(abs(value), error))) - exponent + 1)
        return f"{value:.{digits}e} ± {error:.1e}"
    decimals = max(0, 1 - exponent)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _index(a: Tensor, t: Tensor) -> Tensor:
    """Return Σ_l sqrt(a_l max(t_l, 0)) over the last dimension."""
    return (a * t.clamp_min(0)).sqrt().sum(-1)
