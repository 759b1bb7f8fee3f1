"""The contract of a training objective, and what most objectives share: the settings of their attack.

Legend: B batch, C classes, x images [B, *dims] in [0, 1], x_adv adversarial images, y class indices [B] or
soft targets [B, C] that sum to one (mixup, CutMix), f_w the model.

``perturb`` runs the attack once and leaves no trace on the model; ``loss`` is a function of the weights at
*fixed* adversarial examples: its Hessian is the one the index speaks of. ``objective(model, x, y)`` is both.
Passes are counted in batches of B images; an input gradient that is differentiated again counts twice.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks import Attack, L1Share, LossName, NumRestarts, Start, Threat, ThreatModel
from wcitrain.curvature.loss import Loss, cross_entropy
from wcitrain.method import Method, PositiveCount, Share, StepSize, method, refuse, setting
from wcitrain.preserve import undisturbed

NumSteps = Annotated[PositiveCount, Field(description="Attack steps for each batch.")]
RandomStart = Annotated[bool, Field(description="Start from a random point of the ball.")]
AttackMode = Annotated[
    Literal["eval", "train"],
    Field(description="Mode of BatchNorm and dropout during the attack; running statistics are left alone."),
]
LabelSmoothing = Annotated[
    Share,
    Field(description="Share of the target spread over all classes, in [0, 1]; the attack sees true labels."),
]


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

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return adversarial images for ``x``: detached, in [0, 1]; the model is left exactly as it was."""
        raise NotImplementedError

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

    def scaled(self, factor: float) -> Self:
        """Return the objective with radii and attack steps times ``factor`` in [0, 1]; 1 returns itself."""
        return self if factor == 1 else replace(self, **self._lengths(factor))  # type: ignore[type-var]

    def _lengths(self, factor: float) -> dict[str, object]:
        """Return the settings that are lengths in the images, times ``factor``; no step where no radius."""
        return {}

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Loss:
        """Return the loss at freshly made adversarial images: ``perturb``, then ``loss``."""
        return self.loss(model, x, self.perturb(model, x, y, generator), y)


class Attacked(Objective):
    """An objective with one adversary, described by ``attack``."""

    threat: ThreatModel
    attack_bn: AttackMode
    start: ClassVar[Start] = "uniform"  # what a random start is

    @property
    def attack(self) -> Attack:
        """The adversary with its settings."""
        raise NotImplementedError

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the adversary's images against the current weights; the model is left exactly as it was."""
        with attack_mode(model, self.attack_bn):
            return self.attack(model, x, y, generator)

    def attack_passes(self) -> tuple[int, int]:
        """Those of the attack, see ``Attack.passes``."""
        return self.attack.passes()

    def _lengths(self, factor: float) -> dict[str, object]:
        return {"threat": self.threat.scaled(factor)}


@method
class PGDAttacked(Attacked):
    """The settings of an objective whose adversary is projected gradient ascent, see ``Attack``.

    ``attack_bn="train"`` uses batch statistics, as Rice et al. 2020, whose attack updates the running ones
    too.
    """

    threat: Threat = ThreatModel()
    num_steps: NumSteps = 10
    step_size: StepSize | None = setting(None, "Length of an attack step; null: 2.5 eps / num_steps.")
    random_start: RandomStart = True
    num_restarts: NumRestarts = 1
    attack_bn: AttackMode = "eval"
    label_smoothing: LabelSmoothing = 0.0
    attack_loss: LossName = "ce"
    l1_share: L1Share = 0.05

    def __post_init__(self) -> None:
        check_start(self.random_start, self.attack_loss)

    @property
    def attack(self) -> Attack:
        """The adversary with its settings."""
        step_size = self.threat.step_for(self.num_steps, self.step_size)
        start: Start = self.start if self.random_start else "none"
        return Attack(
            self.threat, self.num_steps, step_size, start, self.num_restarts, self.attack_loss, self.l1_share
        )

    def _lengths(self, factor: float) -> dict[str, object]:
        return super()._lengths(factor) | {"step_size": self.attack.step_size * factor or None}


def check_start(random_start: bool, attack_loss: LossName) -> None:
    """Refuse an attack on the KL that starts where the KL has no gradient."""
    if attack_loss == "kl" and not random_start:
        text = "got False with attack_loss 'kl'; expected True: at the image itself the KL has no gradient."
        refuse("random_start", f"{text} Set it.")


def attack_mode(model: nn.Module, mode: AttackMode) -> AbstractContextManager[None]:
    """Return the context in which ``model`` is attacked; it leaves no trace (``preserve.undisturbed``)."""
    return undisturbed(model, training=None if mode == "train" else False)
