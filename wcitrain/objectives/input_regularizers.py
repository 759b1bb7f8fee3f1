"""Penalties on the loss as a function of the *input*, for any objective: its curvature (CURE) and its slope.

Legend: B batch, ℓ_n cross-entropy of example n, g_n(x) = ∇_x ℓ_n(x_n), of its own loss: B times the gradient
of the mean loss. Both are taken at the clean images, in the mode the model is in, and differentiated in the
weights: BatchNorm in train mode is fine, ``torch.compile`` is not.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.attacks import ascent, losses
from wcitrain.attacks.threat import shaped
from wcitrain.curvature.loss import Loss
from wcitrain.method import Method, NonNegative, method, setting
from wcitrain.objectives.objective import Objective, with_term
from wcitrain.preserve import differentiating, full_precision, kept_random_state, normal

TINY = 1e-30  # floor of a squared norm under a root; far below the square of any gradient that matters


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
    """Curvature regularisation: a penalty on the change of the input gradient along its sign.

        (1/B) Σ_n ‖ g_n(x_n + h z_n) − g_n(x_n) ‖²,    z_n = sign(g_n) / ‖sign(g_n)‖₂, detached            (1)

    The authors' code takes the norm, not its square, of gradients of the *mean* loss (1/B of ours), in eval
    mode. The paper reaches h = 1.5 in five epochs from 0, which ``scaled`` does.
    """

    weight: NonNegative = setting(4.0, "Weight in the loss; 4 in the paper.")
    h: NonNegative = setting(1.5, "Length of the finite difference, l2, in pixel units.")
    label = "CURE {weight:g}"
    source = "Moosavi-Dezfooli et al., arXiv 1811.09716, eq. 4 and 5"
    cost = "2 forward passes and 4 backward more (at both points, twice)"
    name = "cure"
    passes = (2, 4)

    def penalty(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return (1)."""
        with kept_random_state(x.device):
            here = input_gradient(model, x, y, create_graph=True)
        sign = here.detach().sign()
        moved = x + self.h * sign / shaped(norm(sign), x)
        difference = input_gradient(model, moved, y, create_graph=True) - here
        return dot(difference, difference).mean()

    def scaled(self, factor: float) -> Self:
        """Return the penalty with a step of ``factor`` times the length."""
        return self if factor == 1 else replace(self, h=self.h * factor)


@method
class InputGradient(InputRegularizer):
    """Input gradient regularisation, known as double backpropagation.

    norm "l2":  (1/B) Σ_n ‖g_n‖₂²        norm "l1":  (1/B) Σ_n ‖g_n‖₁                                  (2)
    """

    weight: NonNegative = setting(1.0, "Weight in the loss.")
    norm: Literal["l2", "l1"] = setting("l2", "Squared l2 norm, or l1 norm.")
    label = "{norm} input gradient {weight:g}"
    source = "Drucker & LeCun 1992; Ross & Doshi-Velez, arXiv 1711.09404"
    cost = "1 forward pass and 2 backward more"
    name = "input_gradient"
    passes = (1, 2)

    def penalty(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return (2)."""
        gradient = input_gradient(model, x, y, create_graph=True)
        return (dot(gradient, gradient) if self.norm == "l2" else gradient.abs().flatten(1).sum(1)).mean()


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, *, create_graph: bool) -> Tensor:
    """Return ∇_x ℓ_n for every example [B, *dims], ℓ the cross-entropy: the gradient of the losses' *sum*.

    In float32, with attention by its plain formula. Running statistics are left alone: the passes update
    copies, as autograd refuses to go back through a graph whose buffers have been put back since.
    """
    with differentiating(), full_precision(model), sdpa_kernel(SDPBackend.MATH):
        y, buffers = normal(y), {name: b.detach().clone() for name, b in model.named_buffers()}
        return ascent.input_gradient(
            lambda images: losses.ce(functional_call(model, buffers, (images,)), y),
            x,
            create_graph=create_graph,
        )


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of every example [B]."""
    return (left * right).flatten(1).sum(1)


def norm(x: Tensor) -> Tensor:
    """Return the l2 norm of every example [B]; its derivative at zero is zero, not NaN."""
    return dot(x, x).clamp_min(TINY).sqrt()


@dataclass(frozen=True)
class WithInputRegularizer(Method):
    """An objective plus a penalty on the loss as a function of the clean input; the rest is the objective's.

        objective.loss + regularizer.weight · regularizer.penalty                                          (3)

    The penalty is logged without the weight, and not among the ``outputs`` that Gauss–Newton sees.
    """

    objective: Objective
    regularizer: InputRegularizer
    label = "{objective} + {regularizer}"
    needs_double_backward = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("objective", "regularizer"):  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.objective, name)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (3) with ``x_adv`` held fixed."""
        loss = self.objective.loss(model, x, x_adv, y)
        penalty = self.regularizer.penalty(model, x, y)
        return with_term(loss, self.regularizer.weight, self.regularizer.name, penalty)

    def loss_passes(self) -> tuple[int, int]:
        """The objective's and the penalty's."""
        (forward, backward), more = self.objective.loss_passes(), self.regularizer.passes
        return forward + more[0], backward + more[1]

    def scaled(self, factor: float) -> Self:
        """Return both with their lengths in input space times ``factor``; 1 returns itself."""
        objective, regularizer = self.objective.scaled(factor), self.regularizer.scaled(factor)
        return self if factor == 1 else replace(self, objective=objective, regularizer=regularizer)
