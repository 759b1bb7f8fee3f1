"""What attacks maximise: one loss an example [B], of logits and labels.

Legend: B batch, C classes, z logits [B, C], p = softmax(z), y class indices [B] or soft targets [B, C] that
sum to one (mixup). Losses are in float32 at least; the margins are positive where the model is wrong, and
take the class of the largest soft target.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from wcitrain.params import precise

LOSS = "What the attack maximises: cross-entropy, margin, DLR"
LossName = Annotated[
    Literal["ce", "margin", "dlr", "kl"], Field(description=f"{LOSS}, or KL from the clean output.")
]
LabelLossName = Annotated[Literal["ce", "margin", "dlr"], Field(description=f"{LOSS}.")]


def ce(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the cross-entropy, −Σ_c y_c log p_c."""
    logits = precise(logits)
    return F.cross_entropy(logits, y.to(logits.dtype) if y.is_floating_point() else y, reduction="none")


def margin(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the largest wrong logit minus the true one, max_{k≠y} z_k − z_y, not clipped at a confidence."""
    logits = precise(logits)
    true = (y.argmax(1) if y.ndim == 2 else y).unsqueeze(1)
    return logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true).squeeze(1)


def dlr(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the difference of logits ratio, (max_{k≠y} z_k − z_y) / (z_π1 − z_π3), z_π1 ≥ z_π2 ≥ z_π3.

    Shifts and scales of the logits leave it, so it has gradients where an overconfident cross-entropy has
    none. Once z_y is z_π3 it is 1, without a gradient: with three classes such examples stay where they are.
    ValueError for fewer than three classes.
    """
    logits = precise(logits)
    if logits.shape[1] < 3:
        raise ValueError(f"dlr: got {logits.shape[1]} classes; expected at least 3. Use the loss ce.")
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2] + 1e-12  # the floor of the authors' code, for constant logits
    return margin(logits, y) / spread


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return (z_t − z_y) / (z_π1 − (z_π3 + z_π4) / 2) for the class ``target`` [B] of each example.

    Croce & Hein, arXiv 2003.01690, eq. 7. ValueError for fewer than four classes.
    """
    logits = precise(logits)
    if logits.shape[1] < 4:
        raise ValueError(
            f"targeted_dlr: got {logits.shape[1]} classes; expected at least 4. Use the loss ce."
        )
    top = logits.topk(4, dim=1).values
    true, aim = (logits.gather(1, one.unsqueeze(1)).squeeze(1) for one in (y, target))
    return (aim - true) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def kl(logits: Tensor, y: Tensor, reference_logits: Tensor) -> Tensor:
    """Return the divergence KL(p_clean ‖ p) from the clean prediction, which is fixed; flat at the image."""
    return kl_divergence(precise(reference_logits).detach(), precise(logits))


# (logits [B, C], y, reference_logits [B, C] or None) -> losses [B]
ATTACK_LOSSES: dict[str, Callable[..., Tensor]] = {"ce": ce, "margin": margin, "dlr": dlr, "kl": kl}
for _name, _source in {
    "ce": "Madry et al., arXiv 1706.06083",
    "margin": "Carlini & Wagner, arXiv 1608.04644",
    "dlr": "Croce & Hein, arXiv 2003.01690, eq. 6",
    "kl": "TRADES: Zhang et al., arXiv 1901.08573",
}.items():
    _cost = "1 forward pass at the clean images" if _name == "kl" else "no pass of its own"
    vars(ATTACK_LOSSES[_name]).update(source=_source, cost=_cost)  # as every entry of a table of choices has


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ_c p_c (log p_c − log q_c) for every example [B]; differentiable in both logits."""
    log_p, log_q = logits.log_softmax(1), other.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
