"""Penalties φ(a_l, t_l) on squared Frobenius norms and Hessian traces, added to the loss.

Legend: a_l = ||W_l||_F², t_l = Tr(H_l), λ strength. The gradient of Σ_l φ(a_l, t_l) needs only the partial derivatives,

    ∇R = Σ_l 2 (∂φ/∂a_l) W_l  +  ∇ Σ_l c_l t_l,     c_l = ∂φ/∂t_l held constant,                                (1)

so φ is linear in the noisy trace once c_l comes from a running average: it commutes with gradient accumulation and with
averaging over ranks, which a square root of a noisy trace does not.

| class                   | φ(a, t)          | ∂φ/∂a         | ∂φ/∂t         |
|-------------------------|------------------|---------------|---------------|
| `WCIPenalty`            | λ sqrt(a t)      | ½ λ sqrt(t/a) | ½ λ sqrt(a/t) |
| `FrobeniusTracePenalty` | λ_F a + λ_T t    | λ_F           | λ_T           |

Strength zero is *monitor only*: the traces are measured with the same probes, no gradient changes.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wcitrain.optim.perturbation import norm_coefficients, posterior_shape
from wcitrain.optim.schedule import StrengthSchedule


@dataclass(frozen=True)
class WCIPenalty:
    """λ times the Weight-Curvature Index, λ Σ_l sqrt(a_l t_l), by two-point differences at a small radius.

    The trace coefficients use `WCIPosterior`'s default floor on ``a_l t_l``; the norm coefficients use the clamped trace itself.

    Args:
        strength: λ >= 0; 0 only monitors.
        radius: Size of the probe perturbation relative to the weights, in (0, 1]. Small radii approach the Hessian on smooth
            networks and lose digits: rounding errors of the gradients are multiplied by k = ½ (r / radius)², where r is the
            relative size that λ amounts to (`WCIPosterior`; logged as ``relative_size``).
        schedule: When it acts; its ``every`` multiplies λ.
    """

    strength: float = 0.0
    radius: float = 0.01
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        _check("WCIPenalty", self.radius, strength=self.strength)

    @property
    def measures_curvature(self) -> bool:
        """Whether the rule needs traces (always: they are its coefficients)."""
        return True

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
        radius, schedule: See ``WCIPenalty``.
    """

    frobenius_weight: float = 0.0
    trace_weight: float | None = 0.0
    radius: float = 0.01
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        _check(
            "FrobeniusTracePenalty",
            self.radius,
            frobenius_weight=self.frobenius_weight,
            trace_weight=self.trace_weight or 0.0,
        )

    @property
    def measures_curvature(self) -> bool:
        """Whether the rule needs traces."""
        return self.trace_weight is not None

    def norm_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> Tensor | None:
        """Return the coefficients of W_l [L] in (1), 2 λ_F."""
        return torch.full_like(a, 2 * self.frobenius_weight) if self.frobenius_weight else None

    def trace_coefficients(self, a: Tensor, d: Tensor, t: Tensor | None) -> tuple[Tensor, float]:
        """Return c_l's shape, one for every layer, and λ_T."""
        return torch.ones_like(a), self.trace_weight or 0.0


Penalty = WCIPenalty | FrobeniusTracePenalty


def _check(where: str, radius: float, **strengths: float) -> None:
    """Refuse negative or infinite strengths and a probe radius outside (0, 1]."""
    for name, value in strengths.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{where}.{name}: got {value}; expected a finite number >= 0 (0 = monitor only).")
    if not 0 < radius <= 1:
        raise ValueError(f"{where}.radius: got {radius}; expected a relative size in (0, 1]. 0.01 is the default.")
