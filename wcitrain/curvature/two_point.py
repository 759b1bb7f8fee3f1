"""Curvature from the gradients at two opposite weight perturbations: first order only.

Legend: W_l layer weights, d_l their number, a_l = ||W_l||_F², t_l = Tr(H_l), v_l signs in {−1, +1}^{d_l},
u_l = σ_l v_l the perturbation, g± the gradients of the same loss at W ± u, g the one at W.

A Taylor expansion at W and E[v vᵀ] = I give, exactly on a quadratic loss and up to O(σ²) on a smooth one,

    u_lᵀ (g+ − g−)_l / (2 σ_l²)  =  v_lᵀ (H v)_l + ...,       expectation t_l,                             (1)
    ½ (g+ + g−)                  =  ∇[ L + ½ uᵀ H u ] + ...,  expectation ∇[ L + ½ Σ_l σ_l² t_l ].         (2)

One random direction carries every layer's coefficient at once: cross-layer terms vanish in expectation. On
networks with ReLU the second difference also sees the kinks and does not converge to Tr(H) as σ -> 0: there
(1) is the curvature of the loss smoothed over the radius, which is another quantity than autograd's Hessian.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.hvp import signs
from wcitrain.curvature.loss import LossFn, as_loss
from wcitrain.curvature.passes import Passes, Slopes, Step, carry_nan
from wcitrain.method import PositiveCount, PositiveShare, method
from wcitrain.params import Layers, wide
from wcitrain.preserve import (
    full_precision,
    kept_buffers,
    kept_random_state,
    perturbed,
    random_state,
    set_random_state,
)


@method
class TwoPoint(Estimator):
    """Traces by (1), from gradients at W ± u, and the gradient of a penalty from the same two passes.

        k [g(W+u') + g(W−u') − 2 g(W)],    u' = u/√k,    u_l = √c_l v_l                                    (3)

    Needs first derivatives only, so it goes with every model, compiled ones too; but on networks with kinks
    (ReLU) it sees them and measures another quantity than Tr(H). Small radii approach the Hessian on smooth
    networks and lose digits: rounding errors of the gradients are multiplied by k = ½ (r / radius)², r the
    relative size that the penalty's λ amounts to (logged as ``relative_size``). Extra passes: 2 forward and 2
    backward a probe.
    """

    num_probes: PositiveCount = Field(default=1, description="Independent directions a batch.")
    radius: PositiveShare = Field(
        default=0.01, description="Norm of the direction over that of the weights, in (0, 1]."
    )
    label: ClassVar[str] = "two-point"
    probe_cost: ClassVar[int] = 6

    def draw(self, passes: Passes, num_probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return draws of (1); a layer that the loss does not depend on counts as zero."""
        with torch.no_grad():
            total = passes.evaluate(needs_graph=False).total
        samples = two_point_samples(
            passes.evaluate, passes.layers, radius=self.radius, num_probes=num_probes, generator=generator
        )
        return samples.nan_to_num(), total

    def add_gradient(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Add (3) to the gradient of the loss; the pass at W comes last."""
        layers = passes.layers
        scale = self.radius * (layers.squared_norms().sum() / (layers.sizes() * shape).sum()).sqrt()
        # u' = scale · √shape v with ||u'|| = radius ||W||; so k = strength / scale², shared by the probes.
        weight = float(strength / scale.square()) / self.num_probes if strength and scale > 0 else 0.0
        estimates, losses = [], []
        with full_precision(passes.model):
            with kept_buffers(passes.model), passes.local():
                for probe in range(self.num_probes):
                    direction, sigma = passes.random_direction(scale * shape.sqrt(), probe)
                    slopes = []
                    with perturbed(layers.tensors, direction) as move:
                        for side in (+1, -1):
                            move(side)
                            if weight:
                                with Slopes(layers, direction) as slope:
                                    losses.append(passes.plain(weight))
                                slopes.append(slope.values / (weight * passes.share))
                            else:
                                gradients = passes.layer_gradients(passes.evaluate().total)
                                products = layers.dots(direction, gradients)
                                slopes.append(torch.where(layers.missing(gradients), torch.nan, products))
                    estimates.append(trace_from_slopes(slopes[0], slopes[1], sigma))
            traces = torch.stack(estimates).mean(0)
            if weight:
                return Step(carry_nan(passes.plain(1 - 2 * weight * self.num_probes), sum(losses)), traces)
        return Step(passes.plain(), traces)

    def extra_passes(self, is_active: bool) -> tuple[int, int]:
        """Return two of each a probe."""
        return 2 * self.num_probes, 2 * self.num_probes

    def refuses(self, passes: Passes, needs_gradient: bool) -> str | None:
        """Refuse nothing."""
        return None


def trace_from_slopes(slope_plus: Tensor, slope_minus: Tensor, sigma: Tensor) -> Tensor:
    """Return t_l [L] by (1) from one draw's slopes ``u_lᵀ g±_l`` [L] and ``σ_l`` [L].

    NaN where a layer was not perturbed, or has no gradient: its slope is NaN.
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
    """Return independent draws of t_l by (1) as a tensor [K, L]; two passes a draw, no double backward.

    Layer m adds (σ_m / σ_l)² ||H_lm||_F² to the variance of t_l. A layer of zero norm cannot be perturbed:
    NaN. ``||u_l|| = radius ||W_l||`` for every layer; all passes see the same global random numbers
    (dropout); the weights come back bit for bit. Buffers are the caller's to protect (``undisturbed``).

    Args:
        loss_fn: Returns the differentiable mean loss; called ``2 num_probes`` times.
        layers: Tensors by name (leaves).
        radius: Relative size of the perturbation, > 0. Truncation is of order radius², rounding of order
            1e-7 / radius in float32.
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
    loss_fn: LossFn, layers: Mapping[str, Tensor], *, num_probes: int = 8, **settings: Any
) -> TraceEstimate:
    """Return the estimate of t_l on one batch; arguments as for ``two_point_samples``."""
    return TraceEstimate.from_samples(two_point_samples(loss_fn, layers, num_probes=num_probes, **settings))
