"""Penalties φ(a_l, t_l) on squared Frobenius norms and Hessian traces, added to the loss.

Legend: a_l = ||W_l||_F², t_l = Tr(H_l), λ strength. The gradient needs only the partial derivatives,

    ∇ Σ_l φ(a_l, t_l) = Σ_l 2 (∂φ/∂a_l) W_l  +  ∇ Σ_l c_l t_l,     c_l = ∂φ/∂t_l held constant,            (1)

so it is linear in the noisy trace once c_l comes from a running average: it commutes with gradient
accumulation and with averaging over ranks, which a square root of a noisy trace does not. The average counts
as zero in ∂φ/∂a where it is negative, and with a floor in c_l (``random_directions.posterior_shape``).

With ``center: initial`` a_l = ||W_l − W_l⁰||_F², and W_l − W_l⁰ stands for W_l in (1): what pulls to the
weights before training, see `random_directions`. Estimators do not look at a_l: traces are known from W⁰ on.

Strength zero is *monitor only*: the traces are measured with the same probes, no gradient changes.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.estimators import ESTIMATORS, Auto, name_of
from wcitrain.curvature.gauss_newton import GaussNewton
from wcitrain.curvature.passes import TINY, Passes, Step
from wcitrain.method import Choice, Method, Nested, NonNegative, method, refuse, setting
from wcitrain.optim.perturbation import ALWAYS, Centered, Combination, StrengthSchedule, WeightPerturbation
from wcitrain.optim.random_directions import posterior_shape

ESTIMATOR = "How traces are estimated; auto tries and says why."
SCHEDULE = "When it acts; its ``every`` multiplies λ."
Strength = Annotated[NonNegative, Field(description="λ, factor of the penalty in the loss; 0 only monitors.")]
TraceEstimator = Annotated[Estimator, Choice(ESTIMATORS), Field(description=ESTIMATOR)]
Schedule = Annotated[StrengthSchedule, Nested(), Field(description=SCHEDULE)]


class Penalty(Method):
    """The contract of the penalties: φ by the two coefficients of its gradient (1)."""

    schedule: StrengthSchedule
    strength: float  # λ; `FrobeniusTracePenalty` has two weights in its place: read ``strengths``
    estimator: Estimator | None = None  # of t_l and its gradient; None: no traces, no extra pass
    center: str = "origin"  # what norms are distances from, see params.Center
    cost = "that of its estimator"

    def __str__(self) -> str:
        return super().__str__() + " from initial" * (self.center != "origin")

    @property
    def strengths(self) -> tuple[float, float]:
        """What multiplies the squared norms, and the traces' part; both zero: it only monitors."""
        return 0.0, self.strength

    def norm_coefficients(self, a: Tensor, t: Tensor | None) -> Tensor | None:
        """Return the coefficients 2 ∂φ/∂a_l of W_l [L] in (1), None for none."""
        strength, _ = self.strengths
        return torch.full_like(a, 2 * strength) if strength else None

    def add_norm_gradient(self, passes: Passes, factor: float) -> None:
        """Add ``factor`` times the first sum of (1), at W, to ``.grad``."""
        coefficients = self.norm_coefficients(passes.squared_norms(self.center), passes.traces)
        passes.add_norm_gradients(coefficients, factor, self.center)

    def trace_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> tuple[Tensor, float]:
        """Return the shape of c_l [L] (positive), and the factor it is multiplied with."""
        return torch.ones_like(a), self.strengths[1]

    def add_gradient(self, passes: Passes, estimator: Estimator, factor: float, a: Tensor) -> Step:
        """Leave g + factor · ∇ Σ_l c_l t_l in ``.grad``; the norms' part, which needs no pass, is not here.

        ``a`` are the squared norms at W: also where the pass is at W + u, the coefficients stay those of W.
        """
        shape, strength = self.trace_coefficients(a, passes.layers.sizes(), passes.traces)
        return estimator.add_gradient(passes, shape, factor * strength)


@method
class WCIPenalty(Penalty):
    """The Weight-Curvature Index as a penalty, λ Σ_l sqrt(a_l t_l).

    Its gradient is that of λ/2 Σ_l (s_l t_l + a_l / s_l) at constant s_l = sqrt(a_l/t_l).
    """

    strength: Strength = 0.0
    estimator: TraceEstimator = Auto()
    schedule: Schedule = ALWAYS
    center: Centered = "origin"
    label = "wci penalty {strength:g}"
    source = "the index of Xu & Zhang, arXiv 2410.07719; its gradient is this project's"

    def norm_coefficients(self, a: Tensor, t: Tensor | None) -> Tensor | None:
        """Return λ sqrt(t_l / a_l), zero for t_l <= 0 or NaN; None where no trace is known yet."""
        if t is None or not self.strength:
            return None
        return self.strength * (torch.where(t > 0, (t / a.clamp_min(TINY)).sqrt(), 0.0) * (a > 0))

    def trace_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> tuple[Tensor, float]:
        """Return ½ s_l, zero until a trace is positive, and λ, zero until there is one."""
        shape, is_known = posterior_shape(a, d, t)
        return shape / 2 * is_known, self.strength if t is not None else 0.0

    def add_gradient(self, passes: Passes, estimator: Estimator, factor: float, a: Tensor) -> Step:
        """Add the gradient, and say the size of the posterior it amounts to: r² = mean λ d_l s_l / a_l."""
        step, d = super().add_gradient(passes, estimator, factor, a), passes.layers.sizes()
        shape, strength = self.trace_coefficients(a, d, passes.traces)
        if not strength:
            return step
        size = (2 * factor * strength * d * shape / a.clamp_min(TINY)).mean().sqrt()
        return step._replace(relative_size=size, strength=a.new_tensor(factor * strength))


@method
class FrobeniusPenalty(Penalty):
    """The squared norms of the layers as a penalty, λ Σ_l ||W_l||_F².

    Its gradient 2 λ W_l is weight decay 2 λ under SGD.
    """

    strength: NonNegative = setting(0.0, "λ, factor of the squared norms in the loss.")
    schedule: Schedule = ALWAYS
    center: Centered = "origin"
    label = "frobenius penalty {strength:g}"
    source = "ridge regression; weight decay; from initial: L2-SP of Li et al., arXiv 1802.01483"
    cost = "no pass more"

    @property
    def strengths(self) -> tuple[float, float]:
        """λ, and none for the traces."""
        return self.strength, 0.0


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
    center: Centered = "origin"
    label = "F+T penalty {frobenius_weight:g}, {trace_weight:g}"
    source = "this project, as a control for the index"

    @property
    def strengths(self) -> tuple[float, float]:
        """λ_F and λ_T."""
        return self.frobenius_weight, self.trace_weight


PENALTIES: dict[str, type[Penalty]] = {
    "wci": WCIPenalty,
    "frobenius": FrobeniusPenalty,
    "trace": TracePenalty,
    "frobenius_trace": FrobeniusTracePenalty,
}


def layers_for(perturbation: WeightPerturbation | None, penalty: Penalty | None, layers: str | None) -> str:
    """Return which tensors are layers, see ``params.select_layers``; None: what the rule is published for.

    A curvature penalty is evaluated at W + u, so it needs a rule that takes the gradient there and nowhere
    else, and an estimator of all layers that moves no weights itself. ValueError where the two would not be
    one well-defined objective on the same layers.
    """
    if perturbation is not None and penalty is not None and penalty.estimator is not None:
        if not isinstance(penalty.estimator, Auto | GaussNewton):
            text = f"got {name_of(penalty.estimator)} beside {perturbation}; expected gauss_newton"
            refuse("penalty.estimator", f"{text}, which has all layers and moves no weights. Change it.")
        # Half strength stands for a ramp: GradientNorm's weights at full strength may be those of SAM.
        is_alone = all(perturbation.combination(factor) == Combination() for factor in (0.5, 1.0))
        if perturbation.measures_traces or not is_alone:
            rule = "a rule that takes the gradient at W + u alone (SAM, ASAM, AWP, VaSSO, RWP with mixing 1)"
            text = f"got {penalty} beside {perturbation}; expected {rule}"
            refuse("penalty", f"{text}. Leave one of the two out.")
    wanted = perturbation.default_layers if perturbation else "weights"
    if layers is None and penalty is not None and wanted != "weights":
        text = f"got null with {perturbation}, which is published for all tensors, and {penalty}"
        refuse("layers", f"{text}; expected the layers of both. Set layers to 'weights' or 'all'.")
    return layers or wanted
