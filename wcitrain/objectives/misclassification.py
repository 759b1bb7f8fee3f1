"""MART: adversarial training that asks more of the examples that the model already gets wrong.

Legend: B batch, C classes, y class, p = softmax(f(x)), q = softmax(f(x_adv)).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from wcitrain.attacks import Start
from wcitrain.attacks.losses import precise
from wcitrain.curvature.loss import Loss, Output
from wcitrain.objectives.objective import PGDAttacked
from wcitrain.objectives.terms import class_loss, kl_divergence, kl_output, soft_targets


@dataclass(frozen=True)
class MART(PGDAttacked):
    """Misclassification-aware adversarial training (Wang et al., ICLR 2020, eq. 8 to 11).

        (1/B) Σ_n  BCE(q_n, y_n)  +  beta (1/B) Σ_n KL(p_n ‖ q_n) (1 − p_n,y)                                          (1)
        BCE(q, y) = −log q_y − log( ceiling − max_{k≠y} q_k )                                                          (2)

    As in the authors' code: gradients flow through everything, the weight (1 − p_y) included; the attack maximises the
    cross-entropy in eval mode and starts from x + 0.001 N(0, I); two forward passes, clean first; and ``ceiling`` is 1.0001
    where the paper has 1, which bounds the margin term by 9.2. Their code also adds 1e-12 inside the logarithms and writes
    1.0000001 − p_y; here the KL comes from logits, so nothing has to be added (the difference is below float32 rounding
    unless some q_c < 1e-5). The authors' function has beta 6 by default and is called with 5, the paper's.

    Soft targets (mixup): (1) is averaged over classes drawn from y. Label smoothing applies to −log q_y alone.

    Cost of the loss: (2, 2) passes. Gauss–Newton covers −log q_y exactly, and the KL at a given weight (1 − p_y) by
    ``terms.kl_output``, an approximation. Left out, as their Hessians in the logits are indefinite: the margin term, and what the
    weight does through f(x).

    Args:
        beta: Weight of the KL, the paper's λ; >= 0.
        ceiling: The constant in (2), >= 1.

    The other arguments: see ``PGDAttacked``.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> sorted(MART(num_steps=3)(model, x, y).parts)
        ['bce', 'kl']
    """

    beta: float = 5.0
    ceiling: float = 1.0001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.ceiling < float("inf"):
            raise ValueError(
                f"MART.ceiling: got {self.ceiling!r}; expected a number >= 1. The authors' code has 1.0001."
            )

    def _start(self) -> Start:
        return "gaussian" if self.random_start else "none"

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (1) with the images held fixed."""
        logits, logits_adv = precise(model(x)), precise(model(x_adv))
        targets = soft_targets(y, logits)
        first, second = (largest.unsqueeze(1) for largest in logits_adv.softmax(1).topk(2, dim=1).values.unbind(1))
        is_first = soft_targets(logits_adv.argmax(1), logits_adv)
        largest_other = is_first * second + (1 - is_first) * first  # [B, C]: max_{k≠c} q_k for every class c
        margin = -((self.ceiling - largest_other).log() * targets).sum(1).mean()
        bce = class_loss(logits_adv, y, self.label_smoothing).total + margin
        doubt = 1 - (logits.softmax(1) * targets).sum(1)  # 1 − p_y
        kl = (kl_divergence(logits, logits_adv) * doubt).mean()
        return Loss(
            bce + self.beta * kl,
            {"bce": bce.detach(), "kl": kl.detach()},
            (Output(logits_adv), kl_output(logits, logits_adv, self.beta * doubt.detach().clamp_min(0))),
        )

    def loss_passes(self) -> tuple[int, int]:
        """Forward at x and at x_adv, and backward through both."""
        return 2, 2
