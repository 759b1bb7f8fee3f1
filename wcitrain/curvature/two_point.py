"""Curvature from the gradients at two opposite weight perturbations: first order only.

Legend: W_l layer weights, d_l their number, a_l = ||W_l||_F², t_l = Tr(H_l), v_l signs in {−1, +1}^{d_l},
u_l = σ_l v_l the perturbation, g± the gradients of the same loss at W ± u, g the one at W.

A Taylor expansion at W and E[v vᵀ] = I give, exactly on a quadratic loss and up to O(σ²) on a smooth one,

    u_lᵀ (g+ − g−)_l / (2 σ_l²)  =  v_lᵀ (H v)_l + ...,       expectation t_l,                                  (1)
    ½ (g+ + g−)                  =  ∇[ L + ½ uᵀ H u ] + ...,  expectation ∇[ L + ½ Σ_l σ_l² t_l ].             (2)

One random direction carries every layer's coefficient at once: cross-layer terms vanish in expectation. On networks with
ReLU the second difference also sees the kinks and does not converge to Tr(H) as σ -> 0: there (1) is the curvature of the
loss smoothed over the radius, which is another quantity than autograd's Hessian.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.loss import LossFn, as_loss
from wcitrain.curvature.probes import signs
from wcitrain.params import Layers, wide
from wcitrain.preserve import kept_random_state, perturbed, random_state, set_random_state


def trace_from_slopes(slope_plus: Tensor, slope_minus: Tensor, sigma: Tensor) -> Tensor:
    """Return the single-draw estimates of t_l [L] of equation (1); NaN where a layer was not perturbed or has no gradient.

    Args:
        slope_plus, slope_minus: ``u_lᵀ g±_l`` [L], NaN for a layer without gradient.
        sigma: ``σ_l`` [L].
    """
    variance = wide(sigma).square()
    return (slope_plus - slope_minus) / torch.where(variance > 0, 2 * variance, torch.nan)


def two_point_samples(
    loss_fn: LossFn,
    layers: Mapping[str, Tensor],
    *,
    radius: float = 0.01,
    num_probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return independent draws of t_l by equation (1) as a tensor [K, L]; two passes a draw, no double backward.

    Beside what (1) says, layer m adds (σ_m / σ_l)² ||H_lm||_F² to the variance of t_l. A layer of zero norm cannot be
    perturbed: NaN. ``loss_fn`` is evaluated at ``W ± u`` with ``||u_l|| = radius ||W_l||`` for every layer, with the same global
    random numbers (dropout); the weights come back bit for bit. Buffers are the caller's to protect (``preserve.undisturbed``).

    Args:
        loss_fn: Returns the differentiable mean loss; called ``2 num_probes`` times.
        layers: Tensors by name (leaves).
        radius: Relative size of the perturbation, > 0. Truncation is of order radius², rounding of order 1e-7 / radius in
            float32.
        num_probes: K.
        generator: Source of the signs.
    """
    sized = Layers(layers)
    detached = [t.detach() for t in sized.tensors]
    sigma = radius * (sized.squared_norms() / sized.sizes()).sqrt()
    factors = sized.spread(sigma)
    device = detached[0].device
    states = random_state(device)
    samples = []
    for _ in range(num_probes):
        direction = [f * v for f, v in zip(factors, signs(detached, generator), strict=True)]
        slopes = []
        with kept_random_state(device), perturbed(sized.tensors, direction) as move:
            for side in (+1, -1):
                move(side)
                set_random_state(states, device)
                gradients = torch.autograd.grad(as_loss(loss_fn()).total, sized.tensors, allow_unused=True)
                slopes.append(sized.dots(direction, gradients))
        samples.append(trace_from_slopes(slopes[0], slopes[1], sigma))
    return torch.stack(samples)


def two_point_trace(
    loss_fn: LossFn,
    layers: Mapping[str, Tensor],
    *,
    radius: float = 0.01,
    num_probes: int = 8,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """Return the estimate of t_l on one batch from ``num_probes`` draws of ``two_point_samples``."""
    return TraceEstimate.from_samples(
        two_point_samples(loss_fn, layers, radius=radius, num_probes=num_probes, generator=generator)
    )
