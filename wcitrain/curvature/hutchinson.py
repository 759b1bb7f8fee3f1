"""Hutchinson's estimator of the layer-wise trace of the Hessian, and of its gradient.

Legend: L layers, K probes, W_l layer weights, H_lm blocks of the Hessian, v_l signs in {−1, +1}^{d_l},
θ all parameters. For a random vector v of independent signs one Hessian product gives every layer's trace,

    t_l = Tr(H_ll) = E ⟨v_l, (H v)_l⟩,                                                                     (1)
    Var = 2 (‖H_ll‖_F² − Σ_i (H_ll)_ii²) + Σ_{m ≠ l} ‖H_lm‖_F².                                            (2)

The last sum is often most of it; a call for one layer alone is without it.

The gradient of Σ_l c_l t_l with c_l ≥ 0 constant: with u_l = √c_l v_l the cross terms vanish in E[uᵀ H u] =
Σ_l c_l t_l, so, in rows of H over all parameters,

    ∇_θ Σ_l c_l t_l = E ∇_θ (uᵀ H u)  ≈  E [ (H(W + h u) u − H(W − h u) u) / (2h) ]_θ.                     (3)

By differences, since the third derivatives do not exist for BatchNorm in train mode and are wrong in PyTorch
for ``F.layer_norm``. K is fixed: stopping when the running mean settles, as PyHessian does, biases (1).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from wcitrain.curvature.estimator import Estimator, twice_differentiable
from wcitrain.curvature.loss import Loss, gradients_with_graph, hvp, signs
from wcitrain.curvature.passes import Passes, Step, carry_nan, slopes
from wcitrain.method import PositiveCount, PositiveShare, method, setting
from wcitrain.params import Layers, wide
from wcitrain.preserve import full_precision, kept_buffers, perturbed


@method
class Hutchinson(Estimator):
    """The trace of the Hessian by random signs: unbiased, and of either sign.

    Needs second derivatives. As a penalty it sees the kinks that ±h u crosses on ReLU networks.
    """

    num_probes: PositiveCount = setting(1, "Independent directions a batch.")
    radius: PositiveShare = setting(0.01, "Norm of the step over that of the weights, in (0, 1].")
    label = "Hutchinson"
    source = "Hutchinson 1990, Commun. Stat. Simul. Comput. 19(2); the gradient is this project's"
    cost = "2 forward and 6 backward passes more a probe as a penalty; to measure 1 + 2 a probe backward"
    moves_weights = True

    def draw(self, passes: Passes, num_probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return draws of (1)."""
        with twice_differentiable():
            loss = passes.evaluate()
            draws = hutchinson_samples(loss, passes.layers, num_probes=num_probes, generator=generator)
        return draws, loss.total

    def add_gradient(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Add (3), or with strength zero measure by ⟨u, H u⟩, u_l = √shape_l v_l.

        It measures on the one pass there is: attention rounds as its plain formula, not as its kernels.
        """
        if strength and bool((shape > 0).any()):
            return self._by_differences(passes, shape, strength)
        layers, terms = passes.layers, []
        with twice_differentiable():
            total = passes.evaluate().total
            gradients = gradients_with_graph(total, layers.tensors)
            for probe in range(self.num_probes):
                u, sigma = passes.random_direction(torch.where(shape > 0, shape, 1.0).sqrt(), probe)
                terms.append(layers.dots(u, hvp(gradients, layers.tensors, u)))
            passes.backward(total)
        traces = torch.stack(terms).mean(0) / wide(sigma).square()
        return Step(total.detach(), torch.where(layers.missing(gradients), torch.nan, traces))

    def _by_differences(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Return (3) with ||h u|| = radius ||W||; the traces are the means of those at W ± h u."""
        layers = passes.layers
        norm = (layers.sizes() * strength * shape).sum().sqrt()  # ||u||
        size = layers.squared_norms().sum().sqrt()
        h = self.radius * torch.where(size > 0, size, 1.0) / torch.where(norm > 0, norm, 1.0)
        estimates, losses = [], []
        with full_precision(passes.model):
            with kept_buffers(passes.model), passes.local(), twice_differentiable():
                for probe in range(self.num_probes):
                    u, sigma = passes.random_direction((strength * shape).sqrt(), probe)
                    draws = []
                    with perturbed(layers.tensors, [h * x for x in u]) as move:
                        for side in (+1, -1):
                            move(side)
                            loss = passes.evaluate().total
                            pairs = zip(gradients_with_graph(loss, layers.tensors), u, strict=True)
                            terms = [(g * x).sum() for g, x in pairs if g is not None and g.requires_grad]
                            product = torch.stack([0 * loss, *terms]).sum()  # ⟨u, g⟩
                            weight = side / (2 * h * self.num_probes)
                            with slopes(layers, u) as sums:
                                passes.backward(product, weight)
                            draws.append(layers.joined(sums, torch.nan) / (weight * passes.share))
                            losses.append(loss.detach())
                    estimates.append((draws[0] + draws[1]) / (2 * wide(sigma).square()))
            return Step(carry_nan(passes.plain()[0], sum(losses)), torch.stack(estimates).mean(0))

    def extra_passes(self, is_active: bool) -> tuple[int, int]:
        """Return what ``cost`` says."""
        return (2 * self.num_probes, 6 * self.num_probes) if is_active else (0, 1 + 2 * self.num_probes)


def hutchinson_samples(
    loss: Tensor | Loss,
    layers: Mapping[str, Tensor],
    *,
    num_probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return independent unbiased draws of ``Tr(H_l)`` by (1) as a tensor [K, L] in float64.

    The graph of the scalar loss stays usable; a layer that it does not depend on gets zero. The generator may
    be on any device. Cost: one backward with graph, then one Hessian product a probe. ValueError for a
    derivative that PyTorch gets wrong.
    """
    sized = Layers(layers)
    gradients = gradients_with_graph(loss, sized.tensors)
    samples = []
    for _ in range(num_probes):
        v = signs(sized.tensors, generator)
        samples.append(sized.dots(v, hvp(gradients, sized.tensors, v)))
    return torch.stack(samples)
