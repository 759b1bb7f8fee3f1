"""Hutchinson's estimator of the layer-wise trace of the Hessian, and of its gradient.

Legend: L layers, K probes, W_l layer weights, H_lm blocks of the Hessian, v_l signs in {−1, +1}^{d_l},
θ all parameters.

For a random vector v of independent signs over all layers one Hessian product gives every layer's trace,

    t_l = Tr(H_ll) = E ⟨v_l, (H v)_l⟩,                                                                     (1)
    Var = 2 (‖H_ll‖_F² − Σ_i (H_ll)_ii²) + Σ_{m ≠ l} ‖H_lm‖_F².                                            (2)

The last sum, the cross-layer variance, is often most of it. With *block probes* (v zero off one layer, one
product a layer) it is gone. Since a block is differentiated alone, L of them cost less than L full probes:
the 15 layers of a resnet10t about twice one (on a CPU).

The gradient of Σ_l c_l t_l with c_l ≥ 0 constant: with u_l = √c_l v_l the cross terms vanish in E[uᵀ H u] =
Σ_l c_l t_l, so

    ∇_θ Σ_l c_l t_l = E ∇_θ (uᵀ H u) = E ∂/∂h [H(W + h u) u]_θ  at h = 0                                   (3)
                    ≈ E [ (H(W + h u) u − H(W − h u) u) / (2h) ]_θ,                                        (4)

rows of H over all parameters. (3) by autograd takes third derivatives (``create_graph``), which BatchNorm in
train mode lacks and ``F.layer_norm`` gets wrong; (4) needs second derivatives only.

PyHessian runs (1) for all parameters as one block and stops when the running mean settles, which biases it;
here K is fixed and the spread is reported.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.estimator import Estimator, backward_with, obstacle, trained
from wcitrain.curvature.hvp import gradients_with_graph, hvp, signs
from wcitrain.curvature.loss import Loss
from wcitrain.curvature.passes import Passes, Slopes, Step, carry_nan
from wcitrain.method import PositiveCount, PositiveShare, method
from wcitrain.params import Layers, wide
from wcitrain.preserve import full_precision, kept_buffers, perturbed


@method
class Hutchinson(Estimator):
    """Traces of the Hessian by (1), with the gradient by (4) or, as ``autograd``, by (3).

    Needs second derivatives; ``autograd`` third ones. Extra passes a probe: 2 forward and 6 backward by (4),
    8 backward by (3); to measure only 2 backward, and one for all probes. On ReLU networks (4) sees the kinks
    that ±h u crosses.
    """

    num_probes: PositiveCount = Field(default=1, description="Independent directions a batch.")
    gradient: Literal["finite_difference", "autograd"] = Field(
        default="finite_difference", description="How the penalty is differentiated."
    )
    radius: PositiveShare = Field(
        default=0.01, description="Norm of the step of finite_difference over that of the weights, in (0, 1]."
    )
    label: ClassVar[str] = "Hutchinson"
    probe_cost: ClassVar[int] = 4

    def draw(self, passes: Passes, num_probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return draws of (1)."""
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            loss = passes.evaluate()
        return hutchinson_samples(loss, passes.layers, num_probes=num_probes, generator=generator), loss.total

    def add_gradient(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Add the gradient of uᵀHu, u_l = √c_l v_l, to that of the loss."""
        if strength and self.gradient == "finite_difference":
            return self._by_differences(passes, shape, strength)
        layers = passes.layers
        loss = passes.evaluate()
        gradients = passes.layer_gradients(loss.total, create_graph=True)
        terms, factor = [], strength or 1.0  # the directions carry √(factor · shape)
        for probe in range(self.num_probes):
            direction, sigma = passes.random_direction((factor * shape).sqrt(), probe)
            products = hvp(gradients, layers.tensors, direction, create_graph=strength > 0)
            terms.append(layers.dots(direction, products))
        weighted = torch.stack(terms).mean(0)  # c_l t_l: no division by the σ of a layer of zero norm
        shown = backward_with(passes, loss.total, weighted.sum().to(loss.total) if strength else None)
        traces = weighted.detach() / wide(sigma).square()
        return Step(shown, torch.where(layers.missing(gradients), torch.nan, traces))

    def _by_differences(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Return (4) with ||h u|| = radius ||W||; the traces are the means of those at W ± h u."""
        layers = passes.layers
        norm = (layers.sizes() * strength * shape).sum().sqrt()  # ||u||
        size = layers.squared_norms().sum().sqrt()
        h = float(self.radius * torch.where(size > 0, size, 1.0) / torch.where(norm > 0, norm, 1.0))
        estimates, losses = [], []
        with full_precision(passes.model):
            with kept_buffers(passes.model), passes.local():
                for probe in range(self.num_probes):
                    u, sigma = passes.random_direction((strength * shape).sqrt(), probe)
                    draws = []
                    with perturbed(layers.tensors, [h * x for x in u]) as move:
                        for side in (+1, -1):
                            move(side)
                            loss = passes.evaluate().total
                            product = _inner(passes.layer_gradients(loss, create_graph=True), u, loss)
                            weight = side / (2 * h * self.num_probes)
                            with Slopes(layers, u) as slope:
                                passes.backward(product, weight)
                            draws.append(slope.values / (weight * passes.share))
                            losses.append(loss.detach())
                    estimates.append((draws[0] + draws[1]) / (2 * wide(sigma).square()))
            return Step(carry_nan(passes.plain(), sum(losses)), torch.stack(estimates).mean(0))

    def extra_passes(self, is_active: bool) -> tuple[int, int]:
        """Return what the class's docstring says."""
        if not is_active:
            return 0, 1 + 2 * self.num_probes
        if self.gradient == "finite_difference":
            return 2 * self.num_probes, 6 * self.num_probes
        return 0, 8 * self.num_probes

    def refuses(self, passes: Passes, needs_gradient: bool) -> str | None:
        """Refuse operations without (right) second or, for ``autograd``, third derivatives."""
        is_third = needs_gradient and self.gradient == "autograd"
        loss, tensors = passes.evaluate(), passes.layers.tensors

        def attempt() -> None:
            gradients = gradients_with_graph(loss, tensors, order=3 if is_third else 2)
            rows = trained(passes.model) if needs_gradient else tensors
            ones = [torch.ones_like(t) for t in tensors]
            products = hvp(gradients, tensors, ones, rows=rows, create_graph=is_third)
            if is_third:
                total = torch.stack([p.sum() for p in products]).sum()
                torch.autograd.grad(total, trained(passes.model), allow_unused=True)

        return obstacle(passes, 3 if is_third else 2, attempt)


def hutchinson_samples(
    loss: Tensor | Loss,
    layers: Mapping[str, Tensor],
    *,
    num_probes: int = 1,
    use_block_probes: bool = False,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
) -> Tensor:
    """Return independent unbiased draws of ``Tr(H_l)`` by (1) as a tensor [K, L], float64 (float32 on MPS).

    Cost: one backward with graph, then one Hessian product a probe, or a layer and probe with block probes.
    A draw may be negative, for ReLU networks too.

    Args:
        loss: The scalar loss with its graph, which stays usable.
        layers: Tensors by name; one that the loss does not depend on gets zero.
        num_probes: K.
        use_block_probes: Probe each layer alone.
        generator: Source of the signs, which are the same for block probes; on any device.
        create_graph: Keep the draws differentiable: their gradient is (3), unbiased for that of ``Tr(H_l)``.

    Raises:
        ValueError: A derivative that PyTorch gets wrong (``hvp``).
    """
    sized = Layers(layers)
    gradients = gradients_with_graph(loss, sized.tensors, order=3 if create_graph else 2)
    groups = torch.eye(len(sized)) if use_block_probes else torch.ones(1, len(sized))
    masks = [sized.spread(group.to(sized.tensors[0].device)) for group in groups]
    samples = []
    for _ in range(num_probes):
        v = signs(sized.tensors, generator)
        blocks = [_block(gradients, sized, v, mask, create_graph) for mask in masks]
        samples.append(torch.stack(blocks).sum(0))
    return torch.stack(samples)


def hutchinson_trace(
    loss: Tensor | Loss, layers: Mapping[str, Tensor], *, num_probes: int = 8, **settings: Any
) -> TraceEstimate:
    """Return the estimate of ``Tr(H_l)`` on one batch; arguments as for ``hutchinson_samples``.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hutchinson_trace((w**3).sum(), {"w": w}).mean  # a diagonal Hessian: exact in every draw
    tensor([18.], dtype=torch.float64)
    """
    return TraceEstimate.from_samples(hutchinson_samples(loss, layers, num_probes=num_probes, **settings))


def _inner(gradients: Sequence[Tensor | None], direction: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return <g, u> with its graph, over the layers whose gradient has one; ``0 · like`` where none has."""
    pairs = [(g, u) for g, u in zip(gradients, direction, strict=True) if g is not None and g.requires_grad]
    return torch.stack([0 * like, *((g * u).sum() for g, u in pairs)]).sum()


def _block(
    gradients: Sequence[Tensor | None],
    sized: Layers,
    v: Sequence[Tensor],
    mask: Sequence[Tensor],
    create_graph: bool,
) -> Tensor:
    """Return ⟨u_l, (H u)_l⟩ [L] for u = mask · v; tensors where the mask is zero are not differentiated."""
    u = [m * x for m, x in zip(mask, v, strict=True)]
    inside = [i for i, m in enumerate(mask) if m.any()]
    g, tensors = [gradients[i] for i in inside], [sized.tensors[i] for i in inside]
    rows = hvp(g, tensors, [u[i] for i in inside], create_graph=create_graph)
    products = dict(zip(inside, rows, strict=True))
    return sized.dots(u, [products.get(i) for i in range(len(u))])
