"""Penalties φ(a_l, t_l) on squared Frobenius norms and Hessian traces, added to the loss.

Legend: a_l = ||W_l||_F², t_l = Tr(H_l), λ strength. The gradient of Σ_l φ(a_l, t_l) needs only the partial derivatives,

    ∇R = Σ_l 2 (∂φ/∂a_l) W_l  +  ∇ Σ_l c_l t_l,     c_l = ∂φ/∂t_l held constant,                                (1)

so φ is linear in the noisy trace once c_l comes from a running average: it commutes with gradient accumulation and with
averaging over ranks, which a square root of a noisy trace does not.

| class                   | φ(a, t)          | ∂φ/∂a         | ∂φ/∂t         |
|-------------------------|------------------|---------------|---------------|
| `WCIPenalty`            | λ sqrt(a t)      | ½ λ sqrt(t/a) | ½ λ sqrt(a/t) |
| `FrobeniusTracePenalty` | λ_F a + λ_T t    | λ_F           | λ_T           |

With c_l from a running average of t_l, the WCI penalty is the variational form λ/2 Σ_l (s_l t_l + a_l / s_l) with the
s_l = sqrt(a_l/t_l) held constant: the same gradient, and s_l is the PAC-Bayes posterior's variance. Estimates of either sign
enter the average; an average below zero counts as zero in ∂φ/∂a and with a floor in c_l (``perturbation.posterior_shape``);
the share of negative estimates is logged as ``curvature/negative``.

Strength zero is *monitor only*: the traces are measured with the same probes, no gradient changes.

How t_l and its gradient are estimated is the penalty's ``estimator``, see `penalty_steps`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from wcitrain.optim.perturbation import norm_coefficients, posterior_shape
from wcitrain.optim.schedule import StrengthSchedule

Estimator = Literal["auto", "two_point", "gauss_newton", "hutchinson", "top_layer"]
Differentiation = Literal["finite_difference", "autograd"]


@dataclass(frozen=True)
class WCIPenalty:
    """λ times the Weight-Curvature Index, λ Σ_l sqrt(a_l t_l).

    The trace coefficients use `WCIPosterior`'s default floor on ``a_l t_l``; the norm coefficients use the clamped trace itself.

    Args:
        strength: λ >= 0; 0 only monitors.
        radius: Size of the probe perturbation relative to the weights, in (0, 1] (two_point and hutchinson's finite
            differences). Small radii approach the Hessian on smooth networks and lose digits: two_point multiplies rounding
            errors of the gradients by k = ½ (r / radius)², where r is the relative size that λ amounts to (`WCIPosterior`;
            logged as ``relative_size``).
        schedule: When it acts; its ``every`` multiplies λ.
        estimator: ``"two_point"`` (first order, works everywhere), ``"gauss_newton"`` (unbiased for the Gauss–Newton trace,
            never negative, second derivatives), ``"hutchinson"`` (the Hessian's, second or third derivatives),
            ``"top_layer"`` (exact, the head alone), or ``"auto"``: gauss_newton where the loss gives its outputs and a dry
            run finds second derivatives, else two_point.
        gradient: Of hutchinson: central differences of Hessian-vector products, or third derivatives by autograd.
        num_probes: Independent probes a step.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, penalty=WCIPenalty(1e-4, estimator="gauss_newton")).extra_passes()
        (0.0, 3.0)
    """

    strength: float = 0.0
    radius: float = 0.01
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)
    estimator: Estimator = "auto"
    gradient: Differentiation = "finite_difference"
    num_probes: int = 1

    def __post_init__(self) -> None:
        _check("WCIPenalty", self, strength=self.strength)

    @property
    def measures_curvature(self) -> bool:
        """Whether the rule needs traces (always: they are its coefficients)."""
        return True

    @property
    def trace_strength(self) -> float:
        """What multiplies the trace's part; zero needs no gradient of it."""
        return self.strength

    def norm_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> Tensor | None:
        """Return the coefficients of W_l [L] in (1), 2 ∂φ/∂a_l = λ sqrt(t_l / a_l), or None where no trace is known yet."""
        if t is None or self.strength == 0:
            return None
        return self.strength * norm_coefficients(a, t)

    def trace_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> tuple[Tensor, float]:
        """Return the shape of c_l [L] (positive) and the factor it is multiplied with (zero until a trace is positive)."""
        shape, is_known = posterior_shape(a, d, t)
        return shape / 2, self.strength if self.strength and bool(is_known) else 0.0


@dataclass(frozen=True)
class FrobeniusTracePenalty:
    """λ_F Σ_l ||W_l||_F² + λ_T Σ_l Tr(H_l): the two parts apart. λ_T = 0 costs no extra pass.

    Args:
        frobenius_weight: λ_F >= 0. Its gradient is 2 λ_F W_l: the same as weight decay 2 λ_F under SGD.
        trace_weight: λ_T >= 0, or None to leave curvature out altogether; 0 monitors it.
        radius, schedule, estimator, gradient, num_probes: See ``WCIPenalty``.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, penalty=FrobeniusTracePenalty(1e-4, 1e-4, estimator="gauss_newton")).extra_passes()
        (0.0, 3.0)
    """

    frobenius_weight: float = 0.0
    trace_weight: float | None = 0.0
    radius: float = 0.01
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)
    estimator: Estimator = "auto"
    gradient: Differentiation = "finite_difference"
    num_probes: int = 1

    def __post_init__(self) -> None:
        _check(
            "FrobeniusTracePenalty",
            self,
            frobenius_weight=self.frobenius_weight,
            trace_weight=self.trace_weight or 0.0,
        )

    @property
    def measures_curvature(self) -> bool:
        """Whether the rule needs traces."""
        return self.trace_weight is not None

    @property
    def trace_strength(self) -> float:
        """λ_T."""
        return self.trace_weight or 0.0

    def norm_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> Tensor | None:
        """Return the coefficients of W_l [L] in (1), 2 λ_F."""
        return torch.full_like(a, 2 * self.frobenius_weight) if self.frobenius_weight else None

    def trace_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> tuple[Tensor, float]:
        """Return c_l's shape, one for every layer, and λ_T."""
        return torch.ones_like(a), self.trace_weight or 0.0


Penalty = WCIPenalty | FrobeniusTracePenalty


def _check(where: str, rule: Penalty, **strengths: float) -> None:
    """Refuse negative or infinite strengths, a probe radius outside (0, 1], unknown names and no probes."""
    for name, value in strengths.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{where}.{name}: got {value}; expected a finite number >= 0 (0 = monitor only).")
    if not 0 < rule.radius <= 1:
        raise ValueError(f"{where}.radius: got {rule.radius}; expected a relative size in (0, 1]. 0.01 is the default.")
    for name, choices in (("estimator", get_args(Estimator)), ("gradient", get_args(Differentiation))):
        if getattr(rule, name) not in choices:
            raise ValueError(f"{where}.{name}: got {getattr(rule, name)!r}; expected one of {', '.join(choices)}.")
    if rule.num_probes < 1:
        raise ValueError(f"{where}.num_probes: got {rule.num_probes}; expected at least 1.")
