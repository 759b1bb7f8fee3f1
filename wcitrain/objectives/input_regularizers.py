"""Penalties on the loss as a function of the *input*, for any objective: its curvature (CURE) and its slope.

Legend: B batch, ℓ_n cross-entropy of example n, g_n(x) = ∇_x ℓ_n(x_n), of example n's own loss: B times the
gradient of the mean loss, so that the penalties do not depend on the batch size.

Both are taken at the clean images, in the mode the model is in, in float32, and leave running statistics
alone. They are differentiated in the weights, so the model needs second derivatives: attention is run by its
plain formula, BatchNorm in train mode is fine, ``torch.compile`` is not.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.curvature.loss import Loss
from wcitrain.method import Method, NonNegative, method
from wcitrain.objectives.objective import Objective
from wcitrain.objectives.terms import dot, input_gradient, norm, with_term
from wcitrain.preserve import kept_random_state


class InputRegularizer(Method):
    """A penalty on the loss as a function of the input."""

    name: str  # in the log
    weight: float  # in the loss
    passes: tuple[int, int]  # forward and backward, of ``penalty`` and its backward

    def penalty(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean penalty over the batch, without the weight, differentiable in the weights."""
        raise NotImplementedError

    def scaled(self, factor: float) -> Self:
        """Return the penalty with its lengths in input space times ``factor``; 1 returns itself."""
        return self


@method
class CURE(InputRegularizer):
    """Curvature regularisation (Moosavi-Dezfooli et al. 2019, arXiv 1811.09716, eq. 4 and 5).

        (1/B) Σ_n ‖ g_n(x_n + h z_n) − g_n(x_n) ‖²,    z_n = sign(g_n) / ‖sign(g_n)‖₂, detached            (1)

    The authors' code takes the norm, not its square (``squared=False``), of gradients of the *mean* loss (1/B
    of ours), in eval mode (call ``model.eval()`` around the loss for that). Both gradients see the same
    dropout masks. The paper reaches h = 1.5 in five epochs from 0, which ``scaled`` does. Cost: (2, 4)
    passes, forward at two points and backward at both, twice.
    """

    weight: NonNegative = Field(default=4.0, description="Weight in the loss; 4 in the paper.")
    h: NonNegative = Field(
        default=1.5,
        description="Length of the finite difference in [0, 1] pixel units, l2; 1.5 in the paper.",
    )
    squared: bool = Field(default=True, description="Square the difference, as the paper; its code does not.")
    label: ClassVar[str] = "CURE {weight:g}"
    name = "cure"
    passes = (2, 4)

    def penalty(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return (1)."""
        with kept_random_state(x.device):
            here = input_gradient(model, x, y, create_graph=True)
        sign = here.detach().sign()
        length = norm(sign).reshape(-1, *[1] * (x.ndim - 1))
        difference = input_gradient(model, x + self.h * sign / length, y, create_graph=True) - here
        return (dot(difference, difference) if self.squared else norm(difference)).mean()

    def scaled(self, factor: float) -> Self:
        """Return the penalty with a step of ``factor`` times the length; 1 returns the penalty itself."""
        return self if factor == 1 else replace(self, h=self.h * factor)


@method
class InputGradient(InputRegularizer):
    """Input gradient regularisation, "double backpropagation" (Ross & Doshi-Velez 2018, arXiv 1711.09404).

        norm "l2":  (1/B) Σ_n ‖g_n‖₂²        norm "l1":  (1/B) Σ_n ‖g_n‖₁                                  (2)

    First by Drucker & LeCun 1992. l1 is the rise of the linearised loss under linf perturbations of size one.
    Cost: (1, 2) passes.
    """

    weight: NonNegative = Field(default=1.0, description="Weight in the loss.")
    norm: Literal["l2", "l1"] = Field(default="l2", description="Squared l2 norm, or l1 norm.")
    label: ClassVar[str] = "{norm} input gradient {weight:g}"
    name = "input_gradient"
    passes = (1, 2)

    def penalty(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return (2)."""
        gradient = input_gradient(model, x, y, create_graph=True)
        return (dot(gradient, gradient) if self.norm == "l2" else gradient.abs().flatten(1).sum(1)).mean()


@dataclass(frozen=True)
class WithInputRegularizer(Objective):
    """An objective plus a penalty on the loss as a function of the clean input.

        objective.loss + regularizer.weight · regularizer.penalty                                          (3)

    The penalty is logged under its name, without the weight. Gauss–Newton: the ``outputs`` are those of the
    objective, so an index computed from them is that of the objective without the penalty. With ``FreeAT``
    inside, its ``after_backward`` and state are reached through this object.
    """

    objective: Objective
    regularizer: InputRegularizer

    label: ClassVar[str] = "{objective} + {regularizer}"
    needs_double_backward = True

    def __post_init__(self) -> None:
        for name in ("num_replays", "is_single_step", "needs_rotation_head", "attacks_in_backward"):
            object.__setattr__(self, name, getattr(self.objective, name))

    def __getattr__(self, name: str) -> Any:
        """Look up what only some objectives have: ``after_backward``, ``state_dict``, ``threat``."""
        if name.startswith("__") or name in ("objective", "regularizer"):  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.objective, name)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the objective's adversarial images."""
        return self.objective.perturb(model, x, y, generator)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (3) with ``x_adv`` held fixed."""
        return self._with_penalty(self.objective.loss(model, x, x_adv, y), model, x, y)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Loss:
        """Return (3) at freshly made adversarial images."""
        return self._with_penalty(self.objective(model, x, y, generator), model, x, y)

    def attack_passes(self) -> tuple[int, int]:
        """The objective's."""
        return self.objective.attack_passes()

    def loss_passes(self) -> tuple[int, int]:
        """The objective's and the penalty's."""
        forward, backward = self.objective.loss_passes()
        more_forward, more_backward = self.regularizer.passes
        return forward + more_forward, backward + more_backward

    def scaled(self, factor: float) -> Self:
        """Return the objective scaled plus the penalty scaled; 1 returns the objective itself."""
        if factor == 1:
            return self
        inside, regularizer = self.objective.scaled(factor), self.regularizer.scaled(factor)
        return replace(self, objective=inside, regularizer=regularizer)

    def _with_penalty(self, loss: Loss, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        penalty = self.regularizer.penalty(model, x, y)
        return with_term(loss, self.regularizer.weight, self.regularizer.name, penalty)
