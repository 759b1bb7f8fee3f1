"""What an attack maximises: losses by name, one number an example.

Legend: B batch, C classes, z logits [B, C], p = softmax(z), y class indices [B] or soft targets [B, C] that
sum to one (mixup). Every loss is computed in float32 at least and rises as the model gets worse:

| name       | loss                                                          | source                      |
|------------|---------------------------------------------------------------|-----------------------------|
| ``ce``     | −Σ_c y_c log p_c                                          (1) | Madry et al. 2018           |
| ``margin`` | max_{k≠y} z_k − z_y                                       (2) | Carlini & Wagner 2017       |
| ``dlr``    | (max_{k≠y} z_k − z_y) / (z_π1 − z_π3), z_π1 ≥ z_π2 ≥ z_π3 (3) | Croce & Hein 2020, eq. 6    |
| ``kl``     | KL(p_reference ‖ p), p_reference of the clean images      (4) | TRADES: Zhang et al. 2019   |

arXiv: Madry 1706.06083, Carlini & Wagner 1608.04644, Croce & Hein 2003.01690, Zhang 1901.08573.

(2) and (3) are positive where the example is misclassified, and take the class of the largest soft target.
(2) is not clipped at a confidence, as an attack needs gradients beyond success. (3) does not change when the
logits are shifted or scaled, so it finds gradients where (1) has none because of overconfident logits. It is
constant 1, without a gradient, once z_y is z_π3: with three classes that is every example whose true class is
last, which stays where it is.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

LossName = Annotated[
    Literal["ce", "margin", "dlr", "kl"],
    Field(description="What the attack maximises: cross-entropy, margin, DLR, or KL from the clean output."),
]
LabelLossName = Annotated[
    Literal["ce", "margin", "dlr"],
    Field(description="What the attack maximises, a loss of the labels: cross-entropy, margin or DLR."),
]
AttackLoss = Callable[..., Tensor]  # (logits [B, C], y, reference_logits [B, C] or None) -> losses [B]


def ce(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the cross-entropy (1)."""
    logits = precise(logits)
    return F.cross_entropy(logits, y.to(logits.dtype) if y.is_floating_point() else y, reduction="none")


def margin(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the largest wrong logit minus the true one (2); needs two classes."""
    logits = precise(logits)
    _check_classes("margin", logits, 2)
    true = (y.argmax(1) if y.ndim == 2 else y).unsqueeze(1)
    return logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true).squeeze(1)


def dlr(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the difference of logits ratio (3); needs three classes; with three, z_π3 is the smallest."""
    logits = precise(logits)
    _check_classes("dlr", logits, 3)
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2] + 1e-12  # the floor of the authors' code, for constant logits
    return margin(logits, y) / spread


def kl(logits: Tensor, y: Tensor, reference_logits: Tensor | None = None) -> Tensor:
    """Return the divergence from the clean prediction (4), which is held fixed; flat at the clean image."""
    if reference_logits is None:
        raise ValueError("kl: got no reference_logits; expected those of the clean images. Give them.")
    return kl_divergence(precise(reference_logits.detach()), precise(logits))


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ_c p_c (log p_c − log q_c) for every example [B]; differentiable in both logits."""
    log_p, log_q = logits.log_softmax(1), other.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


ATTACK_LOSSES: dict[LossName, AttackLoss] = {"ce": ce, "margin": margin, "dlr": dlr, "kl": kl}


def attack_loss(name: str) -> AttackLoss:
    """Return the attack loss called ``name``.

    Raises:
        ValueError: No such loss; the message lists the names.

    Example:
        >>> logits, y = torch.tensor([[4.0, 1.0, 2.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 0])
        >>> attack_loss("margin")(logits, y)
        tensor([-2.,  3.])
    """
    if name not in ATTACK_LOSSES:
        raise ValueError(f"attack_loss: got {name!r}; expected one of {', '.join(ATTACK_LOSSES)}.")
    return ATTACK_LOSSES[name]


def precise(x: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def _check_classes(where: str, logits: Tensor, least: int) -> None:
    """Refuse logits of too few classes."""
    if logits.shape[1] < least:
        raise ValueError(f"{where}: got {logits.shape[1]} classes; expected at least {least}. Use loss 'ce'.")
