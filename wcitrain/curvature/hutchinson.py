"""Hutchinson's estimator of the layer-wise trace of the Hessian, and of its gradient.

Legend: L layers, K probes, W_l layer weights, H_lm blocks of the Hessian, v_l signs in {−1, +1}^{d_l}, θ all parameters.

For a random vector v of independent signs over all layers one Hessian product gives every layer's trace,

    t_l = Tr(H_ll) = E ⟨v_l, (H v)_l⟩,                                                                           (1)
    Var = 2 (‖H_ll‖_F² − Σ_i (H_ll)_ii²) + Σ_{m ≠ l} ‖H_lm‖_F².                                                  (2)

The last sum, the cross-layer variance, is often most of it. *Block probes* (Hutchinson with v zero off one group of layers)
keep in it only the layers m of l's own group, for one product a group: with one layer a group it is gone. Since blocks are
differentiated alone, G groups cost less than G full probes: 15 single layers of a resnet10t about twice one (on a CPU).

The gradient of Σ_l c_l t_l with c_l ≥ 0 constant: with u_l = √c_l v_l the cross terms vanish in E[uᵀ H u] = Σ_l c_l t_l, so

    ∇_θ Σ_l c_l t_l = E ∇_θ (uᵀ H u) = E ∂/∂h [H(W + h u) u]_θ  at h = 0                                         (3)
                    ≈ E [ (H(W + h u) u − H(W − h u) u) / (2h) ]_θ,                                              (4)

rows of H over all parameters. (3) by autograd takes third derivatives (``create_graph``), which BatchNorm in train mode
lacks and ``F.layer_norm`` gets wrong; (4) needs second derivatives only.

PyHessian runs (1) for all parameters as one block and stops when the running mean settles, which biases it; here K is fixed
and the spread is reported.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.hvp import absolute_step, gradients_with_graph, hvp
from wcitrain.curvature.loss import Loss, LossFn, as_loss
from wcitrain.curvature.probes import signs
from wcitrain.params import Layers, wide
from wcitrain.preserve import kept_random_state, perturbed, random_state, set_random_state

Groups = int | str | Sequence[Sequence[str]]


def hutchinson_samples(
    loss: Tensor | Loss,
    layers: Mapping[str, Tensor],
    *,
    num_probes: int = 1,
    groups: Groups = 1,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
) -> Tensor:
    """Return independent unbiased draws of ``Tr(H_l)`` by equation (1) as a tensor [K, L].

    Cost: one backward with graph, then one Hessian product a probe and group. A draw may be negative, for ReLU networks too.

    Args:
        loss: The scalar loss with its graph, which stays usable.
        layers: Tensors by name; one that the loss does not depend on gets zero.
        num_probes: K.
        groups: Block probes: how many groups of consecutive layers; ``"layers"`` (each alone); or the groups themselves, as
            sequences of names in which every layer occurs once. 1: full probes.
        generator: Source of the signs; on any device. The signs do not depend on ``groups``.
        create_graph: Keep the draws differentiable: their gradient is equation (3), unbiased for that of ``Tr(H_l)``.

    Returns:
        In float64 (float32 on MPS).

    Raises:
        ValueError: ``groups`` is no partition of the layers; or a derivative that PyTorch gets wrong (``hvp``).
    """
    sized = Layers(layers)
    masks = _masks(sized, groups)
    gradients = gradients_with_graph(loss, sized.tensors, order=3 if create_graph else 2)
    samples = []
    for _ in range(num_probes):
        v = signs(sized.tensors, generator)
        samples.append(torch.stack([_block(gradients, sized, v, mask, create_graph) for mask in masks]).sum(0))
    return torch.stack(samples)


def hutchinson_trace(
    loss: Tensor | Loss,
    layers: Mapping[str, Tensor],
    *,
    num_probes: int = 8,
    groups: Groups = 1,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
) -> TraceEstimate:
    """Return the estimate of ``Tr(H_l)`` on one batch from ``num_probes`` draws; see ``hutchinson_samples``.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hutchinson_trace((w**3).sum(), {"w": w}).mean  # a diagonal Hessian: exact in every draw
    tensor([18.], dtype=torch.float64)
    """
    return TraceEstimate.from_samples(
        hutchinson_samples(
            loss, layers, num_probes=num_probes, groups=groups, generator=generator, create_graph=create_graph
        )
    )


def hutchinson_penalty_gradient(
    loss_fn: LossFn,
    layers: Mapping[str, Tensor],
    parameters: Sequence[Tensor],
    coefficients: Tensor,
    *,
    num_probes: int = 1,
    relative_step: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return ``∇_θ Σ_l c_l Tr(H_l)`` by equation (4), averaged over the probes, and the draws of the traces [K, L].

    Unbiased up to O(h²). The step is ‖h u‖ = ``relative_step`` ‖W‖: truncation grows as its square, rounding as its inverse, and
    the default (``best_step``) balances them. On small convolutional tanh and GELU networks the error of (4) against float64
    was 2e-4 to 3e-4 of the gradient in float32 (least, 1e-4, near 2e-3) and 5e-9 in float64, while gradients of two probes
    differ by 0.8 to 0.9 of it: the choice is not delicate. On ReLU networks (4) sees the kinks that ±h u crosses, (3) does not.

    Cost of one probe: two Hessian products, each with its forward pass and first backward, at W ± h u. Weights come back bit
    for bit; all passes see the same global random numbers (dropout), whose state is left as it was, but for the signs where
    no generator is given. Buffers are the caller's to protect (``preserve.undisturbed``), and so is full precision
    (``preserve.full_precision``: TF32 is too coarse).

    Args:
        loss_fn: Returns the differentiable mean loss; called ``2 num_probes`` times.
        layers: Tensors by name (leaves).
        parameters: θ, with respect to which the gradient is taken (the layers, biases, normalisation scales, ...).
        coefficients: ``c_l ≥ 0`` [L], held constant.
        num_probes: K.
        relative_step: ‖h u‖ / ‖W‖ over all layers, > 0; by default 6e-6 in float64, 5e-3 in float32.
        generator: Source of the signs; on any device.

    Returns:
        The gradient, shaped like ``parameters``; and the draws ⟨v_l, (H u)_l⟩ / √c_l, mean of W ± h u: unbiased like (1), with
        the cross terms of (2) times c_m / c_l; NaN for a layer with c_l = 0.

    Raises:
        ValueError: A coefficient is negative or not a number.
    """
    if not bool((coefficients >= 0).all()):
        raise ValueError(
            f"coefficients: got {coefficients.tolist()}; expected numbers >= 0, one a layer. Clamp the traces they come from."
        )
    sized = Layers(layers)
    detached = [t.detach() for t in sized.tensors]
    device = detached[0].device
    roots = wide(coefficients.detach().to(device)).sqrt()
    factors = sized.spread(roots)
    states = random_state(device)
    gradient = [torch.zeros_like(p) for p in parameters]
    samples = []
    for _ in range(num_probes):
        v = signs(detached, generator)
        u = [f * s for f, s in zip(factors, v, strict=True)]
        h = absolute_step(relative_step, detached, u)
        traces = torch.zeros_like(roots)
        with kept_random_state(device), perturbed(sized.tensors, [h * x for x in u]) as move:
            for side in (+1, -1):
                move(side)
                set_random_state(states, device)
                Hu = hvp(as_loss(loss_fn()).total, sized.tensors, u, rows=[*parameters, *sized.tensors])
                torch._foreach_add_(gradient, [side / (2 * h * num_probes) * x for x in Hu[: len(gradient)]])
                traces += sized.dots(v, Hu[len(gradient) :]) / torch.where(roots > 0, 2 * roots, torch.nan)
        samples.append(traces)
    return gradient, torch.stack(samples)


def _block(
    gradients: Sequence[Tensor | None],
    sized: Layers,
    v: Sequence[Tensor],
    mask: Sequence[Tensor | None],
    create_graph: bool,
) -> Tensor:
    """Return ⟨v_l, (H v)_l⟩ [L] for the probe v restricted to one group of layers; zero outside the group."""
    inside = [i for i, factor in enumerate(mask) if factor is not None]
    probe = [x if factor is None else factor * x for x, factor in zip(v, mask, strict=True)]
    products: list[Tensor | None] = [None] * len(probe)
    rows = hvp(
        [gradients[i] for i in inside],
        [sized.tensors[i] for i in inside],
        [probe[i] for i in inside],
        create_graph=create_graph,
    )
    for i, row in zip(inside, rows, strict=True):
        products[i] = row
    return sized.dots(probe, products)


def _masks(sized: Layers, groups: Groups) -> list[list[Tensor | None]]:
    """Return for every group one factor of zeros and ones for each tensor; None where it is zero throughout."""
    masks: list[list[Tensor | None]] = []
    position = {name: i for i, name in enumerate(sized)}
    for group in _names(sized, groups):
        indicator = torch.zeros(len(sized))
        indicator[[position[name] for name in group]] = 1
        factors = zip(sized.spread(indicator), sized.tensors, strict=True)
        masks.append([factor.to(t.device) if factor.any() else None for factor, t in factors])
    return masks


def _names(sized: Layers, groups: Groups) -> list[list[str]]:
    """Return the groups as lists of layers' names that partition the layers."""
    names = list(sized)
    if groups == "layers":
        return [[name] for name in names]
    if isinstance(groups, str):
        raise ValueError(f'groups: got {groups!r}; expected a number, "layers", or lists of names. Use one of them.')
    if isinstance(groups, int):
        if not 1 <= groups <= len(names):
            raise ValueError(
                f"groups: got {groups}; expected 1 to {len(names)}, the number of layers. "
                'Use "layers" for one group a layer.'
            )
        ends = [len(names) * g // groups for g in range(groups + 1)]
        return [names[start:end] for start, end in pairwise(ends)]
    chosen = [name for group in groups for name in group]
    if sorted(chosen) != sorted(names) or not all(groups):
        unknown = sorted(set(chosen) - set(names))
        missing = sorted(set(names) - set(chosen))
        repeated = sorted({name for name in chosen if chosen.count(name) > 1})
        raise ValueError(
            f"groups: got lists of names with unknown {unknown[:3]}, missing {missing[:3]}, repeated {repeated[:3]}; expected "
            "every layer once and no empty group. Correct the lists."
        )
    return [list(group) for group in groups]
