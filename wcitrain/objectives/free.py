"""Free adversarial training: the backward pass that trains the weights also moves the perturbation.

Legend: B batch, δ perturbation [B, *dims], m replays of each batch.
"""

from copy import copy
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from wcitrain.attacks import ThreatModel, project, sparse_step, steepest_step
from wcitrain.curvature.loss import Loss
from wcitrain.objectives.objective import OneStepPerBatch, check_settings
from wcitrain.objectives.terms import class_loss


@dataclass(eq=False)
class FreeAT(OneStepPerBatch):
    """Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843, algorithm 1).

    Each batch is used for m optimizer steps; one δ per place in the batch is carried from step to step and from batch to batch:

        g_w, g_δ = ∇ CE( f_w( Box[x + δ] ), y )    from one backward pass                                              (1)
        δ ← Project( δ + step_size · steepest_step(g_δ) )                                                              (2)

    As in the authors' code: g_δ is zero where the box cuts x + δ off; δ is kept in the ball, not in the box; it starts at zero
    and moves on whatever images come next. When the shape of the batch changes, δ starts again from zero. Train m times fewer
    epochs. ``perturb`` does not attack: it returns a leaf that requires gradients, and the loop reports back:

        for _ in range(objective.num_replays):
            x_adv = objective.perturb(model, x, y)
            objective.loss(model, x, x_adv, y).total.backward()
            objective.after_backward(x, x_adv)

    Calling the objective, ``objective(model, x, y)``, reports back by itself as soon as the backward pass reaches the images.
    Under a weight perturbation g_δ is the gradient the weights are stepped on, taken at W + u; a curvature penalty, whose
    passes reach the images too, is not for this objective (recipes refuse it). ``attack_bn`` does not exist here: the attack's
    pass is the training pass. Cost of the loss: (1, 1) passes, of the attack none. Gauss–Newton: exact. δ is part of the state
    to save: ``state_dict``; each process has its own.

    Args:
        threat: Norm and radius.
        num_replays: m, optimizer steps with each batch; >= 1. 8 for CIFAR-10, 4 for ImageNet in the paper.
        step_size: Of (2), in the threat's norm; None: eps.
        label_smoothing: Of the loss, and so, since there is one backward pass, of the attack.
        l1_share: Share of the coordinates an l1 step moves.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> objective = FreeAT(ThreatModel("linf", 0.1))
        >>> objective(model, x, y).total.backward()
        >>> objective.num_replays, round(float(objective.state_dict()["delta"].abs().max()), 4)
        (8, 0.1)
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    num_replays: int = 8
    step_size: float | None = None
    label_smoothing: float = 0.0
    l1_share: float = 0.05

    is_single_step = True

    def __post_init__(self) -> None:
        check_settings(self)
        if self.num_replays < 1:
            raise ValueError(f"FreeAT.num_replays: got {self.num_replays}; expected at least 1. 8 is usual.")
        if not 0 <= (self.step_size or 0.0) < float("inf") or not 0 < self.l1_share <= 1:
            raise ValueError(
                f"FreeAT: got step_size={self.step_size}, l1_share={self.l1_share}; expected a finite length >= 0 and a share in "
                "(0, 1]."
            )
        self._state: dict[str, Tensor] = {}  # one dictionary for all that ``scaled`` makes of this objective

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return Box[x + δ] as a leaf that requires gradients; the model is not touched."""
        return (x.detach() + self._delta(x)).clamp(0, 1).requires_grad_()

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return the mean cross-entropy at ``x_adv``."""
        return class_loss(model(x_adv), y, self.label_smoothing)

    @torch.no_grad()
    def after_backward(self, x: Tensor, x_adv: Tensor) -> None:
        """Move δ by (2) along ``x_adv.grad``, which is cleared.

        Raises:
            RuntimeError: No gradient has arrived at ``x_adv``: without it this would be training on a constant perturbation.
        """
        if x_adv.grad is None:
            raise RuntimeError(
                "FreeAT.after_backward: got x_adv without .grad; expected that of the training loss. Call it after "
                "loss.backward(), with the x_adv that perturb returned."
            )
        delta = self._delta(x)
        moved = x + delta
        gradient = x_adv.grad * ((moved >= 0) & (moved <= 1))
        x_adv.grad = None
        step_size = self.threat.eps if self.step_size is None else self.step_size
        if self.threat.norm == "l1":
            step = sparse_step(gradient, self.l1_share, x=x_adv, step_size=step_size)
        else:
            step = steepest_step(gradient, self.threat)
        self._state["delta"] = project(delta + step_size * step, self.threat)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Loss:
        """Return the loss at Box[x + δ]; δ moves when the backward pass of the loss reaches it."""
        x_adv = self.perturb(model, x, y, generator)
        x_adv.register_post_accumulate_grad_hook(lambda leaf: self.after_backward(x, leaf))
        return self.loss(model, x, x_adv, y)

    def attack_passes(self) -> tuple[int, int]:
        """No passes beside the training pass."""
        return 0, 0

    def scaled(self, factor: float) -> Self:
        """Return an objective with radius and step times ``factor`` that shares δ with this one; 1 returns this one."""
        if factor == 1:
            return self
        other = copy(self)
        other.threat = self.threat.scaled(factor)
        other.step_size = None if self.step_size is None else self.step_size * factor
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of δ under ``"delta"``; empty before the first step."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a δ that ``state_dict`` returned."""
        self._state.clear()
        self._state.update({name: value.clone() for name, value in state.items()})

    def _delta(self, x: Tensor) -> Tensor:
        """Return δ for images like ``x``, in the ball."""
        delta = self._state.get("delta")
        if delta is None or delta.shape != x.shape:
            return torch.zeros_like(x)
        return project(delta.to(x), self.threat)
