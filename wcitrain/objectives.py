"""Training objectives: what the adversary does with a batch, and the differentiable loss at what it found.

An objective has two methods. ``perturb`` runs the attack once and leaves no trace on the model; ``loss`` is a function of
the weights at *fixed* adversarial examples, so it can be evaluated again at perturbed weights: its Hessian is the one the
Weight-Curvature Index speaks of.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wcitrain.attacks import ThreatModel, pgd
from wcitrain.curvature.loss import Loss, cross_entropy
from wcitrain.preserve import undisturbed


class Objective(Protocol):
    """The contract of every objective; both methods are documented in the module docstring."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return adversarial images for ``x``: detached, same shape, in [0, 1]."""

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the batch mean loss at ``x_adv``, differentiable in the weights."""

    def attack_passes(self) -> tuple[int, int]:
        """Return the forward and backward passes that one ``perturb`` costs."""


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on clean images: no adversary.

    Args:
        label_smoothing: Mass moved from the true class to the uniform distribution, in [0, 1].
    """

    label_smoothing: float = 0.0

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x`` itself."""
        return x

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy at ``x``."""
        return cross_entropy(model(x), y, label_smoothing=self.label_smoothing)

    def attack_passes(self) -> tuple[int, int]:
        """No attack, no passes."""
        return 0, 0


@dataclass(frozen=True)
class PGDAT:
    """Adversarial training (Madry et al., arXiv 1706.06083): cross-entropy at the PGD adversary's images.

        min_w  (1/B) sum_n  max_{||delta_n|| <= eps}  CE( f_w(x_n + delta_n), y_n )

    Args:
        threat: Norm and radius.
        num_steps, step_size, random_start, num_restarts: See ``attacks.pgd``.
        attack_bn: Mode of the model while it is attacked: ``"eval"`` (running statistics, no dropout) or ``"train"`` (the
            mode it is trained in: batch statistics, as in Rice et al. 2020). Running statistics are left alone either way;
            Rice's code lets the attack update them.
        label_smoothing: Of the training loss; the attack always uses the true labels.
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    num_steps: int = 10
    step_size: float = 2 / 255
    random_start: bool = True
    num_restarts: int = 1
    attack_bn: Literal["eval", "train"] = "eval"
    label_smoothing: float = 0.0

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return PGD examples against the current weights; the model is left exactly as it was."""
        with undisturbed(model, training=None if self.attack_bn == "train" else False):
            return pgd(
                lambda x_adv: F.cross_entropy(model(x_adv).float(), y, reduction="none"),
                x,
                threat=self.threat,
                num_steps=self.num_steps,
                step_size=self.step_size,
                random_start=self.random_start,
                num_restarts=self.num_restarts,
                generator=generator,
            )

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy at ``x_adv``, held fixed (Danskin)."""
        return cross_entropy(model(x_adv), y, label_smoothing=self.label_smoothing)

    def attack_passes(self) -> tuple[int, int]:
        """K forward and backward passes a restart, and one forward a restart to compare several."""
        extra = self.num_restarts if self.num_restarts > 1 else 0
        return self.num_steps * self.num_restarts + extra, self.num_steps * self.num_restarts
