"""The layers' Hessian blocks and traces entry by entry: what the estimators are tested against.

Legend: d_l elements of layer l, N examples, C outputs, z [N, C] network outputs, Λ_n = ∂²ℓ/∂z_n² [C, C],
J_nl = ∂z_n/∂W_l.

    (H_ll)_i,: = ∂(g_l)_i / ∂W_l,   g_l = ∂L/∂W_l:         one backward through the graph of g an element  (1)
    Tr(G_l) = (1/N) Σ_n w_n Tr(J_nlᵀ Λ_n J_nl):            C backward passes an example                    (2)

For small models, in float64. Use it in the tests of your own losses and layers.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.hvp import gradients_with_graph
from wcitrain.curvature.loss import Loss, Outputs, outputs_of
from wcitrain.params import Layers, wide


def dense_hessian(
    loss: Tensor | Loss, layers: Mapping[str, Tensor], *, max_elements: int = 4096
) -> dict[str, Tensor]:
    """Return every layer's own block ``H_ll`` [d_l, d_l] of the Hessian by (1), elements row by row.

    Args:
        loss: The scalar loss with its graph, which stays usable.
        layers: Tensors by name; one that the loss does not depend on gets zeros.
        max_elements: Refuse larger layers: each costs d_l backward passes and d_l² numbers.

    Raises:
        ValueError: A layer is larger; or a derivative that PyTorch gets wrong (``hvp``).
    """
    blocks = {}
    for name, tensor, gradient, part in _layers_with_gradients(loss, layers, max_elements, order=2):
        rows = [_row(gradient, i, tensor, create_graph=False)[part] for i in range(part.start, part.stop)]
        blocks[name] = torch.stack(rows)
    return blocks


def exact_trace(
    loss: Tensor | Loss, layers: Mapping[str, Tensor], *, create_graph: bool = False, max_elements: int = 4096
) -> TraceEstimate:
    """Return ``Tr(H_ll)`` [L], the sum of the diagonal by (1), with standard error zero.

    Arguments and errors are those of ``dense_hessian``; ``create_graph`` keeps ``mean`` differentiable (third
    derivatives).

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> exact_trace(w[0] ** 2 * w[1] ** 2, {"w": w}).mean
    tensor([10.], dtype=torch.float64)
    """
    order = 3 if create_graph else 2
    traces = []
    for _, tensor, gradient, part in _layers_with_gradients(loss, layers, max_elements, order):
        diagonal = [_row(gradient, i, tensor, create_graph)[i] for i in range(part.start, part.stop)]
        traces.append(wide(torch.stack(diagonal)).sum())
    return _without_error(torch.stack(traces))


def exact_gauss_newton_trace(
    outputs: Outputs, layers: Mapping[str, Tensor], *, create_graph: bool = False
) -> TraceEstimate:
    """Return ``Tr(G_l)`` [L] of the mean loss by (2), with standard error zero.

    From Λ itself, not from its factors, so that it tests them too. Cost: N·C backward passes an output.

    Args:
        outputs: A `Loss` with outputs, one or several `Output`, or bare logits [N, C] (cross-entropy); with
            their graph, which stays usable.
        layers: Tensors by name; one that the outputs do not depend on gets zero.
        create_graph: Keep ``mean`` differentiable.
    """
    sized = Layers(layers)
    total = wide(torch.zeros(len(sized), device=sized.tensors[0].device))
    for logits, kind, weight in outputs_of(outputs, "exact_gauss_newton"):
        weights = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device).expand(len(logits))
        curvature = _output_hessian(logits if create_graph else logits.detach(), kind)
        for z, Λ, w in zip(logits.unbind(), curvature.unbind(), weights.unbind(), strict=True):
            rows = [_gradient(z_c, sized.tensors, create_graph) for z_c in z.unbind()]
            J = [torch.stack(row) for row in zip(*rows, strict=True)]  # [C, ...] for each tensor
            ΛJ = [torch.tensordot(Λ, j, 1) for j in J]
            for c in range(len(z)):
                total = total + w * sized.dots([j[c] for j in J], [λj[c] for λj in ΛJ]) / len(logits)
    return _without_error(total)


def _layers_with_gradients(
    loss: Tensor | Loss, layers: Mapping[str, Tensor], max_elements: int, order: int
) -> Iterator[tuple[str, Tensor, Tensor | None, slice]]:
    """Yield a layer's name, the tensor it is (part of), that one's flat gradient, and its place in it."""
    sized = Layers(layers)
    sizes = {name: layer.numel() for name, layer in sized.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > max_elements:
        raise ValueError(
            f"max_elements: got layer {largest} with {sizes[largest]} elements; expected at most "
            f"{max_elements}. Use hutchinson_trace, or raise max_elements if time and memory allow."
        )
    gradients = gradients_with_graph(loss, sized.tensors, order=order)
    index = start = 0
    for name, size in sizes.items():
        tensor, gradient = sized.tensors[index], gradients[index]
        yield name, tensor, None if gradient is None else gradient.flatten(), slice(start, start + size)
        start += size
        if start == tensor.numel():
            index, start = index + 1, 0


def _row(gradient: Tensor | None, i: int, tensor: Tensor, create_graph: bool) -> Tensor:
    """Return row i of one tensor's Hessian block, flat."""
    if gradient is None or not gradient.requires_grad:
        return torch.zeros_like(tensor).flatten()
    return _gradient(gradient[i], [tensor], create_graph)[0].flatten()


def _gradient(value: Tensor, tensors: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
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


def _without_error(traces: Tensor) -> TraceEstimate:
    return TraceEstimate(traces, torch.zeros_like(traces.detach()), 1)
