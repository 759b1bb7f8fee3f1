"""Weight perturbations: a direction times a radius, and a way to combine the gradients found there.

Legend: a_l = ||W_l||_F², d_l = numel(W_l), t_l = Tr(H_l) of the loss at fixed adversarial examples, s_l = sqrt(a_l / t_l),
λ the penalty's strength, r the relative size ||u|| / ||W||.

| class          | direction       | radius                       | combine                | passes    |
|----------------|-----------------|------------------------------|------------------------|-----------|
| `AWP`          | gradient ascent | ||u_l|| = γ ||W_l||          | take the one at W + u  | +1        |
| `UniformNoise` | random signs    | σ_l² = r² a_l / d_l          | average those at W ± u | +1        |
| `WCIPosterior` | random signs    | σ_l² = λ s_l  (the optimum)  | average those at W ± u | +1        |

(A pass is a forward and a backward.) The rules are plain data; the passes are made by `RegularizedOptimizer`.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wcitrain.optim.schedule import StrengthSchedule

FLOOR = 1e-4  # lowest a_l t_l a layer counts with, as a share of the layers' mean: σ_l² is at most 100 times the mean layer's
FIRST_SIZE = 0.1  # relative size of the perturbations that measure, while a λ has no traces to be turned into a size


@dataclass(frozen=True)
class AWP:
    """Adversarial weight perturbation (Wu, Xia, Wang, arXiv 2004.05884, eq. 9–12, one ascent step).

        u_l = γ ||W_l|| g_l / ||g_l||,   update with the gradient at W + u, applied at W.                        (1)

    g is the gradient of the same loss at the same adversarial examples. Running statistics are updated in the pass at W
    (the authors' code updates them at W + u; with γ = 0.01 the two agree closely), and weight decay acts on W, not on W + u.

    Args:
        gamma: γ, relative radius of every layer; 0.01 in the paper for adversarial training.
        schedule: When it acts.
    """

    gamma: float = 0.01
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        _check_positive("AWP", gamma=self.gamma)

    def radii(self, a: Tensor, factor: float) -> Tensor:
        """Return ``||u_l||`` [L]."""
        return factor * self.gamma * a.sqrt()


class Posterior(NamedTuple):
    """A layer-wise Gaussian-like posterior around the weights, all tensors [L] or scalars."""

    sigma: Tensor  # standard deviation of every element of layer l
    frobenius: Tensor | None  # gradient coefficient of W_l, or None
    strength: Tensor  # λ
    relative_size: Tensor  # r = sqrt(Σ d_l σ_l² / Σ a_l)


@dataclass(frozen=True)
class WCIPosterior:
    """Train on the loss averaged over the PAC-Bayes optimal posterior: the Weight-Curvature Index as an objective.

        E_u L(W + u) + (λ/2) Σ_l a_l / s_l  ≈  L + (λ/2) Σ_l (s_l t_l + a_l / s_l)  =  L + λ Σ_l sqrt(a_l t_l),   (2)
        σ_l² = λ s_l,    s_l = sqrt(a_l / t_l),    λ = r² Σ_l a_l / Σ_l d_l s_l.                                 (3)

    The last equality of (2) holds at the optimal s_l, which is what (3) plugs in, from a running average of t_l. Directions
    are random signs, so the relative size is r exactly; the two antithetic gradients cancel the first-order noise. In (3) a
    layer whose product a_l t_l is below ``floor`` times the mean over layers, or negative, counts with that floor: its
    variance is at most 1/sqrt(floor) times that of a layer with the mean product, size and norm. A layer without any estimate
    (no gradient so far) counts with the mean. Until some trace is positive the shares are ``UniformNoise``'s, and a run by
    ``strength`` takes perturbations of relative size ``FIRST_SIZE``. Under bfloat16 traces from perturbations smaller than
    about 0.05 are rounding noise: avoid long ramps there.

    Args:
        relative_size: r; strong radii (about 1) are where it pays. Give this or ``strength``.
        strength: λ; r then follows from (3).
        frobenius: Add the second term of (2) (gradient λ W_l / s_l): without it only the noise term acts, and the weights
            may grow to escape it where the loss is scale-invariant. Decays the same tensors as weight decay does.
        statistics: Where running statistics are updated: ``"perturbed"`` in the pass at W − u, for nothing; ``"clean"`` in
            one extra forward pass at W. No difference in accuracy was seen at r = 1 (see DESIGN.md).
        floor: See above; the lower, the more noise goes where no curvature was found.
        schedule: When it acts; the ramp scales r (or λ).
    """

    relative_size: float | None = None
    strength: float | None = None
    frobenius: bool = False
    statistics: Literal["perturbed", "clean"] = "perturbed"
    floor: float = FLOOR
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        if (self.relative_size is None) == (self.strength is None):
            raise ValueError(
                f"WCIPosterior: got relative_size={self.relative_size}, strength={self.strength}; expected exactly one. "
                "relative_size=1.0 is a good start."
            )
        _check_positive("WCIPosterior", relative_size=self.relative_size, strength=self.strength, floor=self.floor)

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (3) for squared norms ``a``, sizes ``d`` and traces ``t`` (None: not measured yet), all [L]."""
        s, is_known = posterior_shape(a, d, t, self.floor)
        volume = (d * s).sum().clamp_min(_TINY)  # all layers zero: nothing to perturb, sigma = 0
        by_size = (factor * (self.relative_size or FIRST_SIZE)) ** 2 * a.sum() / volume
        if self.relative_size is not None:
            strength = by_size
        else:
            strength = torch.where(is_known, torch.full_like(by_size, factor * (self.strength or 0.0)), by_size)
        frobenius = norm_coefficients(a, t) * strength if self.frobenius and t is not None else None
        relative_size = (strength * volume / a.sum().clamp_min(_TINY)).sqrt()
        return Posterior((strength * s).sqrt(), frobenius, strength, relative_size)


@dataclass(frozen=True)
class UniformNoise:
    """Train on the loss averaged over noise of the same relative size in every layer: the posterior without curvature.

        σ_l² = r² a_l / d_l                                                                                     (4)

    The control for ``WCIPosterior``: same passes, same noise energy, other shares.

    Args:
        relative_size: r.
        statistics, schedule: As in ``WCIPosterior``.
    """

    relative_size: float = 1.0
    statistics: Literal["perturbed", "clean"] = "perturbed"
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        _check_positive("UniformNoise", relative_size=self.relative_size)

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (4); λ is not defined for it (NaN)."""
        r = factor * self.relative_size
        return Posterior(r * (a / d).sqrt(), None, a.new_tensor(float("nan")), a.new_tensor(r))


WeightPerturbation = AWP | WCIPosterior | UniformNoise


def posterior_shape(a: Tensor, d: Tensor, t: Tensor | None, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """Return ``s_l = sqrt(a_l / t_l)`` [L] with the floor on ``a_l t_l``, and whether any trace is known and positive.

    Where none is, the shape is ``a_l / d_l``: right as shares, meaningless as an absolute value.
    """
    uniform = a / d
    if t is None:
        return uniform, torch.zeros((), dtype=torch.bool, device=a.device)
    product = a * t
    is_measured = torch.isfinite(product)
    positive = torch.where(is_measured, product, 0.0).clamp_min(0)
    mean = positive.sum() / is_measured.sum().clamp_min(1)
    counted = torch.where(is_measured, positive.clamp_min(floor * mean), mean)
    is_known = mean > 0
    return torch.where(is_known, a / counted.clamp_min(_TINY).sqrt(), uniform), is_known


def norm_coefficients(a: Tensor, t: Tensor) -> Tensor:
    """Return ``sqrt(t_l / a_l)`` [L], the gradient of sqrt(a t) with respect to W_l over W_l; no floor, 0 for t <= 0 or NaN."""
    return torch.where(t > 0, (t / a.clamp_min(_TINY)).sqrt(), 0.0) * (a > 0)


_TINY = 1e-30


def _check_positive(where: str, **values: float | None) -> None:
    """Refuse strengths that are zero, negative or not finite (leave the rule out to switch it off)."""
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(
                f"{where}.{name}: got {value}; expected a number > 0. To switch it off pass perturbation=None."
            )
