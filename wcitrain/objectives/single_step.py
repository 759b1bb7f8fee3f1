"""Adversarial training with one attack step (FGSM), what keeps it from collapsing, and what notices.

Such training is cheap, but can lose all robustness to multi-step attacks within an epoch while robustness to
its own attack rises: catastrophic overfitting. GradAlign prevents it, the guard notices it.

Legend: B batch, ℓ cross-entropy, η a random perturbation, g gradients with respect to the input.
"""

from dataclasses import replace
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks import Attack, L1Share, LabelLossName, LossName, Start, Threat, ThreatModel
from wcitrain.attacks.threat import uniform_in_ball
from wcitrain.curvature.loss import Loss
from wcitrain.method import NonNegative, method
from wcitrain.objectives.objective import Attacked, AttackMode, LabelSmoothing
from wcitrain.objectives.terms import TINY, class_loss, dot, input_gradient, norm, with_term
from wcitrain.preserve import full_precision, kept_random_state, undisturbed

StepFactor = Annotated[
    float, Field(gt=0, le=2, description="Length of the step over threat.eps; beyond 2 it leaves the ball.")
]


@method
class SingleStepAttacked(Attacked):
    """The settings of an objective whose adversary takes one step of length ``step_factor`` · eps."""

    threat: Threat = ThreatModel()
    step_factor: StepFactor = 1.0
    attack_bn: AttackMode = "eval"
    label_smoothing: LabelSmoothing = 0.0
    attack_loss: LossName = "ce"
    l1_share: L1Share = 0.05

    is_single_step = True
    start: ClassVar[Start] = "none"

    @property
    def attack(self) -> Attack:
        """The adversary with its settings."""
        step_size = self.step_factor * self.threat.eps
        return Attack(self.threat, 1, step_size, self.start, loss=self.attack_loss, l1_share=self.l1_share)

    def scaled(self, factor: float) -> Self:
        """Return the objective with radius, and with it the step, times ``factor``; 1 returns itself."""
        return self if factor == 1 else replace(self, threat=self.threat.scaled(factor))


@method
class FGSMRS(SingleStepAttacked):
    """FGSM from a random start (Wong, Rice & Kolter 2020, arXiv 2001.03994, algorithm 3).

        x_adv = Box[ x + Project( η + 1.25 eps · sign ∇ℓ(x + η) ) ],   η uniform in the ball               (1)

    Their code runs the attack in train mode and lets it update running statistics; here the mode is
    ``attack_bn``, and the statistics are left alone. Cost of the loss: (1, 1) passes. Gauss–Newton: exact.
    """

    step_factor: StepFactor = 1.25
    label: ClassVar[str] = "FGSM-RS"
    start = "uniform"


@method
class GradAlign(SingleStepAttacked):
    """FGSM with gradient alignment (Andriushchenko & Flammarion 2020, arXiv 2007.02617, eq. 4).

        CE(f(x_adv), y) + weight (1/B) Σ_n ( 1 − cos( g(x_n), g(x_n + η_n) ) ),   g(x) = ∇_x ℓ(x),         (2)

    x_adv the FGSM image (no random start, step eps), η uniform in the ball, drawn from torch's global
    generator in ``loss``. As in the authors' code, the gradient at x is detached and x + η is not clipped to
    the box. What differs: their code takes the mean over examples with nonzero gradients (here the others
    count as aligned), reuses the attack's gradient as g(x) (here ``loss`` is a function of the weights, so it
    is computed again), and lets the extra passes update running statistics (here they do not). Both gradients
    see the same dropout masks.

    Cost of the loss: (3, 4) passes: forward at x_adv, x and x + η, backward at each, twice through the last.
    No ``torch.compile``. Gauss–Newton: exact for the cross-entropy alone.
    """

    attack_loss: LabelLossName = "ce"  # the KL is flat at the image
    weight: NonNegative = Field(
        default=0.2,
        description="Weight of the misalignment, the paper's lambda: 0.2 at 8/255, more for larger eps.",
    )
    label: ClassVar[str] = "GradAlign λ={weight:g}"

    needs_double_backward = True
    passes = (3, 4)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (2) with ``x_adv`` held fixed."""
        classes = class_loss(model(x_adv), y, self.label_smoothing)
        moved = x + uniform_in_ball(x, self.threat)
        with kept_random_state(x.device):
            at_x = input_gradient(model, x, y, create_graph=False)
        at_moved = input_gradient(model, moved, y, create_graph=True)
        cosine = dot(at_x, at_moved) / (norm(at_x) * norm(at_moved))
        has_gradient = (dot(at_x, at_x) > TINY) & (dot(at_moved, at_moved) > TINY)
        alignment = torch.where(has_gradient, 1 - cosine, 0.0).mean()
        return with_term(classes, self.weight, "alignment", alignment)


class CatastrophicOverfittingGuard:
    """Watches the robust accuracy of a few training images under a short PGD attack.

        overfitting  ⇔  best robust accuracy so far − robust accuracy now  >  drop                         (3)

    From Wong et al. 2020, arXiv 2001.03994, sec. 5.1. Their code compares with the check before instead of
    the best one, so a fall in two halves escapes it; it uses one training batch, five steps of 2/255 and one
    random start. Here the step is ``ThreatModel.step_for``, for any radius and norm.

    Args:
        drop: Of the accuracy, in (0, 1).
        num_steps: Of the attack; >= 2, as one step is what the training resists.

    Attributes:
        best, last: Robust accuracies in [0, 1]; None before the first check.

    Example:
        >>> guard = CatastrophicOverfittingGuard(drop=0.2)
        >>> [guard.update(accuracy) for accuracy in (0.30, 0.42, 0.35, 0.01)]
        [False, False, False, True]
    """

    def __init__(self, drop: float = 0.2, num_steps: int = 5) -> None:
        if not 0 < drop < 1 or num_steps < 2:
            raise ValueError(
                f"CatastrophicOverfittingGuard: got {drop=}, {num_steps=}; expected (0, 1) and >= 2."
            )
        self.drop, self.num_steps = drop, num_steps
        self.best: float | None = None
        self.last: float | None = None

    def check(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: Generator | None = None
    ) -> bool:
        """Measure the robust accuracy on a few hundred training images; return whether it has collapsed, (3).

        A pure measurement, in eval mode and float32: the model and the random state are left alone. Use the
        same images ``x`` without augmentation, the same ``threat`` (the final eps, if eps is warmed up) and a
        generator with the same seed every time, on every process. Of soft targets the largest counts.
        """
        attack = Attack(threat, self.num_steps, threat.step_for(self.num_steps))
        with undisturbed(model, training=False), full_precision(model):
            x_adv = attack(model, x, y, generator)
            with torch.no_grad():
                is_right = model(x_adv).argmax(1) == (y.argmax(1) if y.ndim == 2 else y)
        return self.update(float(is_right.float().mean()))

    def update(self, robust_accuracy: float) -> bool:
        """Record a robust accuracy that was measured elsewhere and return whether it has collapsed, (3)."""
        self.last = robust_accuracy
        self.best = robust_accuracy if self.best is None else max(self.best, robust_accuracy)
        return self.best - robust_accuracy > self.drop

    def state_dict(self) -> dict[str, float | None]:
        """Return the accuracies, plain numbers."""
        return {"best": self.best, "last": self.last}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.best, self.last = state["best"], state["last"]
