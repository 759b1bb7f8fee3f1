"""Adversarial training with one attack step (FGSM), what keeps it from collapsing, and what notices.

It can lose all robustness to multi-step attacks within an epoch: catastrophic overfitting.
Legend: B batch, ℓ cross-entropy, η a random perturbation, g gradients with respect to the input.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks import Attack, L1Share, LabelLossName, LossName, Start, Threat, ThreatModel
from wcitrain.attacks.threat import uniform_in_ball
from wcitrain.curvature.loss import Loss, cross_entropy
from wcitrain.method import NonNegative, method, setting
from wcitrain.objectives.objective import Attacked, AttackMode, LabelSmoothing
from wcitrain.objectives.terms import TINY, dot, input_gradient, norm, with_term
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


@method
class FGSMRS(SingleStepAttacked):
    """Adversarial training with FGSM from a random start.

        x_adv = Box[ x + Project( η + 1.25 eps · sign ∇ℓ(x + η) ) ],   η uniform in the ball               (1)

    Their code attacks in train mode and lets that update running statistics. Gauss–Newton: exact.
    """

    step_factor: StepFactor = 1.25
    label = "FGSM-RS"
    source = "Wong, Rice & Kolter, arXiv 2001.03994, algorithm 3"
    start = "uniform"


@method
class GradAlign(SingleStepAttacked):
    """FGSM with gradient alignment, which keeps single-step training from collapsing.

        CE(f(x_adv), y) + weight (1/B) Σ_n ( 1 − cos( g(x_n), g(x_n + η_n) ) ),   g(x) = ∇_x ℓ(x),         (2)

    x_adv the FGSM image (no random start, step eps), η uniform in the ball, drawn from torch's global
    generator in ``loss``. As in the authors' code, the gradient at x is detached and x + η is not clipped to
    the box. Their code takes the mean over examples with nonzero gradients (here the others count as
    aligned), and reuses the attack's gradient as g(x). Gauss–Newton: exact for the cross-entropy alone.
    """

    attack_loss: LabelLossName = "ce"  # the KL is flat at the image
    weight: NonNegative = setting(0.2, "λ, 0.2 at 8/255; larger eps need more.")
    label = "GradAlign λ={weight:g}"
    source = "Andriushchenko & Flammarion, arXiv 2007.02617, eq. 4"
    cost = "3 forward passes (at x_adv, x, x + η) and 4 backward (the last one twice), and the attack's"
    needs_double_backward = True
    passes = (3, 4)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (2) with ``x_adv`` held fixed."""
        classes = cross_entropy(model(x_adv), y, label_smoothing=self.label_smoothing)
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

    From Wong et al. 2020, arXiv 2001.03994, sec. 5.1, whose code compares with the check before, so a fall in
    two halves escapes it. ``drop`` is a share of the images, in (0, 1); ``num_steps`` >= 2, as one step is
    what the training resists. ``best`` and ``last`` are robust accuracies in [0, 1], None before the first
    check.
    """

    def __init__(self, drop: float = 0.2, num_steps: int = 5) -> None:
        if not 0 < drop < 1 or num_steps < 2:
            got = f"got {drop=}, {num_steps=}; expected (0, 1) and >= 2"
            raise ValueError(f"CatastrophicOverfittingGuard: {got}.")
        self.drop, self.num_steps = drop, num_steps
        self.best: float | None = None
        self.last: float | None = None

    def check(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: Generator | None = None
    ) -> bool:
        """Measure the robust accuracy on a few hundred training images; return whether it has collapsed, (3).

        In eval mode and float32; the model and the random state are left alone. Use the same images, threat
        (the final eps) and seed every time, on every process.
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
