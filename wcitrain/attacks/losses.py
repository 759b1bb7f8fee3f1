"""What an attack maximises: losses by name, one number an example.

Legend: B batch, C classes, z logits [B, C], p = softmax(z), y class indices [B] or soft targets [B, C] that
sum to one (mixup). Every loss is computed in float32 at least and rises as the model gets worse. ``margin``
and ``dlr`` are positive where the example is misclassified, and take the class of the largest soft target.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from wcitrain.params import precise

LossName = Annotated[
    Literal["ce", "margin", "dlr", "kl"],
    Field(description="What the attack maximises: cross-entropy, margin, DLR, or KL from the clean output."),
]
LabelLossName = Annotated[
    Literal["ce", "margin", "dlr"],
    Field(description="What the attack maximises, a loss of the labels: cross-entropy, margin or DLR."),
]
AttackLoss = Callable[..., Tensor]  # (logits [B, C], y, reference_logits [B, C] or None) -> losses [B]


def _from(source: str, cost: str = "no pass of its own") -> Callable[[AttackLoss], AttackLoss]:
    """Give a loss the attributes ``source`` and ``cost``, which every entry of a table of choices has."""

    def with_both(loss: AttackLoss) -> AttackLoss:
        vars(loss).update(source=source, cost=cost)
        return loss

    return with_both


@_from("Madry et al., arXiv 1706.06083")
def ce(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the cross-entropy, −Σ_c y_c log p_c."""
    logits = precise(logits)
    return F.cross_entropy(logits, y.to(logits.dtype) if y.is_floating_point() else y, reduction="none")


@_from("Carlini & Wagner, arXiv 1608.04644")
def margin(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the largest wrong logit minus the true one, max_{k≠y} z_k − z_y, not clipped at a confidence."""
    logits = precise(logits)
    _check_classes("margin", logits, 2)
    true = (y.argmax(1) if y.ndim == 2 else y).unsqueeze(1)
    return logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true).squeeze(1)


@_from("Croce & Hein, arXiv 2003.01690, eq. 6")
def dlr(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the difference of logits ratio, (max_{k≠y} z_k − z_y) / (z_π1 − z_π3), z_π1 ≥ z_π2 ≥ z_π3.

    Shifts and scales of the logits leave it, so it has gradients where an overconfident cross-entropy has
    none. Once z_y is z_π3 it is 1, without a gradient: with three classes such examples stay where they are.
    """
    logits = precise(logits)
    _check_classes("dlr", logits, 3)
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2] + 1e-12  # the floor of the authors' code, for constant logits
    return margin(logits, y) / spread


@_from("TRADES: Zhang et al., arXiv 1901.08573", "1 forward pass at the clean images")
def kl(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the divergence KL(p_clean ‖ p) from the clean prediction, which is fixed; flat at the image."""
    if reference_logits is None:
        raise ValueError("kl: got no reference_logits; expected those of the clean images. Give them.")
    return kl_divergence(precise(reference_logits.detach()), precise(logits))


ATTACK_LOSSES: dict[str, AttackLoss] = {"ce": ce, "margin": margin, "dlr": dlr, "kl": kl}


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ_c p_c (log p_c − log q_c) for every example [B]; differentiable in both logits."""
    log_p, log_q = logits.log_softmax(1), other.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _check_classes(where: str, logits: Tensor, least: int) -> None:
    if logits.shape[1] < least:
        raise ValueError(f"{where}: got {logits.shape[1]} classes; expected at least {least}. Use loss 'ce'.")
