"""The layers' Hessian blocks and traces entry by entry: what the estimators are tested against.

Legend: d_l elements of layer l, N examples, C outputs, z [N, C] network outputs, Λ_n = ∂²ℓ/∂z_n² [C, C],
J_nl = ∂z_n/∂W_l.

    (H_ll)_i,: = ∂(g_l)_i / ∂W_l,   g_l = ∂L/∂W_l:         one backward through the graph of g an element  (1)
    Tr(G_l) = (1/N) Σ_n w_n Tr(J_nlᵀ Λ_n J_nl):            C backward passes an example                    (2)

For small models, in float64. Use it in the tests of your own losses and layers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.hvp import gradients_with_graph
from wcitrain.curvature.loss import Loss, Outputs, outputs_of
from wcitrain.params import Layers, wide


def dense_hessian(
    loss: Tensor | Loss, layers: Mapping[str, Tensor], *, create_graph: bool = False, max_elements: int = 4096
) -> dict[str, Tensor]:
    """Return every layer's own block ``H_ll`` [d_l, d_l] of the Hessian by (1), elements row by row.

    The graph of the loss stays usable; a layer that the loss does not depend on gets zeros. ``create_graph``
    keeps the blocks differentiable (third derivatives).

    Raises:
        ValueError: A layer of more than ``max_elements``: it costs d_l backward passes and d_l² numbers. Or a
            derivative that PyTorch gets wrong (``hvp``).
    """
    sized = Layers(layers)
    name, largest = max(((n, layer.numel()) for n, layer in sized.items()), key=lambda item: item[1])
    if largest > max_elements:
        got = f"got layer {name} with {largest} elements; expected at most {max_elements}"
        raise ValueError(f"max_elements: {got}. Use hutchinson_trace, or raise it if time and memory allow.")
    gradients = gradients_with_graph(loss, sized.tensors, order=3 if create_graph else 2)
    blocks: list[Tensor] = []
    for tensor, gradient, num_parts in zip(sized.tensors, gradients, sized.num_parts, strict=True):
        size = tensor.numel() // num_parts
        for start in range(0, tensor.numel(), size):
            part = slice(start, start + size)
            if gradient is None or not gradient.requires_grad:
                blocks.append(tensor.detach().new_zeros(size, size))
                continue
            elements = gradient.flatten()[part]
            rows = [_gradients(element, [tensor], create_graph)[0].flatten()[part] for element in elements]
            blocks.append(torch.stack(rows))
    return dict(zip(sized, blocks, strict=True))


def exact_trace(
    loss: Tensor | Loss, layers: Mapping[str, Tensor], *, create_graph: bool = False, max_elements: int = 4096
) -> TraceEstimate:
    """Return ``Tr(H_ll)`` [L], the traces of ``dense_hessian``'s blocks, with standard error zero.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> exact_trace(w[0] ** 2 * w[1] ** 2, {"w": w}).mean
    tensor([10.], dtype=torch.float64)
    """
    blocks = dense_hessian(loss, layers, create_graph=create_graph, max_elements=max_elements)
    mean = torch.stack([wide(block.diagonal()).sum() for block in blocks.values()])
    return TraceEstimate(mean, torch.zeros_like(mean.detach()), 1)


def exact_gauss_newton_trace(
    outputs: Outputs, layers: Mapping[str, Tensor], *, create_graph: bool = False
) -> TraceEstimate:
    """Return ``Tr(G_l)`` [L] of the mean loss by (2), with standard error zero.

    From Λ itself, not from its factors, so that it tests them too. Cost: N·C backward passes an output.
    Outputs and layers as for ``gauss_newton_samples``; ``create_graph`` keeps ``mean`` differentiable.
    """
    sized = Layers(layers)
    total = wide(torch.zeros(len(sized), device=sized.tensors[0].device))
    for logits, kind, weight in outputs_of(outputs, "exact_gauss_newton"):
        weights = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device).expand(len(logits))
        curvature = _output_hessian(logits if create_graph else logits.detach(), kind)
        for z, Λ, w in zip(logits.unbind(), curvature.unbind(), weights.unbind(), strict=True):
            rows = [_gradients(z_c, sized.tensors, create_graph) for z_c in z.unbind()]
            J = [torch.stack(row) for row in zip(*rows, strict=True)]  # [C, ...] for each tensor
            ΛJ = [torch.tensordot(Λ, j, 1) for j in J]
            for c in range(len(z)):
                total = total + w * sized.dots([j[c] for j in J], [λj[c] for λj in ΛJ]) / len(logits)
    return TraceEstimate(total, torch.zeros_like(total.detach()), 1)


def _gradients(value: Tensor, tensors: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
    """Return the gradients of a number, zero where it does not depend on a tensor; its graph is kept."""
    return torch.autograd.grad(
        value, tensors, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )


def _output_hessian(z: Tensor, kind: str) -> Tensor:
    """Return Λ [N, C, C] of one kind of loss (the table in ``loss``)."""
    if kind == "cross_entropy":
        p = z.softmax(-1)
        return p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
    if kind == "bce":
        return (z.sigmoid() * (-z).sigmoid()).diag_embed()
    return 2 * torch.ones_like(z).diag_embed()
