"""Products of the Hessian with vectors, by a second backward pass; and the random vectors.

Legend: L(θ) the loss, g = ∂L/∂W the gradient in the tensors W that the vector v is shaped like.

    H v = ∂⟨g, v⟩/∂θ,   v constant: one backward through the graph of g                                    (1)

The rows θ of the product are W itself unless other tensors are asked for: H is then the rectangular block
∂²L/∂θ∂W.

Cost of K products at one point: the forward pass of the loss, one backward that keeps its graph, and K
backwards through both, each 3 to 4 plain backwards (resnet10t on a CPU).

Two operations of PyTorch return wrong derivatives without a word; they are refused by name
(``_WRONG_FROM_ORDER``). Differences of derivatives of a lower order stay right there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wcitrain.curvature.loss import Loss, as_loss

# Lowest order of derivative that is wrong, and what to do; tests/numerics/test_estimators.py measures both.
_WRONG_FROM_ORDER = {
    "WeightNormInterfaceBackward0": (
        2,
        'Remove the weight norm, or use estimator="two_point", which is right for smooth networks only.',
    ),
    "NativeLayerNormBackward0": (
        3,
        'Use central differences: gradient="finite_difference" of the estimator hutchinson.',
    ),
}


def gradients_with_graph(
    loss: Tensor | Loss, tensors: Sequence[Tensor], *, order: int = 2
) -> list[Tensor | None]:
    """Return ∂L/∂W with its graph, for many products; None where the loss does not depend on a tensor.

    Args:
        loss: The scalar loss with its graph, which stays usable.
        tensors: W.
        order: Highest derivative that will be taken.

    Raises:
        ValueError: The loss contains an operation whose derivative of that order PyTorch gets wrong.
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
                f"derivatives of order {order}: got {node.name()} in the graph of the loss; expected "
                "operations that PyTorch differentiates rightly (this one is silently wrong from order "
                f"{wrong_from} on). {remedy}"
            )
        nodes.extend(parent for parent, _ in node.next_functions)


def hvp(
    loss_or_gradients: Tensor | Loss | Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    rows: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    """Return H v by equation (1), one tensor a row; zeros where nothing depends on the row.

    Args:
        loss_or_gradients: The loss; for many vectors at one point ``gradients_with_graph(loss, tensors)``.
        tensors: W, which the vector is shaped like.
        vectors: v, one tensor for each of ``tensors``.
        rows: θ, the tensors whose rows of H are wanted; by default ``tensors``.
        create_graph: Keep the product differentiable (third derivatives).

    Returns:
        Tensors shaped like ``rows``. The graph of the loss stays usable.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp((w**3).sum(), [w], [torch.tensor([1.0, 1.0])])
    [tensor([ 6., 12.])]
    """
    gradients = loss_or_gradients
    if isinstance(gradients, Tensor | Loss):
        gradients = gradients_with_graph(gradients, tensors, order=3 if create_graph else 2)
    rows = tensors if rows is None else rows
    pairs = zip(gradients, vectors, strict=True)
    # A gradient without graph is constant: its rows are zero.
    used = [(g, v) for g, v in pairs if g is not None and g.requires_grad]
    if not used:
        return [torch.zeros_like(row) for row in rows]
    g, v = zip(*used, strict=True)
    products = torch.autograd.grad(
        g, rows, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return list(products)


def signs(tensors: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """Return random signs −1 and +1 ("Rademacher": mean 0, variance 1) shaped like ``tensors``.

    Args:
        tensors: Whose shapes, dtypes and device are followed.
        generator: On any device; ``seeding.generator_from(device, *key)`` makes the draw a function of a key.
    """
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
