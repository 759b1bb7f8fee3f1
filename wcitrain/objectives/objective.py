"""The contract of a training objective, and what most objectives share: the settings of their attack.

Legend: B batch, C classes, x images [B, *dims] in [0, 1], x_adv adversarial images, y class indices [B] or soft targets
[B, C] that sum to one (mixup, CutMix), f_w the model.

An objective has two methods. ``perturb`` runs the attack once and leaves no trace on the model; ``loss`` is a function of
the weights at *fixed* adversarial examples, so it can be evaluated again at perturbed weights: its Hessian is the one the
Weight-Curvature Index speaks of. An objective in one's own training loop:

    loss = objective(model, x, y)        # perturb, then loss
    loss.total.backward()

Passes are counted in batches of B images. A backward pass through the model counts once, whether it goes to the weights or
to the input; an input gradient that is itself differentiated in the weights counts twice.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self, get_args

import torch
from torch import Tensor, nn

from wcitrain.attacks import Attack, Start, ThreatModel
from wcitrain.curvature.loss import Loss
from wcitrain.preserve import undisturbed

AttackMode = Literal["eval", "train"]


class Objective(Protocol):
    """The contract of every objective; the module docstring tells what the two main methods are for."""

    @property
    def num_replays(self) -> int:
        """Optimizer steps to be made with each batch; 1 for all but ``FreeAT``."""

    @property
    def is_single_step(self) -> bool:
        """Whether the attack takes a single step, so that catastrophic overfitting can happen."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return adversarial images for ``x``: detached, in [0, 1]; the model is left exactly as it was."""

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the batch mean loss at ``x_adv``, differentiable in the weights; random numbers from torch's global state."""

    def attack_passes(self) -> tuple[int, int]:
        """Return the forward and backward passes that one ``perturb`` costs."""

    def loss_passes(self) -> tuple[int, int]:
        """Return the forward and backward passes that one ``loss`` and its backward cost."""

    def scaled(self, factor: float) -> Self:
        """Return the objective with radii and attack steps times ``factor`` in [0, 1]; 1 returns the objective itself."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Loss:
        """Return the loss at freshly made adversarial images."""


class OneStepPerBatch:
    """What holds for an objective unless it says otherwise."""

    num_replays: int = 1
    is_single_step: bool = False

    def loss_passes(self) -> tuple[int, int]:
        """One forward and one backward pass."""
        return 1, 1

    def __call__(
        self: Objective, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> Loss:
        """Return the loss at freshly made adversarial images: ``perturb``, then ``loss``."""
        return self.loss(model, x, self.perturb(model, x, y, generator), y)


class Attacked(OneStepPerBatch):
    """An objective with one adversary, described by ``attack``."""

    attack_bn: AttackMode

    @property
    def attack(self) -> Attack:
        """The adversary with its settings."""
        raise NotImplementedError

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the adversary's images against the current weights; the model is left exactly as it was."""
        with attacked(model, self.attack_bn):
            return self.attack(model, x, y, generator)

    def attack_passes(self) -> tuple[int, int]:
        """K forward and backward passes a restart, one forward a restart to compare several, one for "kl"'s reference."""
        return self.attack.passes()


@dataclass(frozen=True)
class PGDAttacked(Attacked):
    """The settings of an objective whose adversary is projected gradient ascent.

    Args:
        threat: Norm and radius.
        num_steps, step_size, random_start, num_restarts: See ``attacks.pgd``.
        attack_bn: Mode of the model while it is attacked: ``"eval"`` (running statistics, no dropout) or ``"train"`` (the
            mode it is trained in: batch statistics, as in Rice et al. 2020). Running statistics are left alone either way;
            Rice's code lets the attack update them.
        label_smoothing: Of the training loss; the attack always uses the true labels.
        attack_loss: What the adversary maximises, see ``attacks.ATTACK_LOSSES``.
        l1_share: Share of the coordinates an l1 step moves.
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    num_steps: int = 10
    step_size: float = 2 / 255
    random_start: bool = True
    num_restarts: int = 1
    attack_bn: AttackMode = "eval"
    label_smoothing: float = 0.0
    attack_loss: str = "ce"
    l1_share: float = 0.05

    def __post_init__(self) -> None:
        check_settings(self)
        _ = self.attack  # refuses what it cannot run

    def _start(self) -> Start:
        """Return where the attack starts."""
        return "uniform" if self.random_start else "none"

    @property
    def attack(self) -> Attack:
        """The adversary with its settings."""
        return Attack(
            self.threat,
            num_steps=self.num_steps,
            step_size=self.step_size,
            start=self._start(),
            num_restarts=self.num_restarts,
            loss=self.attack_loss,
            l1_share=self.l1_share,
        )

    def scaled(self, factor: float) -> Self:
        """Return the objective with radius and steps times ``factor``; 1 returns the objective itself."""
        if factor == 1:
            return self
        return replace(self, threat=self.threat.scaled(factor), step_size=self.step_size * factor)


def attacked(model: nn.Module, mode: AttackMode) -> AbstractContextManager[None]:
    """Return the context in which ``model`` is attacked; it leaves no trace (``preserve.undisturbed``)."""
    return undisturbed(model, training=None if mode == "train" else False)


def check_settings(objective: object) -> None:
    """Refuse settings outside their range, by the names they have in every objective."""
    where = type(objective).__name__
    mode = getattr(objective, "attack_bn", "eval")
    if mode not in get_args(AttackMode):
        raise ValueError(f"{where}.attack_bn: got {mode!r}; expected 'eval' or 'train'. Choose one of the two.")
    smoothing = getattr(objective, "label_smoothing", 0.0)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{where}.label_smoothing: got {smoothing!r}; expected a number in [0, 1]. 0.1 is usual.")
    for name in ("beta", "weight", "step_factor", "h"):
        value = getattr(objective, name, 0.0)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{where}.{name}: got {value!r}; expected a finite number >= 0. Use 0 to switch it off.")
