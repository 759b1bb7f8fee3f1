"""Weight perturbations: a direction times a radius, and a way to combine the gradients found there. Here: random directions.

Legend: a_l = ||W_l||_F², d_l = numel(W_l), t_l = Tr(H_l) of the loss at fixed adversarial examples, s_l = sqrt(a_l / t_l),
λ the penalty's strength, r the relative size ||u|| / ||W||, w_j the j-th filter (row) of a tensor.

| class            | direction     | radius                              | combine                  | passes |
|------------------|---------------|-------------------------------------|--------------------------|--------|
| `UniformNoise`   | signs         | σ_l² = r² a_l / d_l                 | ½ [g(W + u) + g(W − u)]  | +1     |
| `NoiseStability` | Gaussian      | σ_l = σ                             | ½ [g(W + u) + g(W − u)]  | +1     |
| `WCIPosterior`   | signs         | σ_l² = λ s_l  (the optimum)         | ½ [g(W + u) + g(W − u)]  | +1     |
| `RWP`            | Gaussian      | σ ||w_j||                           | (1 − α) g(W) + α g(W + u)| +1, 0 at α = 1 |

(A pass is a forward and a backward; ``ascent`` has the directions of the gradient.) The rules are plain data; the passes are
made by `perturbed_steps`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from wcitrain.optim.schedule import StrengthSchedule

if TYPE_CHECKING:
    from wcitrain.optim.passes import Passes

FLOOR = 1e-4  # lowest a_l t_l a layer counts with, as a share of the layers' mean: σ_l² is at most 100 times the mean layer's
FIRST_SIZE = 0.1  # relative size of the perturbations that measure, while a λ has no traces to be turned into a size


class Combination(NamedTuple):
    """The gradient stepped on: ``here · g(W) + plus · g(W + u) + minus · g(W − u)``."""

    here: float = 0.0
    plus: float = 1.0
    minus: float = 0.0


ANTITHETIC = Combination(0.0, 0.5, 0.5)


class WeightPerturbation:
    """What all rules share: a schedule, the layers they are published for, and their combination of gradients."""

    schedule: StrengthSchedule
    default_layers: ClassVar[str] = "weights"  # see params.select_layers
    measures_traces: ClassVar[bool] = False

    def combination(self, factor: float = 1.0) -> Combination:
        """Return the weights of the gradients at W, W + u and W − u, at ``factor`` of full strength."""
        raise NotImplementedError


class Posterior(NamedTuple):
    """A layer-wise Gaussian-like posterior around the weights, all tensors [L] or scalars."""

    sigma: Tensor  # standard deviation of every element of layer l
    frobenius: Tensor | None  # gradient coefficient of W_l, or None
    strength: Tensor  # λ, NaN where it is not defined
    relative_size: Tensor  # r = sqrt(Σ d_l σ_l² / Σ a_l)


class Noise(WeightPerturbation):
    """A random rule with one standard deviation a layer: `posterior` says which."""

    statistics: Literal["perturbed", "clean"]
    measures_traces: ClassVar[bool] = True
    is_gaussian: ClassVar[bool] = False  # else signs

    def combination(self, factor: float = 1.0) -> Combination:
        """Average the antithetic pair: first-order noise cancels, and the difference measures the traces."""
        return ANTITHETIC

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return the posterior for squared norms ``a``, sizes ``d`` and traces ``t`` (None: not measured yet), all [L]."""
        raise NotImplementedError


@dataclass(frozen=True)
class WCIPosterior(Noise):
    """Train on the loss averaged over the PAC-Bayes optimal posterior: the Weight-Curvature Index as an objective.

        E_u L(W + u) + (λ/2) Σ_l a_l / s_l  ≈  L + (λ/2) Σ_l (s_l t_l + a_l / s_l)  =  L + λ Σ_l sqrt(a_l t_l),   (1)
        σ_l² = λ s_l,    s_l = sqrt(a_l / t_l),    λ = r² Σ_l a_l / Σ_l d_l s_l.                                 (2)

    The last equality of (1) holds at the optimal s_l, which is what (2) plugs in, from a running average of t_l. Directions
    are random signs, so the relative size is r exactly; the two antithetic gradients cancel the first-order noise. In (2) a
    layer whose product a_l t_l is below ``floor`` times the mean over layers, or negative, counts with that floor: its
    variance is at most 1/sqrt(floor) times that of a layer with the mean product, size and norm. A layer without any estimate
    (no gradient so far) counts with the mean. Until some trace is positive the shares are ``UniformNoise``'s, and a run by
    ``strength`` takes perturbations of relative size ``FIRST_SIZE``. Under bfloat16 traces from perturbations smaller than
    about 0.05 are rounding noise: avoid long ramps there.

    Args:
        relative_size: r; strong radii (about 1) are where it pays. Give this or ``strength``.
        strength: λ; r then follows from (2).
        frobenius: Add the second term of (1) (gradient λ W_l / s_l): without it only the noise term acts, and the weights
            may grow to escape it where the loss is scale-invariant. Decays the same tensors as weight decay does.
        statistics: Where running statistics are updated: ``"perturbed"`` in the pass at W − u, for nothing; ``"clean"`` in
            one extra forward pass at W. No difference in accuracy was seen at r = 1 (see DESIGN.md).
        floor: See above; the lower, the more noise goes where no curvature was found.
        schedule: When it acts; the ramp scales r (or λ).

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> from wcitrain import RegularizedOptimizer, cross_entropy
        >>> optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=WCIPosterior(0.5))
        >>> loss = optimizer.step(lambda: cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0])))
        >>> round(optimizer.metrics()["relative_size"], 4)
        0.5
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
        check_positive("WCIPosterior", relative_size=self.relative_size, strength=self.strength, floor=self.floor)

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (2)."""
        s, is_known = posterior_shape(a, d, t, self.floor)
        volume = (d * s).sum().clamp_min(TINY)  # all layers zero: nothing to perturb, sigma = 0
        by_size = (factor * (self.relative_size or FIRST_SIZE)) ** 2 * a.sum() / volume
        if self.relative_size is not None:
            strength = by_size
        else:
            strength = torch.where(is_known, torch.full_like(by_size, factor * (self.strength or 0.0)), by_size)
        frobenius = norm_coefficients(a, t) * strength if self.frobenius and t is not None else None
        relative_size = (strength * volume / a.sum().clamp_min(TINY)).sqrt()
        return Posterior((strength * s).sqrt(), frobenius, strength, relative_size)


@dataclass(frozen=True)
class UniformNoise(Noise):
    """Train on the loss averaged over noise of the same relative size in every layer: the posterior without curvature.

        σ_l² = r² a_l / d_l                                                                                     (3)

    The control for ``WCIPosterior``: same passes, same noise energy, other shares.

    Args:
        relative_size: r.
        statistics, schedule: As in ``WCIPosterior``.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=UniformNoise(1.0)).extra_passes()
        (1.0, 1.0)
    """

    relative_size: float = 1.0
    statistics: Literal["perturbed", "clean"] = "perturbed"
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        check_positive("UniformNoise", relative_size=self.relative_size)

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (3)."""
        r = factor * self.relative_size
        return Posterior(r * (a / d).sqrt(), None, a.new_tensor(torch.nan), a.new_tensor(r))


@dataclass(frozen=True)
class NoiseStability(Noise):
    """Noise stability optimization (Zhang, Li, Ju, arXiv 2306.08553): isotropic Gaussian noise, antithetic gradients.

        u ~ N(0, σ² I),    step on ½ [g(W + u) + g(W − u)],    expectation ∇[L + (σ²/2) Tr(H)] + O(σ⁴).          (4)

    One pair a step; the authors average several. All trainable tensors move, biases and normalisation included.

    Args:
        sigma: σ in the weights' own units.
        statistics, schedule: As in ``WCIPosterior``.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=NoiseStability(0.01)).extra_passes()
        (1.0, 1.0)
    """

    sigma: float = 0.01
    statistics: Literal["perturbed", "clean"] = "perturbed"
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)
    default_layers: ClassVar[str] = "all"
    is_gaussian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("NoiseStability", sigma=self.sigma)

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (4); the relative size is its root mean square."""
        sigma = factor * self.sigma
        size = sigma * (d.sum() / a.sum().clamp_min(TINY)).sqrt()
        return Posterior(torch.full_like(a, sigma), None, a.new_tensor(torch.nan), size)


@dataclass(frozen=True)
class RWP(WeightPerturbation):
    """Random weight perturbation relative to every filter (Bisla et al. 2022, LPF-SGD; Li et al. 2024, RWP).

        u_j = σ ||w_j|| ξ,  ξ ~ N(0, I),    step on (1 − α) g(W) + α g(W + u).                                  (5)

    w_j are the rows of a tensor's first dimension (filters; a vector is one filter), so ||u_j|| is about σ sqrt(numel) ||w_j||.
    α = 1 is LPF-SGD with one sample and costs nothing; α < 1 is RWP's mixed loss (its authors take the two gradients on
    different halves of a batch, here both see the same images). Running statistics move at W where there is a pass at W.

    Args:
        sigma: σ.
        mixing: α, in (0, 1].
        statistics, schedule: As in ``WCIPosterior``.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=RWP(0.01)).extra_passes()
        (1.0, 1.0)
    """

    sigma: float = 0.01
    mixing: float = 0.5
    statistics: Literal["perturbed", "clean"] = "perturbed"
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)
    default_layers: ClassVar[str] = "all"

    def __post_init__(self) -> None:
        check_positive("RWP", sigma=self.sigma, mixing=self.mixing)
        if self.mixing > 1:
            raise ValueError(f"RWP.mixing: got {self.mixing}; expected at most 1, the share of the perturbed gradient.")

    def combination(self, factor: float = 1.0) -> Combination:
        """Mix the gradients at W and W + u."""
        return Combination(1 - self.mixing, self.mixing)

    def draw(self, passes: "Passes", factor: float) -> list[Tensor]:
        """Return (5)."""
        noise = passes.gaussian()
        return [n * (factor * self.sigma) * filter_norms(t) for n, t in zip(noise, passes.layers.tensors, strict=True)]


def filter_norms(t: Tensor) -> Tensor:
    """Return the norms of a tensor's rows, shaped to broadcast; one norm for a vector or scalar."""
    t = t.detach()
    if t.ndim <= 1:
        return t.norm()
    return t.flatten(1).norm(dim=1).reshape(-1, *[1] * (t.ndim - 1))


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
    return torch.where(is_known, a / counted.clamp_min(TINY).sqrt(), uniform), is_known


def norm_coefficients(a: Tensor, t: Tensor) -> Tensor:
    """Return ``sqrt(t_l / a_l)`` [L], the gradient of sqrt(a t) with respect to W_l over W_l; no floor, 0 for t <= 0 or NaN."""
    return torch.where(t > 0, (t / a.clamp_min(TINY)).sqrt(), 0.0) * (a > 0)


TINY = 1e-30


def check_positive(where: str, **values: float | None) -> None:
    """Refuse strengths that are zero, negative or not finite (leave the rule out to switch it off)."""
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(
                f"{where}.{name}: got {value}; expected a number > 0. To switch it off pass perturbation=None."
            )
