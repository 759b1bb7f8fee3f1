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

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from wcitrain.params import logits_of, precise
from wcitrain.preserve import naming_reentrant, perturbed

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
HIDING = "None of the inputs have requires_grad=True"  # torch's warning about such checkpoints


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
    outputs = logits_of(outputs)
    total = F.mse_loss(outputs, targets)
    return Loss(total, {"mse": total.detach()}, (Output(outputs, "mse", 1 / outputs.shape[1]),))


def as_loss(value: Tensor | Loss) -> Loss:
    """Return ``value`` as a ``Loss``; a bare tensor has no outputs."""
    return value if isinstance(value, Loss) else Loss(value)


def outputs_of(value: Outputs, where: str) -> tuple[Output, ...]:
    """Return the outputs in ``value``, each [N, C]; bare logits mean cross-entropy.

    ValueError, which begins with ``where``, for none and for outputs of another shape or kind.
    """
    is_several = isinstance(value, tuple | list) and all(isinstance(one, Output) for one in value)
    if not is_several and not isinstance(value, Output | Loss):
        value = Output(logits_of(value))
    outputs = (value,) if isinstance(value, Output) else tuple(getattr(value, "outputs", value))
    if not outputs:
        got = "got a loss that does not say which outputs it was computed from; expected one with `outputs`"
        raise ValueError(f"{where}: {got}. Return wcitrain.cross_entropy(model(x_adv), y).")
    for logits, kind, _ in outputs:
        if logits_of(logits).ndim != 2 or kind not in get_args(Kind):
            got = f"got an output {tuple(logits.shape)} of kind {kind!r}"
            raise ValueError(f"{where}: {got}; expected [N, C] and one of {', '.join(get_args(Kind))}.")
    return outputs


def gradients_with_graph(loss: Tensor | Loss, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return g with its graph, for many products; None where the loss does not depend on a tensor."""
    total = as_loss(loss).total
    refuse_wrong_derivatives(total)
    with naming_reentrant():
        return list(torch.autograd.grad(total, tensors, create_graph=True, allow_unused=True))


def gradients_of(
    total: Tensor, tensors: Sequence[Tensor], loss_fn: Callable[[], Tensor]
) -> list[Tensor | None]:
    """Return the gradients of ``total``, None where the loss does not depend on a tensor: `refuse_hidden`."""
    with naming_reentrant():
        found = torch.autograd.grad(total, tensors, allow_unused=True) if total.requires_grad else ()
    gradients: list[Tensor | None] = [*found] if found else [None] * len(tensors)
    refuse_hidden(loss_fn, tensors, gradients)
    return gradients


def refuse_hidden(
    loss_fn: Callable[[], Tensor], tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> None:
    """Raise ValueError where the loss depends on a tensor in which it has no gradient.

    "None" is not taken for "unused": the tensors without a gradient are moved, by twice their own size, and
    where the loss moves too, its gradient was hidden. Activation checkpoints of the reentrant kind whose
    inputs ask for no gradient do that, ``detach`` and ``no_grad`` too. Costs nothing where there are all
    gradients, else 3 evaluations of ``loss_fn``.
    """
    silent = [t for t, g in zip(tensors, gradients, strict=True) if g is None]
    if not silent:
        return
    with warnings.catch_warnings(record=True) as seen, torch.enable_grad():
        warnings.simplefilter("always")
        first = float(loss_fn().detach())
    is_reentrant = any(HIDING in str(warning.message) for warning in seen)
    with torch.no_grad():
        again = float(loss_fn())
        moves = [torch.where(t == 0, t.abs().mean().clamp_min(0.1), -2 * t) for t in silent]
        with perturbed(silent, moves) as move:
            move(+1)
            moved = float(loss_fn())
    if abs(moved - again) <= 10 * abs(again - first) + 1e-6 * abs(first):
        return
    advice = "Give its activation checkpoints use_reentrant=False" if is_reentrant else "Look for detach"
    got = f"got a loss that depends on some of {len(silent)} layers (of {len(tensors)}) without a gradient"
    raise ValueError(f"layers: {got}; expected one in each that it uses. {advice}.")


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


def dense(gradient: Tensor) -> Tensor:
    """Return the gradient; ValueError for a sparse one."""
    if gradient.layout != torch.strided:
        rule = "dense ones in the layers. Use sparse=False, or choose layers without it"
        raise ValueError(f"layers: got a gradient of layout {gradient.layout}; expected {rule}.")
    return gradient


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
