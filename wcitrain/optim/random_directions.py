"""Weight perturbations in random directions: the WCI posterior, and noise of other shapes.

Legend: a_l = ||W_l||_F², d_l = numel(W_l), t_l = Tr(H_l) of the loss at fixed adversarial examples,
s_l = sqrt(a_l / t_l), λ the penalty's strength, r the relative size ||u|| / ||W||, w_j the j-th filter (row).

All but `RWP` average the gradients at W + u and W − u. The pair cancels first-order noise, and its difference
gives the traces for nothing: a Taylor expansion and E[v vᵀ] = I for u_l = σ_l v_l give

    u_lᵀ (g+ − g−)_l / (2 σ_l²)  =  v_lᵀ (H v)_l + ...,       expectation t_l,                             (1)
    ½ (g+ + g−)                  =  ∇[ L + ½ uᵀ H u ] + ...,  expectation ∇[ L + ½ Σ_l σ_l² t_l ],         (2)

exactly on a quadratic loss, up to O(σ²) on a smooth one. On ReLU networks (1) is the curvature of the loss
smoothed over the radius, not Tr(H).
"""

from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.curvature.passes import TINY, Passes, Step, carry_nan
from wcitrain.method import Positive, PositiveShare, method, refuse, setting
from wcitrain.optim.perturbation import ALWAYS, Combination, LastPass, Schedule, WeightPerturbation, visit
from wcitrain.params import wide

FLOOR = 1e-4  # σ_l² of a layer is at most 1/sqrt(FLOOR) = 100 times that of the mean layer
FIRST_SIZE = 0.1  # relative size of perturbations that measure, before traces turn λ into a size

RelativeSize = Annotated[Positive, Field(description="r, perturbation norm over weight norm.")]
LOWEST = "Lowest norm-curvature product of a layer, as a share of the layers' mean, in (0, 1]."
Floor = Annotated[PositiveShare, Field(description=LOWEST)]


class Posterior(NamedTuple):
    """A layer-wise distribution around the weights."""

    sigma: Tensor  # standard deviation of every element of layer l [L]
    frobenius: Tensor | None  # gradient coefficient of W_l [L]
    strength: Tensor  # λ, NaN where it is not defined
    relative_size: Tensor  # r = sqrt(Σ d_l σ_l² / Σ a_l)


class Noise(WeightPerturbation):
    """A random rule with one standard deviation a layer: `posterior` says which."""

    cost: ClassVar[str] = "1 forward and 1 backward pass more"
    measures_traces: ClassVar[bool] = True
    is_gaussian: ClassVar[bool] = False  # else signs

    def combination(self, factor: float = 1.0) -> Combination:
        """Average the antithetic pair."""
        return Combination(0.0, 0.5, 0.5)

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return the posterior for squared norms ``a``, sizes ``d`` and traces ``t`` (if known), all [L]."""
        raise NotImplementedError

    def gradient(self, passes: Passes, factor: float, last_pass: LastPass | None) -> Step:
        """Draw u, average the pair, and read the traces off its difference."""
        layers, weights = passes.layers, self.combination(factor)
        posterior = self.posterior(layers.squared_norms(), layers.sizes(), passes.traces, factor)
        direction, sigma = passes.random_direction(posterior.sigma, gaussian=self.is_gaussian)
        steps, slopes = visit(passes, direction, weights, keep_statistics=False, needs_slopes=True)
        passes.add_norm_gradients(posterior.frobenius)
        variance = wide(sigma).square()  # (1); NaN for a layer not moved or without gradient
        traces = (slopes[0] - slopes[1]) / torch.where(variance > 0, 2 * variance, torch.nan)
        traces = traces / (weights.plus * passes.share)
        loss = torch.stack([step.loss for step in steps]).mean()
        return Step(loss, traces, posterior.relative_size, posterior.strength)


@method
class WCIPosterior(Noise):
    """Train on the loss averaged over the PAC-Bayes optimal posterior: the index as an objective.

        E_u L(W + u) + (λ/2) Σ a_l / s_l  ≈  L + (λ/2) Σ (s_l t_l + a_l / s_l)  =  L + λ Σ sqrt(a_l t_l),  (3)
        σ_l² = λ s_l,    s_l = sqrt(a_l / t_l),    λ = r² Σ a_l / Σ d_l s_l.                               (4)

    The last equality of (3) holds at the optimal s_l, which (4) plugs in from a running average of t_l.
    Directions are random signs, so the relative size is r exactly. A layer whose product a_l t_l is below
    ``floor`` times the mean, or negative, counts with that floor; one without any estimate with the mean.
    Until some trace is positive the shares are ``UniformNoise``'s, and the size of a run by ``strength`` is
    0.1. Under bfloat16 traces from perturbations below about 0.05 are rounding noise: avoid long ramps.
    """

    relative_size: Positive | None = setting(
        None, "r, perturbation over weight norm; null: 1 or by strength."
    )
    strength: Positive | None = setting(None, "λ, weight of the index in the loss, instead of relative_size.")
    frobenius: bool = setting(False, "Add the penalty (λ/2) a_l / s_l, gradient λ W_l / s_l.")
    floor: Floor = FLOOR
    schedule: Schedule = ALWAYS
    source = "this project, on the index of Xu & Zhang, arXiv 2410.07719"

    def __post_init__(self) -> None:
        if self.relative_size is not None and self.strength is not None:
            text = f"got {self.strength:g} beside relative_size={self.relative_size:g}; expected one of them."
            refuse("strength", f"{text} Leave one out.")

    def __str__(self) -> str:
        knob = f"r={self.relative_size or 1.0:g}" if self.strength is None else f"λ={self.strength:g}"
        return f"WCI {knob}{' +F' * self.frobenius}"

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (4)."""
        s, is_known = posterior_shape(a, d, t, self.floor)
        volume = (d * s).sum().clamp_min(TINY)  # all layers zero: nothing to perturb, sigma = 0
        size = self.relative_size or (1.0 if self.strength is None else FIRST_SIZE)
        strength = (factor * size) ** 2 * a.sum() / volume
        if self.strength is not None:
            strength = torch.where(is_known, torch.full_like(strength, factor * self.strength), strength)
        frobenius = norm_coefficients(a, t) * strength if self.frobenius and t is not None else None
        relative_size = (strength * volume / a.sum().clamp_min(TINY)).sqrt()
        return Posterior((strength * s).sqrt(), frobenius, strength, relative_size)


@method
class UniformNoise(Noise):
    """Train on the loss averaged over noise of the same relative size in every layer: the control.

    σ_l² = r² a_l / d_l                                                                                (5)
    """

    relative_size: RelativeSize = 1.0
    schedule: Schedule = ALWAYS
    label = "noise r={relative_size:g}"
    source = "this project, as a control"

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (5)."""
        r = factor * self.relative_size
        return Posterior(r * (a / d).sqrt(), None, a.new_tensor(torch.nan), a.new_tensor(r))


@method
class NoiseStability(Noise):
    """Noise stability optimization: train on the loss averaged over isotropic Gaussian noise.

        u ~ N(0, σ² I),  step on ½ [g(W + u) + g(W − u)],  expectation ∇[L + (σ²/2) Tr(H)] + O(σ⁴).        (6)

    One antithetic pair a step; the authors average several.
    """

    sigma: Positive = setting(0.01, "σ, standard deviation of every weight, in its units.")
    schedule: Schedule = ALWAYS
    label = "NSO σ={sigma:g}"
    source = "Zhang, Li & Ju, arXiv 2306.08553"
    default_layers = "all"
    is_gaussian = True

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (6); the relative size is its root mean square."""
        sigma = factor * self.sigma
        size = sigma * (d.sum() / a.sum().clamp_min(TINY)).sqrt()
        return Posterior(torch.full_like(a, sigma), None, a.new_tensor(torch.nan), size)


@method
class RWP(WeightPerturbation):
    """Random weight perturbation: Gaussian noise in proportion to the norm of every filter.

        u_j = σ ||w_j|| ξ,  ξ ~ N(0, I),    step on (1 − α) g(W) + α g(W + u).                             (7)

    A vector is one filter. α = 1 is LPF-SGD with one sample; α < 1 is RWP's mixed loss (its authors take the
    two gradients on different halves of a batch).
    """

    sigma: Positive = setting(0.01, "σ, standard deviation over the filter's norm.")
    mixing: PositiveShare = setting(0.5, "α, share of the perturbed gradient, in (0, 1].")
    schedule: Schedule = ALWAYS
    label = "RWP σ={sigma:g} α={mixing:g}"
    source = "Bisla et al. 2022 (LPF-SGD), arXiv 2201.08025; Li et al. 2024 (RWP), arXiv 2404.00357"
    cost = "1 forward and 1 backward pass more where it mixes, else none"
    default_layers = "all"

    def combination(self, factor: float = 1.0) -> Combination:
        """Mix the gradients at W and W + u."""
        return Combination(1 - self.mixing, self.mixing)

    def gradient(self, passes: Passes, factor: float, last_pass: LastPass | None) -> Step:
        """Draw u by (7) and mix."""
        weights, loss = self.combination(factor), None
        if weights.here:
            with passes.local():
                loss = passes.plain(weights.here)
        sigma = torch.full_like(passes.layers.sizes(), factor * self.sigma)
        direction, _ = passes.random_direction(sigma, gaussian=True)
        for u, t in zip(direction, passes.layers.tensors, strict=True):
            u.mul_(filter_norms(t))
        size = passes.relative_size(direction)
        (step,), _ = visit(passes, direction, weights, last_pass, keep_statistics=loss is not None)
        shown = step.loss if loss is None else carry_nan(loss, step.loss)
        return step._replace(loss=shown, relative_size=size)


def filter_norms(t: Tensor) -> Tensor:
    """Return the norms of a tensor's rows, shaped to broadcast; one norm for a vector or scalar."""
    if t.ndim <= 1:
        return t.detach().norm()
    return t.detach().flatten(1).norm(dim=1).reshape(-1, *[1] * (t.ndim - 1))


def posterior_shape(a: Tensor, d: Tensor, t: Tensor | None, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """Return ``s_l = sqrt(a_l / t_l)`` [L], a floor on ``a_l t_l``, else ``a_l / d_l``; if any t_l > 0."""
    uniform = a / d
    if t is None:
        return uniform, torch.zeros((), dtype=torch.bool, device=a.device)
    product = a * t
    is_measured = torch.isfinite(product)
    positive = torch.where(is_measured, product, 0.0).clamp_min(0)
    mean = positive.sum() / is_measured.sum().clamp_min(1)
    counted = torch.where(is_measured, positive.clamp_min(floor * mean), mean)
    is_known = mean > 0
    return torch.where(is_known, a / counted.clamp_min(TINY).sqrt(), uniform), is_known


def norm_coefficients(a: Tensor, t: Tensor) -> Tensor:
    """Return ``sqrt(t_l / a_l)`` [L], the gradient of sqrt(a t) in W_l over W_l; 0 for t <= 0 or NaN."""
    return torch.where(t > 0, (t / a.clamp_min(TINY)).sqrt(), 0.0) * (a > 0)
