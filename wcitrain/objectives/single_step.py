"""Adversarial training with one attack step (FGSM), which can lose all robustness to more steps in an epoch
(catastrophic overfitting); what keeps it from that, and what notices.

Legend: B batch, ℓ cross-entropy, η a random perturbation, δ the perturbation [B, *dims] that free training
carries along, m its replays of each batch, g gradients with respect to the input.
"""

from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks.ascent import Attack, Threat
from wcitrain.attacks.losses import LabelLossName, LossName
from wcitrain.attacks.threat import ThreatModel, project, steepest_step, uniform_in_ball
from wcitrain.curvature.loss import Loss, cross_entropy
from wcitrain.method import NonNegative, PositiveCount, Share, StepSize, method, setting
from wcitrain.objectives.input_regularizers import TINY, dot, input_gradient, norm
from wcitrain.objectives.objective import Attacked, AttackMode, LabelSmoothing, Objective, with_term
from wcitrain.preserve import differentiating, full_precision, kept_random_state, normal, undisturbed

StepFactor = Annotated[float, Field(gt=0, le=2, description="Length of the step over threat.eps, up to 2.")]


@method
class FGSMRS(Attacked):
    """Adversarial training with FGSM from a random start.

        x_adv = Box[ x + Project( η + 1.25 eps · sign ∇ℓ(x + η) ) ],   η uniform in the ball               (1)

    Their code attacks in train mode and lets that update running statistics. Gauss–Newton: exact.
    """

    threat: Threat = ThreatModel()
    step_factor: StepFactor = 1.25
    attack_bn: AttackMode = "eval"
    label_smoothing: LabelSmoothing = 0.0
    attack_loss: LossName = "ce"
    label = "FGSM-RS"
    source = "Wong, Rice & Kolter, arXiv 2001.03994, algorithm 3"
    is_single_step = True

    @property
    def attack(self) -> Attack:
        """One step of length ``step_factor`` · eps."""
        return self.attack_on(self.threat, 1, self.step_factor * self.threat.eps)


@method
class GradAlign(FGSMRS):
    """FGSM with gradient alignment, which keeps single-step training from collapsing.

        CE(f(x_adv), y) + weight (1/B) Σ_n ( 1 − cos( g(x_n), g(x_n + η_n) ) ),   g(x) = ∇_x ℓ(x),         (2)

    x_adv the FGSM image (no random start, step eps), η uniform in the ball, drawn from torch's global
    generator in ``loss``. As in the authors' code, the gradient at x is detached and x + η is not clipped to
    the box. Their code takes the mean over examples with nonzero gradients (here the others count as
    aligned), and reuses the attack's gradient as g(x). Gauss–Newton: exact for the cross-entropy alone.
    """

    step_factor: StepFactor = 1.0
    attack_loss: LabelLossName = "ce"  # the KL is flat at the image
    weight: NonNegative = setting(0.2, "λ, 0.2 at 8/255; larger eps need more.")
    label = "GradAlign λ={weight:g}"
    source = "Andriushchenko & Flammarion, arXiv 2007.02617, eq. 4"
    cost = "3 forward passes (at x_adv, x, x + η) and 4 backward (the last one twice), and the attack's"
    start = "none"
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


@method
class FreeAT(Objective):
    """Free adversarial training: the backward pass of the weights moves the perturbation too.

    Each batch is used for m optimizer steps; one δ per place in the batch is carried from step to step:

        g_w, g_δ = ∇ CE( f_w( Box[x + δ] ), y )    from one backward pass                                  (3)
        δ ← Project( δ + step_size · steepest_step(g_δ) )                                                  (4)

    As in the authors' code: g_δ is zero where the box cuts x + δ off; δ is kept in the ball, not in the box;
    it starts at zero, and again when the shape of the batch changes, and moves on whatever images come next.
    Train m times fewer epochs. ``perturb`` returns a leaf that requires gradients; after ``backward`` of the
    loss the loop calls ``after_backward(x, x_adv)``. Under a weight perturbation g_δ is taken at W + u; a
    curvature penalty, whose passes reach the images too, is refused by recipes. Gauss–Newton: exact.
    ``state_dict`` has δ, each process its own; equality compares settings.
    """

    threat: Threat = ThreatModel()
    num_replays: PositiveCount = setting(8, "Steps with each batch: 8 for CIFAR-10, 4 for ImageNet.")
    step_size: StepSize | None = setting(None, "Length of an attack step in pixel units; null: eps.")
    label_smoothing: Share = setting(0.0, "Share of the target spread over all classes.")
    label = "free AT m={num_replays}"
    source = "Shafahi et al., arXiv 1904.12843, algorithm 1"
    cost = "1 forward and 1 backward pass, none of an attack"
    is_single_step = True
    attacks_in_backward = True

    def __post_init__(self) -> None:
        self.load_state_dict({})

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return Box[x + δ] as a leaf that requires gradients; the model is not touched."""
        with differentiating():
            x = normal(x).detach()
            return (x + self._delta(x)).clamp(0, 1).requires_grad_()

    @torch.no_grad()
    def after_backward(self, x: Tensor, x_adv: Tensor) -> None:
        """Move δ by (4) along ``x_adv.grad``, which is cleared; RuntimeError where none has arrived."""
        if x_adv.grad is None:
            raise RuntimeError("FreeAT.after_backward: got x_adv without .grad. Call loss.backward() before.")
        delta = self._delta(x)
        moved = x + delta
        gradient = x_adv.grad * ((moved >= 0) & (moved <= 1))
        x_adv.grad = None
        step_size = self.threat.eps if self.step_size is None else self.step_size
        step = steepest_step(gradient, self.threat, x=x, x_adv=moved)
        self._state["delta"] = project(delta + step_size * step, self.threat)

    def scaled(self, factor: float, **lengths: object) -> Self:
        """Return the objective with radius and step times ``factor``; it shares δ. 1 returns this one."""
        step_size = None if self.step_size is None else self.step_size * factor or None
        made = super().scaled(factor, step_size=step_size, **lengths)
        object.__setattr__(made, "_state", self._state)
        return made

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of δ as ``delta``; empty before the first step."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state_dict`` returned."""
        object.__setattr__(self, "_state", {name: value.clone() for name, value in state.items()})

    def _delta(self, x: Tensor) -> Tensor:
        """Return δ for images like ``x``, in the ball."""
        delta = self._state.get("delta")
        if delta is None or delta.shape != x.shape:
            return torch.zeros_like(x)
        return project(delta.to(x), self.threat)


@dataclass
class CatastrophicOverfittingGuard:
    """Watches the robust accuracy of a few training images under a short PGD attack.

        overfitting  ⇔  best robust accuracy so far − robust accuracy now  >  drop                         (5)

    From Wong et al. 2020, arXiv 2001.03994, sec. 5.1, whose code compares with the check before, so a fall in
    two halves escapes it. ``best`` and ``last`` are robust accuracies in [0, 1], None before the first check.
    """

    drop: float = 0.2  # share of the images, in (0, 1)
    num_steps: int = 5  # at least 2: one step is what the training resists
    best: float | None = None
    last: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.drop < 1 or self.num_steps < 2:
            got = f"got drop={self.drop:g}, num_steps={self.num_steps}"
            raise ValueError(f"CatastrophicOverfittingGuard: {got}; expected 0 < drop < 1, 2 steps or more.")

    def check(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: Generator | None = None
    ) -> bool:
        """Measure robust accuracy, in eval mode and float32; return whether it has collapsed, (5).

        On a few hundred training images: the same ones, threat (the final eps) and seed every time.
        """
        attack = Attack(threat, self.num_steps, threat.step_for(self.num_steps))
        with undisturbed(model, training=False), full_precision(model):
            x_adv = attack(model, x, y, generator)
            with torch.no_grad():
                is_right = model(x_adv).argmax(1) == (y.argmax(1) if y.ndim == 2 else y)
        return self.update(float(is_right.float().mean()))

    def update(self, robust_accuracy: float) -> bool:
        """Record a robust accuracy that was measured elsewhere and return whether it has collapsed, (5)."""
        self.last = robust_accuracy
        self.best = robust_accuracy if self.best is None else max(self.best, robust_accuracy)
        return self.best - robust_accuracy > self.drop
