"""Penalties φ(a_l, t_l) on squared Frobenius norms and Hessian traces, added to the loss.

Legend: a_l = ||W_l||_F², t_l = Tr(H_l), λ strength. The gradient of Σ_l φ(a_l, t_l) needs only the partial
derivatives,

    ∇R = Σ_l 2 (∂φ/∂a_l) W_l  +  ∇ Σ_l c_l t_l,     c_l = ∂φ/∂t_l held constant,                           (1)

so φ is linear in the noisy trace once c_l comes from a running average: it commutes with gradient
accumulation and with averaging over ranks, which a square root of a noisy trace does not.

The WCI penalty has the gradient of its variational form λ/2 Σ_l (s_l t_l + a_l / s_l) at constant
s_l = sqrt(a_l/t_l), the variances of the PAC-Bayes posterior. Estimates of either sign enter the average; an
average below zero counts as zero in ∂φ/∂a and with a floor in c_l (``random_directions.posterior_shape``).

Strength zero is *monitor only*: the traces are measured with the same probes, no gradient changes. How t_l
and its gradient are estimated is the penalty's ``estimator`` (`curvature.estimators`).
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.estimators import ESTIMATORS, Auto
from wcitrain.curvature.passes import Passes, Step
from wcitrain.method import Choice, Method, Nested, NonNegative, method
from wcitrain.optim.random_directions import norm_coefficients, posterior_shape
from wcitrain.optim.schedule import ALWAYS, StrengthSchedule

ESTIMATOR = "How traces are estimated; auto tries and says why."
SCHEDULE = "When it acts; its ``every`` multiplies λ."
Strength = Annotated[NonNegative, Field(description="λ, factor of the penalty in the loss; 0 only monitors.")]
TraceEstimator = Annotated[Estimator, Choice(ESTIMATORS), Field(description=ESTIMATOR)]
Schedule = Annotated[StrengthSchedule, Nested(), Field(description=SCHEDULE)]


class Penalty(Method):
    """The contract of the penalties."""

    schedule: StrengthSchedule
    strength: float
    estimator: Estimator | None = None  # None: no traces, no extra pass

    @property
    def trace_strength(self) -> float:
        """What multiplies the traces' part; zero needs no gradient of it."""
        return self.strength if self.estimator else 0.0

    @property
    def is_active(self) -> bool:
        """Whether it changes a gradient, or only monitors."""
        return self.strength > 0

    def norm_coefficients(self, a: Tensor, t: Tensor | None) -> Tensor | None:
        """Return the coefficients 2 ∂φ/∂a_l of W_l [L] in (1), None for none."""
        return None

    def trace_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> tuple[Tensor, float]:
        """Return the shape of c_l [L] (positive), and the factor it is multiplied with."""
        return torch.ones_like(a), self.trace_strength

    def add_gradient(
        self, passes: Passes, estimator: Estimator, factor: float, traces: Tensor | None, a: Tensor
    ) -> Step:
        """Leave g + factor · ∇ Σ_l c_l t_l in ``.grad``; the norms' part, which needs no pass, is not here.

        ``a`` are the squared norms at W: beside a weight perturbation the pass is at W + u, and the
        coefficients c_l stay those of W.
        """
        shape, strength = self.trace_coefficients(a, passes.layers.sizes(), traces)
        return estimator.add_gradient(passes, shape, factor * strength)


@method
class WCIPenalty(Penalty):
    """λ times the Weight-Curvature Index, λ Σ_l sqrt(a_l t_l).

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> penalty = WCIPenalty(1e-4, estimator="gauss_newton")
        >>> RegularizedOptimizer(base, model, penalty=penalty).extra_passes()
        (0.0, 3.0)
    """

    strength: Strength = 0.0
    estimator: TraceEstimator = Auto()
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "wci penalty {strength:g}"

    def norm_coefficients(self, a: Tensor, t: Tensor | None) -> Tensor | None:
        """Return λ sqrt(t_l / a_l), or None where no trace is known yet."""
        return None if t is None or not self.strength else self.strength * norm_coefficients(a, t)

    def trace_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> tuple[Tensor, float]:
        """Return ½ s_l, and λ (zero until a trace is positive)."""
        shape, is_known = posterior_shape(a, d, t)
        return shape / 2, self.strength if self.strength and bool(is_known) else 0.0

    def add_gradient(
        self, passes: Passes, estimator: Estimator, factor: float, traces: Tensor | None, a: Tensor
    ) -> Step:
        """Add the gradient, and say the size of the posterior it amounts to: ||u||² = λ Σ d_l s_l."""
        d = passes.layers.sizes()
        shape, strength = self.trace_coefficients(a, d, traces)
        step = estimator.add_gradient(passes, shape, factor * strength)
        if not strength:
            return step
        size = (2 * factor * strength * (d * shape).sum() / a.sum()).sqrt()
        return step._replace(relative_size=size, strength=a.new_tensor(factor * strength))


@method
class FrobeniusPenalty(Penalty):
    """λ Σ_l ||W_l||_F²: no curvature, no pass. Its gradient 2 λ W_l is weight decay 2 λ under SGD."""

    strength: NonNegative = Field(default=0.0, description="λ, factor of the squared norms in the loss.")
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "frobenius penalty {strength:g}"

    def norm_coefficients(self, a: Tensor, t: Tensor | None) -> Tensor | None:
        """Return 2 λ."""
        return torch.full_like(a, 2 * self.strength) if self.strength else None


@method
class TracePenalty(Penalty):
    """λ Σ_l Tr(H_l)."""

    strength: Strength = 0.0
    estimator: TraceEstimator = Auto()
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "trace penalty {strength:g}"


@method
class FrobeniusTracePenalty(Penalty):
    """λ_F Σ_l ||W_l||_F² + λ_T Σ_l Tr(H_l): the two parts apart. λ_T = 0 still measures the traces."""

    frobenius_weight: NonNegative = Field(default=0.0, description="λ_F, factor of the squared norms.")
    trace_weight: NonNegative = Field(default=0.0, description="λ_T, factor of the traces; 0 only monitors.")
    estimator: TraceEstimator = Auto()
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "F+T penalty {frobenius_weight:g}, {trace_weight:g}"

    @property
    def trace_strength(self) -> float:
        """λ_T."""
        return self.trace_weight

    @property
    def is_active(self) -> bool:
        """Whether either part changes a gradient."""
        return self.frobenius_weight > 0 or self.trace_weight > 0

    def norm_coefficients(self, a: Tensor, t: Tensor | None) -> Tensor | None:
        """Return 2 λ_F."""
        return torch.full_like(a, 2 * self.frobenius_weight) if self.frobenius_weight else None


PENALTIES: dict[str, type[Penalty]] = {
    "wci": WCIPenalty,
    "frobenius": FrobeniusPenalty,
    "trace": TracePenalty,
    "frobenius_trace": FrobeniusTracePenalty,
}
