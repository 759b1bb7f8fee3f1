"""A loss that knows how it depends on the network's outputs, and products of its Hessian with vectors.

Legend: N examples, C outputs, z network outputs ("logits") [N, C], p = softmax(z), q = sigmoid(z), g gradient
in the tensors W that a vector v is shaped like.

A loss is the mean over examples of terms w_n ℓ(z_n). Each ``Output`` names ℓ by ``kind``; the Hessian of ℓ in
z factors as S Sᵀ (`gauss_newton`), and does not depend on the targets:

| kind              | ℓ(z)                               | ∂²ℓ/∂z²          | S                    |
|-------------------|------------------------------------|------------------|----------------------|
| ``cross_entropy`` | −Σ_c y_c log p_c, Σ_c y_c = 1      | diag(p) − p pᵀ   | diag(√p) − p √pᵀ     |
| ``bce``           | −Σ_c [y log q + (1−y) log(1−q)]_c  | diag(q (1−q))    | diag √(q (1−q))      |
| ``mse``           | Σ_c (z_c − y_c)²                   | 2 I              | √2 I                 |

Label smoothing and soft targets are cross-entropy. So is KL(p ‖ softmax(z)) as a function of z alone; with p
trained too, as in TRADES, see ``objectives.pairing.kl_output``.

    H v = ∂⟨g, v⟩/∂W,   v constant: one backward through the graph of g, 3 to 4 plain ones in time         (1)
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from wcitrain.params import precise

Kind = Literal["cross_entropy", "bce", "mse"]


class Output(NamedTuple):
    """One term of a mean loss as a function of network outputs."""

    logits: Tensor  # [N, C] with their graph
    kind: Kind = "cross_entropy"  # as in the module's table
    weight: float | Tensor = 1.0  # w, one number or [N]


class Loss(NamedTuple):
    """A differentiable total, its named parts, and the outputs it was computed from."""

    total: Tensor
    parts: dict[str, Tensor] = {}  # noqa: RUF012  (for the log, detached; a default never written to)
    outputs: tuple[Output, ...] = ()  # empty: the loss does not say, and only estimators of the total apply


LossFn = Callable[[], Tensor | Loss]
Outputs = Tensor | Output | Loss | Sequence[Output]
# PyTorch's second derivative of the fused weight norm is wrong without a word, as the tests measure.
_WRONG = "WeightNormInterfaceBackward0"


def cross_entropy(logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Loss:
    """Return the mean cross-entropy of ``logits`` [N, C] with classes ``y`` [N] or soft targets [N, C].

    ValueError for soft targets that do not sum to one: the loss would have another Hessian.
    """
    logits = precise(logits)
    y = y.to(logits.dtype) if y.is_floating_point() else y
    if y.ndim == logits.ndim and bool(((y.sum(-1) - 1).abs() > 1e-3).any()):
        got = f"got soft targets with sums from {float(y.sum(-1).min()):.3g} to {float(y.sum(-1).max()):.3g}"
        raise ValueError(f"cross_entropy: {got}; expected 1 in every row. Normalise them.")
    total = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    return Loss(total, {"cross_entropy": total.detach()}, (Output(logits),))


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Loss:
    """Return the mean over all N·C elements of the binary cross-entropy with targets in [0, 1]."""
    logits = precise(logits)
    total = F.binary_cross_entropy_with_logits(logits, targets.to(logits))
    return Loss(total, {"bce": total.detach()}, (Output(logits, "bce", 1 / logits.shape[1]),))


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Loss:
    """Return the mean over all N·C elements of (z − y)²."""
    total = F.mse_loss(outputs, targets)
    return Loss(total, {"mse": total.detach()}, (Output(outputs, "mse", 1 / outputs.shape[1]),))


def as_loss(value: Tensor | Loss) -> Loss:
    """Return ``value`` as a ``Loss``; a bare tensor has no outputs."""
    return value if isinstance(value, Loss) else Loss(value)


def outputs_of(value: Outputs, where: str) -> tuple[Output, ...]:
    """Return the outputs in ``value``, each [N, C]; bare logits mean cross-entropy.

    ValueError, which begins with ``where``, for none and for outputs of another shape or kind.
    """
    if isinstance(value, Tensor):
        value = Output(value)
    outputs = (value,) if isinstance(value, Output) else tuple(getattr(value, "outputs", value))
    if not outputs:
        got = "got a loss that does not say which outputs it was computed from; expected one with `outputs`"
        raise ValueError(f"{where}: {got}. Return wcitrain.cross_entropy(model(x_adv), y).")
    for logits, kind, _ in outputs:
        if logits.ndim != 2 or kind not in get_args(Kind):
            got = f"got an output {tuple(logits.shape)} of kind {kind!r}"
            raise ValueError(f"{where}: {got}; expected [N, C] and one of {', '.join(get_args(Kind))}.")
    return outputs


def gradients_with_graph(loss: Tensor | Loss, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return g with its graph, for many products; None where the loss does not depend on a tensor."""
    total = as_loss(loss).total
    refuse_wrong_derivatives(total)
    return list(torch.autograd.grad(total, tensors, create_graph=True, allow_unused=True))


def refuse_wrong_derivatives(total: Tensor) -> None:
    """Raise ValueError if PyTorch gets the second derivative of an operation in the graph wrong."""
    nodes = [total.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == _WRONG:
            rule = "no fused weight norm, whose second derivative is silently wrong in PyTorch. Remove it."
            raise ValueError(f"second derivatives: got {_WRONG} in the graph of the loss; expected {rule}")
        nodes.extend(parent for parent, _ in node.next_functions)


def hvp(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return H v by (1) from ``gradients_with_graph``; zeros where nothing depends on a tensor."""
    pairs = zip(gradients, vectors, strict=True)
    used = [(g, v) for g, v in pairs if g is not None and g.requires_grad]  # else constant: zero rows
    if not used:
        return [torch.zeros_like(t) for t in tensors]
    g, v = zip(*used, strict=True)
    products = torch.autograd.grad(g, tensors, v, retain_graph=True, materialize_grads=True)
    return [Hv.detach() for Hv in products]  # torch 2.6 gives zeros that ask for a graph


def signs(tensors: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """Return random signs −1 and +1 shaped like ``tensors``; the generator may be on any device."""
    target = tensors[0].device
    device = target if generator is None else generator.device
    sizes = [t.numel() for t in tensors]
    # Eight signs a random byte: several times cheaper than one random number a sign.
    shape = (-(-sum(sizes) // 8), 1)
    random_bytes = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    bits = (random_bytes >> torch.arange(8, device=device, dtype=torch.uint8)) & 1
    flat = bits.flatten()[: sum(sizes)].to(torch.int8).mul_(2).sub_(1).to(target)
    return [v.view(t.shape).to(t.dtype) for v, t in zip(flat.split(sizes), tensors, strict=True)]
