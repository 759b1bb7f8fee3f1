"""The contract of a training objective; training without an adversary, with one, and with several.

Legend: B batch, C classes, T threat models, x images [B, *dims] in [0, 1], x_adv adversarial images, y class
indices [B] or soft targets [B, C] that sum to one (mixup, CutMix), f_w the model.

``perturb`` runs the attack once and leaves no trace on the model; ``loss`` is a function of the weights at
*fixed* adversarial examples: its Hessian is the one the index speaks of.
Passes are counted in batches of B images; an input gradient that is differentiated again counts twice.
"""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks import Norm, ThreatModel, msd
from wcitrain.attacks.ascent import Attack, Mode, Start, Threat
from wcitrain.attacks.losses import LabelLossName, LossName, ce
from wcitrain.curvature.loss import Loss, Output, cross_entropy
from wcitrain.method import Method, Nested, PositiveCount, Radius, Share, StepSize, method, refuse, setting
from wcitrain.preserve import differentiating, normal, undisturbed

NumSteps = Annotated[PositiveCount, Field(description="Attack steps for each batch.")]
AttackMode = Annotated[
    Mode,
    Field(description="Mode of BatchNorm and dropout during the attack; running statistics are left alone."),
]
LabelSmoothing = Annotated[Share, Field(description="Target share spread over all classes; not in attacks.")]


class Objective(Method):
    """A training objective, and what holds for one unless it says otherwise."""

    num_replays: int = 1  # optimizer steps to be made with each batch
    is_single_step: bool = False  # the attack takes one step, so catastrophic overfitting can happen
    needs_double_backward: bool = False  # an input gradient is differentiated: compiled models cannot
    needs_rotation_head: bool = False  # the model must have a second head, see ``RotationAT``
    attacks_in_backward: bool = False  # the backward pass moves the perturbation: it must be the only one
    passes: tuple[int, int] = (1, 1)  # what ``loss_passes`` returns
    cost: ClassVar[str] = "1 forward and 1 backward pass, and the attack's"
    label_smoothing: float
    _state: dict[str, Tensor]  # what an objective carries from step to step

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return adversarial images for ``x``: detached, in [0, 1]; the model is left exactly as it was."""
        return x

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the batch mean loss, differentiable in the weights: the cross-entropy at ``x_adv``.

        ``x_adv`` is held fixed (Danskin). Random numbers come from torch's global state.
        """
        return cross_entropy(model(x_adv), y, label_smoothing=self.label_smoothing)

    def attack_passes(self) -> tuple[int, int]:
        """Return the forward and backward passes that one ``perturb`` costs."""
        return 0, 0

    def loss_passes(self) -> tuple[int, int]:
        """Return the forward and backward passes that one ``loss`` and its backward cost."""
        return self.passes

    def scaled(self, factor: float, **lengths: object) -> Self:
        """Return the objective with radii and attack steps times ``factor`` in [0, 1]; 1 returns itself."""
        if factor == 1:
            return self
        parts = {name: part.scaled(factor) for name, part in vars(self).items() if hasattr(part, "scaled")}
        return replace(self, **parts | lengths)  # type: ignore[type-var]


@method
class Standard(Objective):
    """Cross-entropy on clean images: no adversary."""

    label_smoothing: LabelSmoothing = 0.0
    label = "standard"
    source = "empirical risk minimisation"
    cost = "1 forward and 1 backward pass"


class Attacked(Objective):
    """An objective with an adversary, which is ``attack`` unless ``search`` says otherwise."""

    attack_bn: AttackMode
    attack_loss: LossName
    start: ClassVar[Start] = "uniform"

    @property
    def attack(self) -> Attack:
        """The adversary with its settings."""
        raise NotImplementedError

    def attack_on(self, threat: ThreatModel, num_steps: int, step_size: float | None = None) -> Attack:
        """Return the adversary in a ball, with the settings that do not depend on it."""
        step, loss = threat.step_for(num_steps, step_size), self.attack_loss
        return Attack(threat, num_steps, step, self.start, loss=loss)

    def search(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None) -> Tensor:
        """Return adversarial images against the model in the mode it is in."""
        return self.attack(model, x, y, generator)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return adversarial images against the current weights; the model is left exactly as it was."""
        with differentiating(), undisturbed(model, training=None if self.attack_bn == "train" else False):
            return self.search(model, normal(x), normal(y), generator)

    def attack_passes(self) -> tuple[int, int]:
        """Those of the attack, see ``Attack.passes``."""
        return self.attack.passes()


@method
class PGDAT(Attacked):
    """Adversarial training: cross-entropy at the images of a PGD adversary.

        min_w  (1/B) Σ_n  max_{‖δ_n‖ ≤ eps}  CE( f_w(x_n + δ_n), y_n )                                     (1)

    ``attack_bn="train"`` uses batch statistics, as Rice et al. 2020, whose attack updates the running ones
    too. Gauss–Newton: exact.
    """

    threat: Threat = ThreatModel()
    num_steps: NumSteps = 10
    step_size: StepSize | None = setting(
        None, "Length of an attack step; null: 2.5 eps / num_steps (l1: at least eps)."
    )
    attack_bn: AttackMode = "eval"
    label_smoothing: LabelSmoothing = 0.0
    attack_loss: LossName = "ce"
    label = "AT"
    source = "Madry et al., arXiv 1706.06083, eq. 2.1"

    @property
    def attack(self) -> Attack:
        """The adversary with its settings."""
        return self.attack_on(self.threat, self.num_steps, self.step_size)

    def scaled(self, factor: float, **lengths: object) -> Self:
        """Return the objective with radius and attack steps times ``factor``; no step where no radius."""
        return super().scaled(factor, step_size=self.attack.step_size * factor or None, **lengths)


@method
class UnionThreat(ThreatModel):
    """One ball of a union; steps in it are ``step_for`` long."""

    norm: Norm = Field(description="Norm of the image perturbation.")
    eps: Radius = Field(description="Radius of the ball in [0, 1] pixel units.")


@method
class UnionAT(Attacked):
    """Adversarial training on the union of several balls.

        "max":      CE at the one of the T PGD adversaries' images where it is largest, for each example   (2)
        "average":  the mean of the CE at all T images                                                     (3)
        "msd":      CE at one adversary's image, every step the best of T steps (``attacks.msd``)          (4)

    For "average", ``perturb`` returns the images of all adversaries one after the other, [T·B, *dims].
    Maini et al. attack l1 with 5 to 20 coordinates a step, drawn at random, and with 50 to 100 steps; their
    CIFAR-10 radii are linf 0.03, l2 0.5, l1 12. Gauss–Newton: exact.
    """

    threats: Annotated[tuple[Annotated[UnionThreat, Nested()], ...], Field(strict=False)] = Field(
        default=(UnionThreat("linf", 8 / 255), UnionThreat("l2", 0.5)),
        description="The threat models of training, at least two; threat is that of the evaluation.",
    )
    strategy: Literal["max", "average", "msd"] = setting("max", "Worst of each image, mean, or best step.")
    num_steps: NumSteps = 10
    attack_bn: AttackMode = "eval"
    label_smoothing: LabelSmoothing = 0.0
    attack_loss: LabelLossName = "ce"
    label = "AT {strategy} of {norms}"
    source = "Tramèr & Boneh, arXiv 1904.13000; Maini et al., arXiv 1909.04068 (msd)"
    cost = "1 forward and 1 backward pass, for the average one for each ball; and the attacks'"

    def __post_init__(self) -> None:
        if len(self.threats) < 2:
            refuse("threats", f"got {len(self.threats)}; expected at least 2 balls. For one, use PGDAT.")

    def __str__(self) -> str:
        return self.label.format(strategy=self.strategy, norms=", ".join(ball.norm for ball in self.threats))

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """One adversary for each threat model."""
        return tuple(self.attack_on(ball, self.num_steps) for ball in self.threats)

    def search(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None) -> Tensor:
        """Return the images of (2), (3) or (4)."""
        if self.strategy == "msd":
            return msd(model, x, y, self.attacks, generator)
        candidates = torch.stack([attack(model, x, y, generator) for attack in self.attacks])
        if self.strategy == "average":
            return candidates.flatten(0, 1)
        with torch.no_grad():
            worst = torch.stack([ce(model(x_adv), y) for x_adv in candidates]).argmax(0)
        return candidates[worst, torch.arange(len(x), device=x.device)]

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy at ``x_adv``, held fixed; the targets are repeated to as many."""
        times = len(x_adv) // len(y)
        return super().loss(model, x, x_adv, y.repeat(times, *[1] * (y.ndim - 1)))

    def attack_passes(self) -> tuple[int, int]:
        """Those of the attacks, and T forward passes to choose the worst; "msd": K (1 + T) and K."""
        num, steps = len(self.threats), self.num_steps
        if self.strategy == "msd":
            return steps + num * steps, steps
        forward, backward = (sum(passes) for passes in zip(*(a.passes() for a in self.attacks), strict=True))
        return forward + (num if self.strategy == "max" else 0), backward

    def loss_passes(self) -> tuple[int, int]:
        """One forward and backward pass; for "average" over T batches."""
        times = len(self.threats) if self.strategy == "average" else 1
        return times, times

    def scaled(self, factor: float, **lengths: object) -> Self:
        """Return the objective with every ball and its steps times ``factor``."""
        return super().scaled(factor, threats=tuple(ball.scaled(factor) for ball in self.threats), **lengths)


def with_term(loss: Loss, weight: float, name: str, term: Tensor, *outputs: Output) -> Loss:
    """Return ``loss`` + weight · term; the term is logged without the weight and depends on ``outputs``."""
    parts = {**loss.parts, name: term.detach()}
    return Loss(loss.total + weight * term, parts, (*loss.outputs, *outputs))
