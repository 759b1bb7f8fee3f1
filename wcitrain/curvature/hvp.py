"""Products of the Hessian with vectors, by a second backward pass or by differences of gradients.

Legend: L(θ) the loss, g = ∂L/∂W the gradient in the tensors W that the vector v is shaped like, h a step.

    H v = ∂⟨g, v⟩/∂θ,   v constant: one backward through the graph of g                                          (1)
    H v = [g(W + h v) − g(W − h v)] / (2h) + O(h²):   first-order passes only                                    (2)

The rows θ of the product are W itself unless other tensors are asked for: H is then the rectangular block ∂²L/∂θ∂W.

Cost of K products at one point: the forward pass of the loss, one backward that keeps its graph, and K backwards through
both, each 3 to 4 plain backwards (resnet10t on a CPU). By (2) each product costs two forward and two backward passes.

Two operations of PyTorch return wrong derivatives without a word; they are refused by name (``_WRONG_FROM_ORDER``).
Differences of derivatives of a lower order stay right there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wcitrain.curvature.loss import Loss, LossFn, as_loss
from wcitrain.params import wide
from wcitrain.preserve import kept_random_state, perturbed, random_state, set_random_state

# Lowest order of derivative that is wrong, and what to do; tests/numerics/test_estimators.py measures both (torch 2.15, CPU).
_WRONG_FROM_ORDER = {
    "WeightNormInterfaceBackward0": (2, "Remove the weight norm, or use an estimator with gradients only (two_point)."),
    "NativeLayerNormBackward0": (
        3,
        "Use central differences: a penalty's gradient='finite_difference', or hutchinson_penalty_gradient.",
    ),
}


def gradients_with_graph(loss: Tensor | Loss, tensors: Sequence[Tensor], *, order: int = 2) -> list[Tensor | None]:
    """Return ∂L/∂W with its graph, to be used for many products; None where the loss does not depend on a tensor.

    Args:
        loss: The scalar loss with its graph, which stays usable.
        tensors: W.
        order: Highest derivative that will be taken, for the check below.

    Raises:
        ValueError: The loss contains an operation whose derivative of that order is silently wrong in PyTorch.
    """
    total = as_loss(loss).total
    refuse_wrong_derivatives(total, order)
    return list(torch.autograd.grad(total, tensors, create_graph=True, allow_unused=True))


def refuse_wrong_derivatives(total: Tensor, order: int) -> None:
    """Raise ValueError if the graph of the loss has an operation whose derivative of that order PyTorch gets wrong."""
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
                f"derivatives of order {order}: got {node.name()} in the graph of the loss; expected operations that PyTorch "
                f"differentiates rightly (this one is silently wrong from order {wrong_from} on). {remedy}"
            )
        nodes.extend(parent for parent, _ in node.next_functions)


def hvp(
    loss_or_gradients: Tensor | Loss | Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    *,
    rows: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    """Return H v by equation (1), one tensor a row; zeros where nothing depends on the row.

    Args:
        loss_or_gradients: The loss; or, for many vectors at one point, ``gradients_with_graph(loss, tensors)``.
        tensors: W, which the vector is shaped like.
        vectors: v, one tensor for each of ``tensors``; None stands for zeros and saves its part of the work.
        rows: θ, the tensors whose rows of H are wanted; by default ``tensors``.
        create_graph: Keep the product differentiable (third derivatives).

    Returns:
        Tensors shaped like ``rows``. The graph of the loss stays usable.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp((w**3).sum(), [w], [torch.tensor([1.0, 1.0])])
    [tensor([ 6., 12.])]
    """
    gradients: Sequence[Tensor | None]
    if isinstance(loss_or_gradients, Tensor | Loss):
        gradients = gradients_with_graph(loss_or_gradients, tensors, order=3 if create_graph else 2)
    else:
        gradients = loss_or_gradients
    rows = tensors if rows is None else rows
    # A gradient without graph is constant: its rows are zero.
    pairs = [
        (g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None and v is not None and g.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(row) for row in rows]
    return list(
        torch.autograd.grad(
            [g for g, _ in pairs],
            rows,
            [v for _, v in pairs],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def finite_difference_hvp(
    loss_fn: LossFn,
    tensors: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    relative_step: float | None = None,
    rows: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return H v by equation (2), for models without a second derivative (fused attention, ``torch.compile``).

    On networks with kinks (ReLU) it also counts those that ±h v crosses, which equation (1) never sees. Weights come back bit
    for bit, both passes see the same global random numbers, and the random state is left as it was; buffers are the caller's
    to protect (``preserve.undisturbed``), and so is full precision (``preserve.full_precision``: TF32 is too coarse).

    Args:
        loss_fn: Returns the differentiable loss; called twice.
        tensors: W (leaves).
        vectors: v, one for each of ``tensors``.
        relative_step: ‖h v‖ / ‖W‖ over all tensors, > 0; by default ``best_step``. With W = 0 it is ‖h v‖.
        rows: As in ``hvp``.
    """
    weights = [t.detach() for t in tensors]
    rows = tensors if rows is None else rows
    step = absolute_step(relative_step, weights, vectors)
    device = weights[0].device
    sides = []
    with kept_random_state(device), perturbed(tensors, [step * v for v in vectors]) as move:
        states = random_state(device)
        for side in (+1, -1):
            move(side)
            set_random_state(states, device)
            total = as_loss(loss_fn()).total
            sides.append(torch.autograd.grad(total, rows, allow_unused=True, materialize_grads=True))
    return [(plus - minus) / (2 * step) for plus, minus in zip(*sides, strict=True)]


def best_step(dtype: torch.dtype) -> float:
    """Return the relative step ε^(1/3) of a central difference in ``dtype``: 6.1e-6 in float64, 4.9e-3 in float32.

    Truncation grows as h² and rounding as ε/h (ε the machine precision): they balance where h³ is of order ε, at an error of
    order ε^(2/3). In bfloat16 that is 4 %, times what is lost in the passes themselves: of little use.
    """
    return torch.finfo(dtype).eps ** (1 / 3)


def absolute_step(relative_step: float | None, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """Return h with ‖h v‖ = ``relative_step`` ‖W‖ over all tensors (``best_step`` for None; ‖W‖ = 0 counts as one)."""
    if relative_step is None:
        relative_step = best_step(weights[0].dtype)
    if not relative_step > 0:
        raise ValueError(f"relative_step: got {relative_step}; expected a number > 0. Leave it out for the default.")
    size = torch.stack([wide(w).square().sum() for w in weights]).sum().sqrt()
    length = torch.stack([wide(v).square().sum() for v in vectors]).sum().sqrt()
    return relative_step * torch.where(size > 0, size, 1.0) / torch.where(length > 0, length, 1.0)
