"""Penalties on the loss as a function of the *input*, added to any objective: its curvature (CURE) and its slope.

Legend: B batch, ℓ_n cross-entropy of example n, g_n(x) = ∇_x ℓ_n(x_n), of example n's own loss: B times the gradient of the
mean loss, so that the penalties do not depend on the batch size.

Both are taken at the clean images, in the mode the model is in, in float32, and leave running statistics alone. They are
differentiated in the weights, so the model needs second derivatives: attention is run by its plain formula, BatchNorm in train
mode is fine, ``torch.compile`` is not.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from wcitrain.curvature.loss import Loss
from wcitrain.objectives.objective import Objective, check_settings
from wcitrain.objectives.terms import TINY, dot, input_gradient, norm
from wcitrain.preserve import random_state, set_random_state


class InputRegularizer(Protocol):
    """A penalty on the loss as a function of the input."""

    @property
    def name(self) -> str:
        """What the penalty is called in the log."""

    @property
    def weight(self) -> float:
        """Its weight in the loss."""

    def penalty(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean penalty over the batch, without the weight, differentiable in the weights."""

    def passes(self) -> tuple[int, int]:
        """Return the forward and backward passes of ``penalty`` and its backward."""

    def scaled(self, factor: float) -> Self:
        """Return the penalty with its lengths in input space times ``factor``."""


@dataclass(frozen=True)
class CURE:
    """Curvature regularisation (Moosavi-Dezfooli et al. 2019, arXiv 1811.09716, eq. 4 and 5).

        (1/B) Σ_n ‖ g_n(x_n + h z_n) − g_n(x_n) ‖²,    z_n = sign(g_n) / ‖sign(g_n)‖₂, detached                          (1)

    The authors' code takes the norm, not its square (``squared=False``), of gradients of the *mean* loss (1/B of ours), in eval
    mode (call ``model.eval()`` around the loss for that). Both gradients see the same dropout masks. Cost: (2, 4) passes.

    Args:
        weight: 4 in the paper; >= 0.
        h: l2 length of the step in pixel units; 1.5 in the paper, reached in five epochs from 0, which ``scaled`` does; >= 0.
        squared: The paper's square, or the code's norm.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> penalty = CURE().penalty(model, x, y)
        >>> bool(penalty > 0), penalty.requires_grad
        (True, True)
    """

    weight: float = 4.0
    h: float = 1.5
    squared: bool = True

    name = "cure"

    def __post_init__(self) -> None:
        check_settings(self)

    def penalty(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return (1)."""
        states = random_state(x.device)
        here = input_gradient(model, x, y, create_graph=True)
        sign = here.detach().sign()
        length = dot(sign, sign).clamp_min(TINY).sqrt().reshape(-1, *[1] * (x.ndim - 1))
        set_random_state(states, x.device)
        difference = input_gradient(model, x + self.h * sign / length, y, create_graph=True) - here
        return (dot(difference, difference) if self.squared else norm(difference)).mean()

    def passes(self) -> tuple[int, int]:
        """Forward at two points; backward at both, twice."""
        return 2, 4

    def scaled(self, factor: float) -> Self:
        """Return the penalty with a step of ``factor`` times the length; 1 returns the penalty itself."""
        return self if factor == 1 else replace(self, h=self.h * factor)


@dataclass(frozen=True)
class InputGradient:
    """Input gradient regularisation, "double backpropagation" (Drucker & LeCun 1992; Ross & Doshi-Velez 2018, 1711.09404).

        norm "l2":  (1/B) Σ_n ‖g_n‖₂²        norm "l1":  (1/B) Σ_n ‖g_n‖₁                                                (2)

    l1 is the rise of the linearised loss under linf perturbations of size one. Cost: (1, 2) passes.

    Args:
        weight: Of (2); >= 0.
        norm: ``"l2"`` (squared) or ``"l1"``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> bool(InputGradient().penalty(model, x, y) < InputGradient(norm="l1").penalty(model, x, y))
        True
    """

    weight: float = 1.0
    norm: Literal["l2", "l1"] = "l2"

    name = "input_gradient"

    def __post_init__(self) -> None:
        check_settings(self)
        if self.norm not in ("l2", "l1"):
            raise ValueError(f"InputGradient.norm: got {self.norm!r}; expected 'l2' or 'l1'. Choose one of the two.")

    def penalty(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return (2)."""
        gradient = input_gradient(model, x, y, create_graph=True)
        return (dot(gradient, gradient) if self.norm == "l2" else gradient.abs().flatten(1).sum(1)).mean()

    def passes(self) -> tuple[int, int]:
        """Forward once; backward once, twice."""
        return 1, 2

    def scaled(self, factor: float) -> Self:
        """Return the penalty itself: it has no length in input space."""
        return self


@dataclass(frozen=True)
class WithInputRegularizer:
    """An objective plus a penalty on the loss as a function of the clean input.

        objective.loss + regularizer.weight · regularizer.penalty                                                        (3)

    The penalty is logged under its name, without the weight. Gauss–Newton: the ``outputs`` are those of the objective, so an
    index computed from them is that of the objective without the penalty. With ``FreeAT`` inside, its ``after_backward`` and
    state are reached through this object.

    Example:
        >>> from wcitrain.objectives import Standard
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> objective = WithInputRegularizer(Standard(), InputGradient(weight=0.1))
        >>> sorted(objective(model, x, y).parts), objective.loss_passes()
        (['cross_entropy', 'input_gradient'], (2, 3))
    """

    objective: Objective
    regularizer: InputRegularizer

    @property
    def num_replays(self) -> int:
        """The objective's."""
        return self.objective.num_replays

    @property
    def is_single_step(self) -> bool:
        """The objective's."""
        return self.objective.is_single_step

    def __getattr__(self, name: str) -> Any:
        """Look up what only some objectives have: ``after_backward``, ``state_dict``, ``threat``."""
        if name.startswith("__") or name in ("objective", "regularizer"):  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.objective, name)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the objective's adversarial images."""
        return self.objective.perturb(model, x, y, generator)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (3) with ``x_adv`` held fixed."""
        return self._with_penalty(self.objective.loss(model, x, x_adv, y), model, x, y)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Loss:
        """Return (3) at freshly made adversarial images."""
        return self._with_penalty(self.objective(model, x, y, generator), model, x, y)

    def attack_passes(self) -> tuple[int, int]:
        """The objective's."""
        return self.objective.attack_passes()

    def loss_passes(self) -> tuple[int, int]:
        """The objective's and the penalty's; a differentiated input gradient counts two backward passes."""
        forward, backward = self.objective.loss_passes()
        more_forward, more_backward = self.regularizer.passes()
        return forward + more_forward, backward + more_backward

    def scaled(self, factor: float) -> Self:
        """Return the objective scaled plus the penalty scaled; 1 returns the objective itself."""
        if factor == 1:
            return self
        return replace(self, objective=self.objective.scaled(factor), regularizer=self.regularizer.scaled(factor))

    def _with_penalty(self, base: Loss, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        penalty = self.regularizer.penalty(model, x, y)
        return Loss(
            base.total + self.regularizer.weight * penalty,
            {**base.parts, self.regularizer.name: penalty.detach()},
            base.outputs,
        )
