"""Penalties φ(a_l, t_l) on squared Frobenius norms and Hessian traces, added to the loss.

Legend: a_l = ||W_l||_F², t_l = Tr(H_l), λ strength. The gradient needs only the partial derivatives,

    ∇ Σ_l φ(a_l, t_l) = Σ_l 2 (∂φ/∂a_l) W_l  +  ∇ Σ_l c_l t_l,     c_l = ∂φ/∂t_l held constant,            (1)

so it is linear in the noisy trace once c_l comes from a running average: it commutes with gradient
accumulation and with averaging over ranks, which a square root of a noisy trace does not. The average counts
as zero in ∂φ/∂a where it is negative, and with a floor in c_l (``random_directions.posterior_shape``).

Strength zero is *monitor only*: the traces are measured with the same probes, no gradient changes.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.estimators import ESTIMATORS, Auto
from wcitrain.curvature.passes import Passes, Step
from wcitrain.method import Choice, Method, Nested, NonNegative, method, setting
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
    estimator: Estimator | None = None  # of t_l and its gradient; None: no traces, no extra pass
    cost = "that of its estimator"

    @property
    def norm_strength(self) -> float:
        """What multiplies the squared norms."""
        return 0.0

    @property
    def trace_strength(self) -> float:
        """What multiplies the traces' part; zero needs no gradient of it."""
        return self.strength

    @property
    def is_active(self) -> bool:
        """Whether it changes a gradient, or only monitors."""
        return self.norm_strength > 0 or self.trace_strength > 0

    def norm_coefficients(self, a: Tensor, t: Tensor | None) -> Tensor | None:
        """Return the coefficients 2 ∂φ/∂a_l of W_l [L] in (1), None for none."""
        return torch.full_like(a, 2 * self.norm_strength) if self.norm_strength else None

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
    """The Weight-Curvature Index as a penalty, λ Σ_l sqrt(a_l t_l).

    Its gradient is that of λ/2 Σ_l (s_l t_l + a_l / s_l) at constant s_l = sqrt(a_l/t_l), the variances of
    the PAC-Bayes posterior.
    """

    strength: Strength = 0.0
    estimator: TraceEstimator = Auto()
    schedule: Schedule = ALWAYS
    label = "wci penalty {strength:g}"
    source = "the index of Xu & Zhang, arXiv 2410.07719; its gradient is this project's"

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
        step = super().add_gradient(passes, estimator, factor, traces, a)
        if not strength:
            return step
        size = (2 * factor * strength * (d * shape).sum() / a.sum()).sqrt()
        return step._replace(relative_size=size, strength=a.new_tensor(factor * strength))


@method
class FrobeniusPenalty(Penalty):
    """The squared norms of the layers as a penalty, λ Σ_l ||W_l||_F².

    Its gradient 2 λ W_l is weight decay 2 λ under SGD.
    """

    strength: NonNegative = setting(0.0, "λ, factor of the squared norms in the loss.")
    schedule: Schedule = ALWAYS
    label = "frobenius penalty {strength:g}"
    source = "ridge regression; weight decay"
    cost = "no pass more"

    @property
    def norm_strength(self) -> float:
        """λ."""
        return self.strength

    @property
    def trace_strength(self) -> float:
        """None."""
        return 0.0


@method
class TracePenalty(Penalty):
    """The traces of the Hessian as a penalty, λ Σ_l Tr(H_l)."""

    strength: Strength = 0.0
    estimator: TraceEstimator = Auto()
    schedule: Schedule = ALWAYS
    label = "trace penalty {strength:g}"
    source = "this project, as a control for the index"


@method
class FrobeniusTracePenalty(Penalty):
    """Squared norms and traces, each with its own weight: λ_F Σ_l ||W_l||_F² + λ_T Σ_l Tr(H_l)."""

    frobenius_weight: NonNegative = setting(0.0, "λ_F, factor of the squared norms.")
    trace_weight: NonNegative = setting(0.0, "λ_T, factor of the traces; 0 only monitors.")
    estimator: TraceEstimator = Auto()
    schedule: Schedule = ALWAYS
    label = "F+T penalty {frobenius_weight:g}, {trace_weight:g}"
    source = "this project, as a control for the index"

    @property
    def norm_strength(self) -> float:
        """λ_F."""
        return self.frobenius_weight

    @property
    def trace_strength(self) -> float:
        """λ_T."""
        return self.trace_weight


PENALTIES: dict[str, type[Penalty]] = {
    "wci": WCIPenalty,
    "frobenius": FrobeniusPenalty,
    "trace": TracePenalty,
    "frobenius_trace": FrobeniusTracePenalty,
}
