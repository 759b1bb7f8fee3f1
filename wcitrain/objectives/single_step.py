"""Adversarial training with one attack step (FGSM), and the regulariser that keeps it from collapsing.

Such training is cheap, but can lose all robustness to multi-step attacks within an epoch while robustness to its own attack
rises: catastrophic overfitting. ``overfitting.CatastrophicOverfittingGuard`` notices it.

Legend: B batch, ℓ cross-entropy, η a random perturbation, g gradients with respect to the input.
"""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from wcitrain.attacks import Attack, Start, ThreatModel, uniform_in_ball
from wcitrain.curvature.loss import Loss
from wcitrain.objectives.objective import Attacked, AttackMode, check_settings
from wcitrain.objectives.terms import TINY, class_loss, dot, input_gradient, norm
from wcitrain.preserve import random_state, set_random_state


@dataclass(frozen=True)
class SingleStepAttacked(Attacked):
    """The settings of an objective whose adversary takes one step of length ``step_factor`` · eps.

    Args:
        threat: Norm and radius.
        step_factor: Length of the step in units of eps; >= 0.
        attack_bn, label_smoothing, attack_loss, l1_share: See ``PGDAttacked``.
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    step_factor: float = 1.0
    attack_bn: AttackMode = "eval"
    label_smoothing: float = 0.0
    attack_loss: str = "ce"
    l1_share: float = 0.05

    is_single_step = True

    def __post_init__(self) -> None:
        check_settings(self)
        _ = self.attack  # refuses what it cannot run

    def _start(self) -> Start:
        """Return where the attack starts."""
        return "none"

    @property
    def attack(self) -> Attack:
        """The adversary with its settings."""
        return Attack(
            self.threat,
            num_steps=1,
            step_size=self.step_factor * self.threat.eps,
            start=self._start(),
            loss=self.attack_loss,
            l1_share=self.l1_share,
        )

    def scaled(self, factor: float) -> Self:
        """Return the objective with radius, and with it the step, times ``factor``; 1 returns the objective itself."""
        return self if factor == 1 else replace(self, threat=self.threat.scaled(factor))

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy at ``x_adv``, held fixed."""
        return class_loss(model(x_adv), y, self.label_smoothing)


@dataclass(frozen=True)
class FGSMRS(SingleStepAttacked):
    """FGSM from a random start (Wong, Rice & Kolter 2020, arXiv 2001.03994, algorithm 3): "fast is better than free".

        x_adv = Box[ x + Project( η + 1.25 eps · sign ∇ℓ(x + η) ) ],   η uniform in the ball                          (1)

    Their code runs the attack in train mode and lets it update running statistics; here the mode is ``attack_bn``, and the
    statistics are left alone. Cost of the loss: (1, 1) passes. Gauss–Newton: exact. Arguments: see ``SingleStepAttacked``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> FGSMRS().attack_passes(), FGSMRS()(model, x, y).total.shape
        ((1, 1), torch.Size([]))
    """

    step_factor: float = 1.25

    def _start(self) -> Start:
        return "uniform"


@dataclass(frozen=True)
class GradAlign(SingleStepAttacked):
    """FGSM with gradient alignment (Andriushchenko & Flammarion 2020, arXiv 2007.02617, eq. 4).

        CE(f(x_adv), y) + weight (1/B) Σ_n ( 1 − cos( g(x_n), g(x_n + η_n) ) ),   g(x) = ∇_x ℓ(x),                       (2)

    x_adv the FGSM image (no random start, step eps), η uniform in the ball, drawn from torch's global generator in ``loss``. As
    in the authors' code, the gradient at x is detached and x + η is not clipped to the box. What differs: their code takes the
    mean over examples with nonzero gradients (here the others count as aligned), reuses the attack's gradient as g(x) (here
    ``loss`` is a function of the weights, so it is computed again), and lets the extra passes update running statistics
    (here they do not). Both gradients see the same dropout masks.

    Cost of the loss: (3, 4) passes; the gradient at x + η is differentiated and counts twice. In float32, and twice
    differentiated operations only: no ``torch.compile``. Gauss–Newton: exact for the cross-entropy alone.

    Args:
        weight: Of the alignment, the paper's λ: 0.2 for CIFAR-10 at eps = 8/255, more for larger eps; >= 0.

    The other arguments: see ``SingleStepAttacked``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> sorted(GradAlign()(model, x, y).parts)
        ['alignment', 'cross_entropy']
    """

    weight: float = 0.2

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (2) with ``x_adv`` held fixed."""
        classes = class_loss(model(x_adv), y, self.label_smoothing)
        moved = x + uniform_in_ball(x, self.threat)
        states = random_state(x.device)
        at_x = input_gradient(model, x, y, create_graph=False)
        set_random_state(states, x.device)
        at_moved = input_gradient(model, moved, y, create_graph=True)
        cosine = dot(at_x, at_moved) / (norm(at_x) * norm(at_moved))
        has_gradient = (dot(at_x, at_x) > TINY) & (dot(at_moved, at_moved) > TINY)
        alignment = torch.where(has_gradient, 1 - cosine, 0.0).mean()
        return Loss(
            classes.total + self.weight * alignment,
            {**classes.parts, "alignment": alignment.detach()},
            classes.outputs,
        )

    def loss_passes(self) -> tuple[int, int]:
        """Forward at x_adv, x and x + η; backward at each, twice through the last."""
        return 3, 4
