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

from collections.abc import Sequence

import torch
from torch import Tensor

from wcitrain.params import wide
from wcitrain.seeding import generator_from


def signs(layers: Sequence[Tensor], *key: object) -> list[Tensor]:
    """Return one Rademacher tensor a layer (entries −1 or +1, mean 0, variance 1), a function of ``key`` alone.

    Args:
        layers: Tensors whose shapes, dtypes and device are followed.
        key: Names the draw, for example ``(seed, step, micro_step)``; see ``seeding.seed_from``.
    """
    device = layers[0].device
    generator = generator_from(device, *key)
    num = sum(p.numel() for p in layers)
    # Eight signs a random byte: several times cheaper than one random number a sign.
    random_bytes = torch.randint(0, 256, (-(-num // 8), 1), generator=generator, device=device, dtype=torch.uint8)
    bits = (random_bytes >> torch.arange(8, device=device, dtype=torch.uint8)) & 1
    flat = bits.flatten()[:num].to(torch.int8).mul_(2).sub_(1)
    parts = flat.split([p.numel() for p in layers])
    return [v.view_as(p).to(p.dtype) for v, p in zip(parts, layers, strict=True)]


def trace_from_slopes(slope_plus: Tensor, slope_minus: Tensor, sigma: Tensor) -> Tensor:
    """Return the single-draw estimates of t_l [L] of equation (1); NaN where a layer was not perturbed or has no gradient.

    Args:
        slope_plus, slope_minus: ``u_lᵀ g±_l`` [L], NaN for a layer without gradient.
        sigma: ``σ_l`` [L].
    """
    variance = wide(sigma).square()
    return (slope_plus - slope_minus) / torch.where(variance > 0, 2 * variance, torch.nan)
