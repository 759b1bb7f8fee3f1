"""Products of the Hessian with vectors, by a second backward pass; and the random vectors.

Legend: L(θ) the loss, g = ∂L/∂W the gradient in the tensors W that the vector v is shaped like.

    H v = ∂⟨g, v⟩/∂θ,   v constant: one backward through the graph of g                                    (1)

The rows θ are W itself unless other tensors are asked for: H is then the rectangular block ∂²L/∂θ∂W. A
product costs 3 to 4 plain backwards (resnet10t on a CPU).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wcitrain.curvature.loss import Loss, as_loss

# Operations whose derivatives PyTorch gets wrong without a word, from which order on, and what to do; both
# are measured in tests/numerics/test_estimators.py. Differences of derivatives of a lower order are right.
_WRONG_FROM_ORDER = {
    "WeightNormInterfaceBackward0": (2, "Remove the weight norm"),
    "NativeLayerNormBackward0": (3, "Take differences of Hessian products"),
}


def gradients_with_graph(
    loss: Tensor | Loss, tensors: Sequence[Tensor], *, order: int = 2
) -> list[Tensor | None]:
    """Return ∂L/∂W with its graph, for many products; None where the loss does not depend on a tensor.

    ValueError where the loss contains an operation whose derivative of that order PyTorch gets wrong.
    """
    total = as_loss(loss).total
    refuse_wrong_derivatives(total, order)
    return list(torch.autograd.grad(total, tensors, create_graph=True, allow_unused=True))


def refuse_wrong_derivatives(total: Tensor, order: int) -> None:
    """Raise ValueError if PyTorch gets wrong a derivative of that order of an operation in the graph."""
    nodes = [total.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        wrong_from, remedy = _WRONG_FROM_ORDER.get(node.name(), (order + 1, ""))
        if order >= wrong_from:
            raise ValueError(
                f"derivatives of order {order}: got {node.name()} in the graph of the loss, silently wrong "
                f"in PyTorch from order {wrong_from} on; expected operations that are right. {remedy}."
            )
        nodes.extend(parent for parent, _ in node.next_functions)


def hvp(
    loss_or_gradients: Tensor | Loss | Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    rows: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return H v by equation (1), shaped like the rows; zeros where nothing depends on a row.

    For many vectors at one point give ``gradients_with_graph(loss, tensors)``, not the loss.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp((w**3).sum(), [w], [torch.tensor([1.0, 1.0])])
    [tensor([ 6., 12.])]
    """
    gradients = loss_or_gradients
    if isinstance(gradients, Tensor | Loss):
        gradients = gradients_with_graph(gradients, tensors)
    rows = tensors if rows is None else rows
    pairs = zip(gradients, vectors, strict=True)
    # A gradient without graph is constant: its rows are zero.
    used = [(g, v) for g, v in pairs if g is not None and g.requires_grad]
    if not used:
        return [torch.zeros_like(row) for row in rows]
    g, v = zip(*used, strict=True)
    return list(torch.autograd.grad(g, rows, v, retain_graph=True, materialize_grads=True))


def signs(tensors: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """Return random signs −1 and +1 shaped like ``tensors``; the generator may be on any device."""
    target = tensors[0].device
    device = target if generator is None else generator.device
    num = sum(t.numel() for t in tensors)
    # Eight signs a random byte: several times cheaper than one random number a sign.
    shape = (-(-num // 8), 1)
    random_bytes = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    bits = (random_bytes >> torch.arange(8, device=device, dtype=torch.uint8)) & 1
    flat = bits.flatten()[:num].to(torch.int8).mul_(2).sub_(1).to(target)
    parts = flat.split([t.numel() for t in tensors])
    return [v.view(t.shape).to(t.dtype) for v, t in zip(parts, tensors, strict=True)]
