"""A loss that knows how it depends on the network's outputs, as the Gauss–Newton estimators need it.

Legend: N examples, C outputs, z network outputs ("logits") [N, C], p = softmax(z), q = sigmoid(z).

A loss is the mean over examples of terms w_n ℓ(z_n). Each ``Output`` names ℓ by ``kind``; the Hessian of ℓ in
z factors as S Sᵀ (`gauss_newton`), and does not depend on the targets:

| kind              | ℓ(z)                               | ∂²ℓ/∂z²          | S                    |
|-------------------|------------------------------------|------------------|----------------------|
| ``cross_entropy`` | −Σ_c y_c log p_c, Σ_c y_c = 1      | diag(p) − p pᵀ   | diag(√p) − p √pᵀ     |
| ``bce``           | −Σ_c [y log q + (1−y) log(1−q)]_c  | diag(q (1−q))    | diag √(q (1−q))      |
| ``mse``           | Σ_c (z_c − y_c)²                   | 2 I              | √2 I                 |

Label smoothing and soft targets are cross-entropy. So is KL(p ‖ softmax(z)) as a function of z alone; with p
trained too, as in TRADES, see ``objectives.pairing.kl_output``.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

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
KINDS = get_args(Kind)


def cross_entropy(logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Loss:
    """Return the mean cross-entropy of ``logits`` [N, C] with classes ``y`` [N] or soft targets [N, C].

    ValueError for soft targets that do not sum to one: the loss would have another Hessian.
    """
    logits = precise(logits)
    y = y.to(logits.dtype) if y.is_floating_point() else y
    if y.ndim == logits.ndim and bool(((y.sum(-1) - 1).abs() > 1e-3).any()):
        low, high = float(y.sum(-1).min()), float(y.sum(-1).max())
        raise ValueError(
            f"cross_entropy: got soft targets with sums from {low:.3g} to {high:.3g}; expected 1 in every "
            "row. Normalise them, or use binary_cross_entropy for several labels an image."
        )
    total = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    return Loss(total, {"cross_entropy": total.detach()}, (Output(logits),))


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Loss:
    """Return the mean over all N·C elements of the binary cross-entropy with targets in [0, 1]."""
    _check_two_dimensional("binary_cross_entropy", logits)
    logits = precise(logits)
    total = F.binary_cross_entropy_with_logits(logits, targets.to(logits))
    return Loss(total, {"bce": total.detach()}, (Output(logits, "bce", 1 / logits.shape[1]),))


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Loss:
    """Return the mean over all N·C elements of (z − y)²."""
    _check_two_dimensional("mean_squared_error", outputs)
    total = F.mse_loss(outputs, targets)
    return Loss(total, {"mse": total.detach()}, (Output(outputs, "mse", 1 / outputs.shape[1]),))


def _check_two_dimensional(where: str, outputs: Tensor) -> None:
    if outputs.ndim != 2:
        got = tuple(outputs.shape)
        raise ValueError(f"{where}: got outputs of shape {got}; expected [N, C]. Use unsqueeze(1) for C = 1.")


def as_loss(value: Tensor | Loss) -> Loss:
    """Return ``value`` as a ``Loss``; a bare tensor has no outputs."""
    return value if isinstance(value, Loss) else Loss(value)


def outputs_of(value: Outputs, where: str) -> tuple[Output, ...]:
    """Return the outputs in ``value``, at least one, each [N, C]; bare logits mean cross-entropy."""
    if isinstance(value, Tensor):
        value = Output(value)
    outputs = (value,) if isinstance(value, Output) else tuple(getattr(value, "outputs", value))
    if not outputs:
        raise ValueError(
            f"{where}: got a loss that does not say which outputs it was computed from; expected one with "
            "`outputs`. Return wcitrain.cross_entropy(model(x_adv), y) or Loss(total, {}, (Output(logits),))."
        )
    for output in outputs:
        if output.logits.ndim != 2:
            raise ValueError(f"{where}: got outputs of shape {tuple(output.logits.shape)}; expected [N, C].")
        if output.kind not in KINDS:
            raise ValueError(f"Output.kind: got {output.kind!r}; expected {', '.join(KINDS)}. Choose one.")
    return outputs
