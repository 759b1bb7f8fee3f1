"""Gaussian weight noise as published: noise stability optimization, random weight perturbation.

Legend: W weights, g(·) gradient, w_j the j-th filter (row). Beside it the rules of this project, whose noise
has one relative size a layer: `random_directions`.
"""

import torch
from torch import Tensor

from wcitrain.curvature.passes import TINY, Passes, Step, carry_nan
from wcitrain.method import Positive, PositiveShare, method, setting
from wcitrain.optim.perturbation import (
    ALWAYS,
    Combination,
    Displacement,
    LastPass,
    Schedule,
    WeightPerturbation,
    visit,
)
from wcitrain.optim.random_directions import Maybe, Noise, Posterior


@method
class NoiseStability(Noise):
    """Noise stability optimization: train on the loss averaged over isotropic Gaussian noise.

        u ~ N(0, σ² I),  step on ½ [g(W + u) + g(W − u)],  expectation ∇[L + (σ²/2) Tr(H)] + O(σ⁴).        (1)

    One antithetic pair a step; the authors average several.
    """

    sigma: Positive = setting(0.01, "σ, standard deviation of every weight, in its units.")
    schedule: Schedule = ALWAYS
    label = "NSO σ={sigma:g}"
    source = "Zhang, Li & Ju, arXiv 2306.08553"
    default_layers = "all"
    is_gaussian = True

    def posterior(self, a: Tensor, d: Tensor, t: Maybe, factor: float, is_active: Maybe = None) -> Posterior:
        """Return (1) for all layers; the relative size is its root mean square."""
        sigma = torch.full_like(a, factor * self.sigma)
        size = factor * self.sigma * (d.sum() / a.sum().clamp_min(TINY)).sqrt()
        return Posterior(sigma, None, torch.full_like(size, torch.nan), size)


@method
class RWP(WeightPerturbation):
    """Random weight perturbation: Gaussian noise in proportion to the norm of every filter.

        u_j = σ ||w_j|| ξ,  ξ ~ N(0, I),    step on (1 − α) g(W) + α g(W + u).                             (2)

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

    def __post_init__(self) -> None:
        vars(self).update(is_one_pass=self.mixing == 1)

    def combination(self, factor: float = 1.0) -> Combination:
        """Mix the gradients at W and W + u."""
        return Combination(1 - self.mixing, self.mixing)

    def displace(self, passes: Passes, factor: float) -> Displacement:
        """Draw u by (2)."""
        sigma = torch.full_like(passes.layers.sizes(), factor * self.sigma)
        u, _ = passes.random_direction(sigma, gaussian=True)
        torch._foreach_mul_(u, [filter_norms(t) for t in passes.layers.tensors])
        return Displacement(u, passes.relative_size(u))

    def gradient(self, passes: Passes, factor: float, last_pass: LastPass | None) -> Step:
        """Draw u and mix."""
        weights, loss = self.combination(factor), None
        if weights.here:
            with passes.local():
                loss, _ = passes.plain(weights.here)
        u, size, *_ = self.displace(passes, factor)
        (step,), _ = visit(passes, u, weights, last_pass, keep_statistics=loss is not None)
        shown = step.loss if loss is None else carry_nan(loss, step.loss)
        return step._replace(loss=shown, relative_size=size)


def filter_norms(t: Tensor) -> Tensor:
    """Return the norms of a tensor's rows, shaped to broadcast; one norm for a vector or scalar."""
    if t.ndim <= 1:
        return t.detach().norm()
    return t.detach().flatten(1).norm(dim=1).reshape(-1, *[1] * (t.ndim - 1))
