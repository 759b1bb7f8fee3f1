"""Cross-entropy alone: on clean images, or at the images of a PGD adversary."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from wcitrain.curvature.loss import Loss
from wcitrain.objectives.objective import OneStepPerBatch, PGDAttacked, check_settings
from wcitrain.objectives.terms import class_loss


@dataclass(frozen=True)
class Standard(OneStepPerBatch):
    """Cross-entropy on clean images: no adversary.

    Args:
        label_smoothing: Mass moved from the true class to the uniform distribution, in [0, 1].

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> loss = Standard()(model, x, y)
        >>> bool(loss.total == nn.functional.cross_entropy(model(x), y))
        True
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x`` itself."""
        return x

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy at ``x``."""
        return class_loss(model(x), y, self.label_smoothing)

    def attack_passes(self) -> tuple[int, int]:
        """No attack, no passes."""
        return 0, 0

    def scaled(self, factor: float) -> Self:
        """Return the objective itself: there is no radius."""
        return self


@dataclass(frozen=True)
class PGDAT(PGDAttacked):
    """Adversarial training (Madry et al., arXiv 1706.06083): cross-entropy at the PGD adversary's images.

        min_w  (1/B) Σ_n  max_{‖δ_n‖ ≤ eps}  CE( f_w(x_n + δ_n), y_n )                                           (1)

    ``attack_loss`` lets the adversary maximise something else than what is minimised. Cost of the loss: (1, 1) passes.
    Gauss–Newton: exact, see ``curvature.loss``. Arguments: see ``PGDAttacked``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> objective = PGDAT(num_steps=3)
        >>> x_adv = objective.perturb(model, x, y)
        >>> bool(objective.loss(model, x, x_adv, y).total > Standard()(model, x, y).total), objective.attack_passes()
        (True, (3, 3))
    """

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy at ``x_adv``, held fixed (Danskin)."""
        return class_loss(model(x_adv), y, self.label_smoothing)
