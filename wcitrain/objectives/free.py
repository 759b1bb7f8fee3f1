"""Free adversarial training: the backward pass that trains the weights also moves the perturbation.

Legend: B batch, δ perturbation [B, *dims], m replays of each batch.
"""

from typing import Self

import torch
from torch import Generator, Tensor, nn

from wcitrain.attacks import L1Share, Threat, ThreatModel, project, steepest_step
from wcitrain.curvature.loss import Loss
from wcitrain.method import PositiveCount, Share, StepSize, method, setting
from wcitrain.objectives.objective import Objective


class Carrying(Objective):
    """An objective that carries tensors from step to step: no setting, so declared outside the dataclass."""

    _state: dict[str, Tensor]


@method
class FreeAT(Carrying):
    """Free adversarial training: the backward pass of the weights moves the perturbation too.

    Each batch is used for m optimizer steps; one δ per place in the batch is carried from step to step:

        g_w, g_δ = ∇ CE( f_w( Box[x + δ] ), y )    from one backward pass                                  (1)
        δ ← Project( δ + step_size · steepest_step(g_δ) )                                                  (2)

    As in the authors' code: g_δ is zero where the box cuts x + δ off; δ is kept in the ball, not in the box;
    it starts at zero, and again when the shape of the batch changes, and moves on whatever images come next.
    Train m times fewer epochs. ``perturb`` returns a leaf that requires gradients, and the loop reports back
    (``objective(model, x, y)`` by itself, as soon as the backward pass reaches the images):

        x_adv = objective.perturb(model, x, y)
        objective.loss(model, x, x_adv, y).total.backward()
        objective.after_backward(x, x_adv)

    Under a weight perturbation g_δ is taken at W + u; a curvature penalty, whose passes reach the images too,
    is refused by recipes. Gauss–Newton: exact. ``state_dict`` has δ, each process its own; equality compares
    settings.
    """

    threat: Threat = ThreatModel()
    num_replays: PositiveCount = setting(8, "Steps with each batch: 8 for CIFAR-10, 4 for ImageNet.")
    step_size: StepSize | None = setting(None, "Length of an attack step in pixel units; null: eps.")
    label_smoothing: Share = setting(0.0, "Share of the target spread over all classes.")
    l1_share: L1Share = 0.05
    label = "free AT m={num_replays}"
    source = "Shafahi et al., arXiv 1904.12843, algorithm 1"
    cost = "1 forward and 1 backward pass, none of an attack"
    is_single_step = True
    attacks_in_backward = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "_state", {})

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return Box[x + δ] as a leaf that requires gradients; the model is not touched."""
        return (x.detach() + self._delta(x)).clamp(0, 1).requires_grad_()

    @torch.no_grad()
    def after_backward(self, x: Tensor, x_adv: Tensor) -> None:
        """Move δ by (2) along ``x_adv.grad``, which is cleared; RuntimeError where none has arrived."""
        if x_adv.grad is None:
            raise RuntimeError("FreeAT.after_backward: got x_adv without .grad. Call loss.backward() before.")
        delta = self._delta(x)
        moved = x + delta
        gradient = x_adv.grad * ((moved >= 0) & (moved <= 1))
        x_adv.grad = None
        step_size = self.threat.eps if self.step_size is None else self.step_size
        step = steepest_step(gradient, self.threat, x=x_adv, step_size=step_size, l1_share=self.l1_share)
        self._state["delta"] = project(delta + step_size * step, self.threat)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Loss:
        """Return the loss at Box[x + δ]; δ moves when the backward pass of the loss reaches it."""
        x_adv = self.perturb(model, x, y, generator)
        x_adv.register_post_accumulate_grad_hook(lambda leaf: self.after_backward(x, leaf))
        return self.loss(model, x, x_adv, y)

    def scaled(self, factor: float) -> Self:
        """Return the objective with radius and step times ``factor``; it shares δ. 1 returns this one."""
        if factor == 1:
            return self
        made = super().scaled(factor)
        object.__setattr__(made, "_state", self._state)
        return made

    def _lengths(self, factor: float) -> dict[str, object]:
        step_size = None if self.step_size is None else self.step_size * factor or None
        return {"threat": self.threat.scaled(factor), "step_size": step_size}

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of δ as ``delta``; empty before the first step."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._state.clear()
        self._state.update({name: value.clone() for name, value in state.items()})

    def _delta(self, x: Tensor) -> Tensor:
        """Return δ for images like ``x``, in the ball."""
        delta = self._state.get("delta")
        if delta is None or delta.shape != x.shape:
            return torch.zeros_like(x)
        return project(delta.to(x), self.threat)
