"""The Weight-Curvature Index from samples of the layer-wise traces, with its error; and the bound behind it.

Legend: W_l weights of layer l, a_l = ||W_l||_F², t_l = Tr(H_l), d_l = numel(W_l); K samples (batches); R̂ mean
loss on N training examples, δ failure probability, β inverse temperature, B a grid of them.

    WCI = Σ_l sqrt( a_l t_l )                                         (Xu & Zhang, arXiv 2410.07719v1)

The square root of a noisy mean is biased low. With K independent samples the jackknife removes the bias of
order 1/K and gives the standard error of the sum, correlations between layers included:

    θ_{-k} = Σ_l sqrt( a_l t_{l,-k} ),  θ̂ = K θ − (K−1) mean θ_{-k},  Var θ̂ = (K−1)/K Σ_k (θ_{-k} − mean)² (1)

A layer whose trace is below its standard error, with samples of both signs, is too near the kink at zero for
(1): it keeps its plain value, and its error adds to the others', as noisy roots of zero are all too high.
Then the index is not negative. Below 16 chunks θ_{-k} weighs 1 − w_k/Σw (Busing et al. 1999).
A trace more than three standard errors below zero is negative: the layer has no index, nor has the network
(NaN), since a sum over the others would compare as flatter. Three, as one of 40 flat layers is beyond two by
chance; with two chunks one of ten is beyond three even so.

The linear PAC-Bayes bound for a loss in [0, 1] (Germain et al. 2016), over all β of a grid fixed in advance,
with posterior N(W_l, σ_l² I), prior N(0, σ_l² I), so KL = Σ_l a_l / (2 σ_l²), and E_Q R̂ to second order
(with the prior at the weights before training, W_l⁰, a_l = ||W_l − W_l⁰||_F²; a group of weights is a layer):

    E_Q R  ≤  E_Q R̂  +  [ KL(Q‖P) + ln(1/δ) + ln|B| ] / β  +  β / (8N),   E_Q R̂ ≈ R̂ + ½ Σ_l σ_l² t_l      (2)

    σ_l* = ( a_l / (β t_l) )^¼  minimises it,   ½ Σ_l [ σ_l*² t_l + a_l / (β σ_l*²) ] = WCI / √β           (3)

    surrogate  =  min_{β in B}  R̂  +  WCI / √β  +  [ ln(1/δ) + ln|B| ] / β  +  β / (8N)                   (4)

σ_l* says how far the weights of a layer may move at random before the loss rises; its ratios between layers
do not depend on β. A loss L + λ WCI is the bound at β = 1/λ².

(4) is a surrogate and no certificate: cross-entropy is not bounded by one; the Taylor remainder and the
linear term, whose mean is zero, are dropped; σ_l* depends on the training data, which the prior must not, and
nothing pays for it; R̂ and t_l are taken at fixed adversarial examples of an attack that need not be the
worst. It is good for comparing models trained on the same data, and for seeing which λ the index asks for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wcitrain.curvature.estimator import NEGATIVE, TraceEstimate
from wcitrain.measures.problem import finite
from wcitrain.text import aligned, with_error

MIN_CHUNKS = 16  # a standard error from fewer is itself too uncertain to stop by
DELTA = 0.05  # δ of all β together


@dataclass(frozen=True)
class WCIMeasurement:
    """The index, its parts, and how they were measured."""

    layers: Sequence[str]  # names [L]
    squared_norms: Tensor  # a_l [L]
    trace: TraceEstimate  # t_l [L]; negative ones are possible where the estimator allows them
    total: float  # the index by (1), >= 0; of one sample the plain value; NaN with ``negative_layers``
    total_stderr: float  # infinite for one sample, NaN with ``negative_layers``
    sizes: Tensor | None = None  # d_l [L]
    num_examples: int = 0
    num_probes: int = 1  # behind each of the K samples
    estimator: str = "gauss_newton"
    loss: str = ""  # whose curvature it is: "robust loss linf 8/255 PGD-10"
    mean_loss: float = math.nan  # over the same examples; NaN where nobody kept it
    target_relative_error: float | None = None  # what ``total_stderr / total`` was asked to be at most
    center: str = "origin"  # or initial: a_l is of W − W⁰
    groups: str = "layer"  # what a term of the sum is: a filter, a layer, a stage
    held: "WCIMeasurement | None" = None  # by the same draws at images held fixed, where these answer
    added: tuple[float, float] = (math.nan, math.nan)  # to Σ_l t_l by the answer, and its standard error

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
        num, first = len(samples), cls(layers, a, trace, math.nan, math.nan, **details)
        if first.negative_layers:
            return first
        if num < 2:
            return replace(first, total=plain, total_stderr=math.inf)
        weighted = weights[:, None] * samples
        others = (weighted.sum(0) - weighted) / (weights.sum() - weights)[:, None]  # t_{l,-k} [K, L]
        is_rough = (trace.mean < trace.stderr) & (samples < 0).any(0)  # [L]: at the kink
        others = torch.where(is_rough, trace.mean, others)
        without = (a * others.clamp_min(0)).sqrt().sum(-1)  # θ_{-k} [K]
        total = num * plain - (num - 1) * float(without.mean())
        if num < MIN_CHUNKS:
            total = num * plain - float(((1 - weights / weights.sum()) * without).sum())
        stderr = ((num - 1) / num * (without - without.mean()).square().sum()).sqrt()
        rough = first.columns()["wci_stderr"][is_rough].sum()
        return replace(first, total=total, total_stderr=float(stderr + rough))

    @property
    def per_layer(self) -> Tensor:
        """sqrt(a_l max(t_l, 0)) [L], NaN where t_l is negative; not corrected for bias, so a little low."""
        roots = (self.squared_norms * self.trace.mean.clamp_min(0)).sqrt()
        return torch.where(self._is_negative, torch.nan, roots)

    @property
    def _is_negative(self) -> Tensor:
        """Whether t_l is negative beyond its error [L]."""
        return self.trace.mean < -NEGATIVE * self.trace.stderr

    @property
    def negative_layers(self) -> list[str]:
        """Names of the layers whose trace is negative beyond its error, which have no index."""
        return [name for name, bad in zip(self.layers, self._is_negative.tolist(), strict=True) if bad]

    @property
    def num_negative(self) -> int:
        """Trace estimates that are negative within their error and count as zero in the index."""
        return int(((self.trace.mean < 0) & ~self._is_negative).sum())

    @property
    def why_none(self) -> str:
        """Why there is no index; empty where there is one."""
        if not (names := self.negative_layers):
            return ""
        known = f"{len(names)} of {len(self.layers)} traces negative beyond their error"
        return f"no index: {known}, {', '.join(names[:3])}{' ...' * (len(names) > 3)}"

    @property
    def relative_error(self) -> float:
        """Standard error over index, infinite where that is zero or there is none."""
        return self.total_stderr / self.total if self.total > 0 else math.inf

    @property
    def reached(self) -> bool | None:
        """Whether ``target_relative_error`` holds, by enough chunks to tell; None without one."""
        target, num = self.target_relative_error, self.trace.num_probes
        return None if target is None else num >= MIN_CHUNKS and self.relative_error <= target

    def columns(self, beta: float = 1.0) -> dict[str, Tensor]:
        """Return what is known of every layer [L].

        The standard error of the index's part is ½ sqrt(a_l / t_l) stderr(t_l), the delta method, and at most
        sqrt(a_l stderr(t_l)), the index of a trace of one standard error. Shares are NaN where the sum is
        zero or NaN, σ_l* of (3) is infinite where t_l <= 0, ``relative_sigma`` is σ_l* sqrt(d_l) / ||W_l||.
        """
        a, t, error = self.squared_norms, self.trace.mean, self.trace.stderr
        delta = (a / t.clamp_min(0)).sqrt() / 2 * error
        sigma = torch.where(t > 0, a / (beta * t), torch.inf) ** 0.25
        columns = {"squared_norm": a, "trace": t, "trace_stderr": error, "wci": self.per_layer}
        columns["wci_stderr"] = torch.where(self._is_negative, torch.nan, delta.fmin((a * error).sqrt()))
        columns |= {"share": self.per_layer / self.per_layer.sum(), "sigma": sigma}
        if self.sizes is not None:
            columns |= {"size": self.sizes, "relative_sigma": sigma * (self.sizes.cpu() / a).sqrt()}
        return columns

    def metrics(self) -> dict[str, float]:
        """Return the flat names the run log uses; an index that does not exist is left out."""
        flat = {"wci/total": self.total, "wci/total_stderr": self.total_stderr}
        own = self.per_layer, self.trace.mean, self.trace.stderr, self.squared_norms
        prefixes = "wci", "curvature/trace", "curvature/trace_stderr", "frobenius"
        for prefix, column in zip(prefixes, own, strict=True):
            flat |= {f"{prefix}/{name}": x for name, x in zip(self.layers, column.tolist(), strict=True)}
        return {key: x for key, x in flat.items() if not math.isnan(x)}

    def headline(self, *context: str) -> str:
        """Return one line: "WCI 163.2 ± 5.1 (train, robust loss linf 8/255 PGD-10, 1000 examples, ...)"."""
        notes = [*context, self.loss, f"{self.num_examples} examples", *self.notes()[1:]]
        if self.num_negative:
            notes.append(f"{self.num_negative} of {len(self.layers)} traces negative, counted as 0")
        if self.reached is False and not self.why_none:
            error = f"relative error {self.relative_error:.2g} instead of {self.target_relative_error:g}"
            notes.append(f"{error}: limited by examples")
        line = f"WCI {self._text} ({', '.join(note for note in notes if note)})"
        if self.held is None:
            return line
        times, added = with_error(*self.quotient), with_error(*self.added)
        line += f"\nThe same with images held fixed: {self.held._text}; quotient {times}"
        return f"{line}; the answer adds {added} to Σ Tr(H) = {float(self.held.trace.mean.sum()):.4g}"

    @property
    def quotient(self) -> tuple[float, float]:
        """This index over that at images held fixed, and its error, as if theirs were independent."""
        if self.held is None or not self.held.total > 0:
            return math.nan, math.nan
        errors = self.total_stderr, self.held.total_stderr * self.total / self.held.total
        return self.total / self.held.total, math.hypot(*errors) / self.held.total

    def notes(self) -> list[str]:
        """Return how it was measured, beginning with the loss."""
        notes = [self.loss, self.estimator] + [f"by {self.groups}"] * (self.groups != "layer")
        return notes + ["prior at the weights before training"] * (self.center != "origin")

    @property
    def _text(self) -> str:
        return f"– {self.why_none}" if self.why_none else with_error(self.total, self.total_stderr)

    def answer(self) -> dict[str, float]:
        """Return what the attack's answer to the weights adds, by name; empty where the images were held."""
        if self.held is None:
            return {}
        numbers = self.held.total, self.held.total_stderr, *self.quotient, *self.added
        names = [name + end for name in ("held", "quotient", "added") for end in ("", "_stderr")]
        return dict(zip(names, numbers, strict=True))

    def shown(self, beta: float = 1.0) -> tuple[list[str], dict[str, Tensor]]:
        """Return names and ``columns`` as people read them: filters of one tensor are added up, without σ_l*.

        Errors add up too, an upper bound.
        """
        columns = self.columns(beta)
        if self.groups != "filter":
            return [*self.layers], columns
        owners = [name.rpartition("[")[0] for name in self.layers]
        names = list(dict.fromkeys(owners))
        index = torch.tensor([names.index(owner) for owner in owners])
        sums = {key: x.new_zeros(len(names)).index_add(0, index, x) for key, x in columns.items()}
        return names, sums | {"sigma": torch.full_like(sums["wci"], torch.nan)}

    def table(self, beta: float = 1.0) -> str:
        """Return aligned text, a line a layer: a_l, t_l ± error, WCI_l ± error, share, σ_l* at ``beta``."""
        norm = "||W||_F²" if self.center == "origin" else "||W−W⁰||_F²"
        head = "layer, by filter" if self.groups == "filter" else self.groups
        rows = [[head, norm, "Tr(H)", "WCI", "share %", f"σ* (β={beta:.4g})"]]
        names, columns = self.shown(beta)
        for name, *numbers in zip(names, *(column.tolist() for column in columns.values()), strict=True):
            a, t, dt, wci, dwci, share, sigma, *_ = numbers
            index = "–" if math.isnan(wci) else with_error(wci, dwci)
            part = "–" if math.isnan(share) else f"{100 * share:.1f}"
            width = "–" if math.isnan(sigma) else f"{sigma:.3g}"
            rows.append([name, f"{a:.4g}", with_error(t, dt), index, part, width])
        return aligned(rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a number that is not finite becomes None."""
        columns = [(key, column.double().tolist()) for key, column in self.columns().items()]
        own = "loss", "estimator", "num_examples", "num_probes", "num_negative", "negative_layers", "center"
        return {
            "wci": finite(self.total),
            "wci_stderr": finite(self.total_stderr),
            "relative_error": finite(self.relative_error),
            "mean_loss": finite(self.mean_loss),
            **{key: finite(x) for key, x in self.answer().items()},
            "num_chunks": self.trace.num_probes,
            **{name: getattr(self, name) for name in (*own, "groups", "target_relative_error", "reached")},
            "layers": {x: {key: finite(c[i]) for key, c in columns} for i, x in enumerate(self.layers)},
        }


@dataclass(frozen=True)
class PACBayesBound:
    """The minimum (4), a surrogate for the mean risk over perturbed weights, in the unit of the loss."""

    value: float
    beta: float  # the minimiser on the grid
    terms: dict[str, float]  # of (4) by name; they sum to the value
    delta: float
    stderr: float | None = None  # as far as it comes from WCI's: that over √β, to first order

    def __str__(self) -> str:
        """One line for the log, with the word surrogate in it."""
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        parts = " + ".join(f"{name} {term:.4g}" for name, term in self.terms.items())
        at = f"beta {self.beta:.4g}, delta {self.delta:g}"
        return f"PAC-Bayes surrogate {self.value:.4g}{error} = {parts} ({at})"


def pac_bayes_bound(
    risk: float, wci: float, num_examples: int, wci_stderr: float | None = None
) -> PACBayesBound:
    """Return (4) for a mean loss R̂ >= 0 and an index >= 0 on a training set of N = ``num_examples`` >= 1.

    The grid of β is the powers of two from 1 to 64 N: it depends on N alone, never on the data. The best β,
    about (4 N WCI)^(2/3), is inside for WCI up to 128 √N, and there that of the grid is at most
    (√2 + 1/√2)/2 = 1.061 times worse. Another index, NaN too, is a ``ValueError``.
    """
    if not wci >= 0:
        raise ValueError(f"pac_bayes_bound: got wci {wci}; expected at least 0. Use hessian_trace instead.")
    betas = [2.0**k for k in range(int(math.log2(64 * num_examples)) + 1)]

    def terms(beta: float) -> dict[str, float]:
        return {
            "risk": float(risk),
            "curvature": wci / math.sqrt(beta),
            "confidence": (math.log(1 / DELTA) + math.log(len(betas))) / beta,
            "complexity": beta / (8 * num_examples),
        }

    best = min(betas, key=lambda beta: sum(terms(beta).values()))
    stderr = None if wci_stderr is None else wci_stderr / math.sqrt(best)
    return PACBayesBound(sum(terms(best).values()), best, terms(best), DELTA, stderr)
