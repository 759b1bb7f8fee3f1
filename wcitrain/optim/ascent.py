"""Weight perturbations along the gradient: SAM and its family, AWP, and the worst case within the WCI posterior's radii.

Legend: g gradient of the loss at W, at fixed adversarial examples; u perturbation; a_l = ||W_l||_F²; σ_l the posterior's
standard deviation (`perturbation`); d_l = numel(W_l).

| class          | u                          | gradient stepped on                                          | passes |
|----------------|----------------------------|--------------------------------------------------------------|--------|
| `SAM`          | ρ g / ||g||                | g(W + u)                                                     | +1, +1 |
| `ASAM`         | ρ T²g / ||T g||, T = |W|+η | g(W + u)                                                     | +1, +1 |
| `AWP`          | γ ||W_l|| g_l / ||g_l||    | g(W + u)                                                     | +1, +1 |
| `VaSSO`        | ρ m / ||m||, m smoothed g  | g(W + u)                                                     | +1, +1 |
| `WCIAdversary` | sqrt(d_l) σ_l g_l / ||g_l||| g(W + u)                                                     | +1, +2 |
| `GradientNorm` | r g / ||g||                | (1 − α) g(W) + α g(W + u), α = λ / r                         | +1, +1 |
| `GSAM`         | ρ g / ||g||                | g(W + u) − α [g(W) − its part along g(W + u)]                | +1, +1 |
| `CRSAM`        | ρ g / ||g||                | g(W+u) + α [g(W+u) + g(W−u) − 2 g(W)] + β [g(W+u) − g(W−u)]  | +2, +2 |

(Extra passes: forward, backward; GSAM takes one more backward among several processes, see ``Passes.plain_weighed``.)
The ascent uses the gradient of the micro-batch on its own process ("m-sharpness", as all published code does). Running
statistics move in the pass at W only; weight decay acts on W. The gradient of all trainable tensors moves them all
(biases and normalisation too), except for AWP and WCIAdversary, which are published or defined on weight matrices; the
wrapper's ``layers`` changes that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from wcitrain.optim.perturbation import (
    FLOOR,
    TINY,
    Combination,
    WCIPosterior,
    WeightPerturbation,
    check_positive,
)
from wcitrain.optim.schedule import StrengthSchedule
from wcitrain.params import Layers


class Ascent(WeightPerturbation):
    """A rule whose direction is made of the gradient at W."""

    default_layers: ClassVar[str] = "all"
    smoothing: float | None = None  # θ of a moving average of the gradients; None: the gradient itself

    def combination(self, factor: float = 1.0) -> Combination:
        """Take the gradient at W + u."""
        return Combination()

    def displacement(self, layers: Layers, g: Sequence[Tensor], factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return u for gradients ``g`` of the layers' tensors, at ``factor`` of full strength."""
        raise NotImplementedError


@dataclass(frozen=True)
class SAM(Ascent):
    """Sharpness-aware minimization (Foret et al., arXiv 2010.01412, eq. 2): the gradient at the worst point nearby.

        u = ρ g / ||g||                                                                                         (1)

    Args:
        rho: ρ, length of u over all perturbed tensors together; 0.05 in the paper on CIFAR-10.
        schedule: When it acts; the ramp scales ρ.

    Example:
        >>> from wcitrain import RegularizedOptimizer, cross_entropy
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=SAM(0.05))
        >>> loss = optimizer.step(lambda: cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0])))
        >>> optimizer.extra_passes()
        (1.0, 1.0)
    """

    rho: float = 0.05
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        check_positive("SAM", rho=self.rho)

    def displacement(self, layers: Layers, g: Sequence[Tensor], factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (1)."""
        return along(layers, g, factor * self.rho)


@dataclass(frozen=True)
class ASAM(Ascent):
    """Adaptive SAM (Kwon et al., arXiv 2102.11600, eq. 9): a radius in units of every weight's own size.

        u = ρ T² g / ||T g||,    T = |W| + η elementwise, 1 for biases                                          (2)

    so ||T⁻¹ u|| = ρ, which is invariant under rescaling of weights for η = 0. As in the authors' code T is 1 for every tensor
    whose name does not end in "weight"; the widespread unofficial code has T = |W| for all.

    Args:
        rho: ρ; 0.5 in the paper on CIFAR-10.
        eta: η >= 0; 0.01 in the paper.
        schedule: When it acts; the ramp scales ρ.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=ASAM(0.5)).extra_passes()
        (1.0, 1.0)
    """

    rho: float = 0.5
    eta: float = 0.01
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        check_positive("ASAM", rho=self.rho)
        if not 0 <= self.eta < float("inf"):
            raise ValueError(f"ASAM.eta: got {self.eta}; expected a number >= 0. 0.01 is the paper's.")

    def displacement(self, layers: Layers, g: Sequence[Tensor], factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (2)."""
        scales = [
            w.detach().abs() + self.eta if name.endswith("weight") else torch.ones_like(w)
            for name, w in zip(layers.names, layers.tensors, strict=True)
        ]
        scaled = [t * x for t, x in zip(scales, g, strict=True)]
        length = layers.dots(scaled, scaled).sum().sqrt()
        scale = _over(factor * self.rho, length)
        return [t * x * scale.to(x.dtype) for t, x in zip(scales, scaled, strict=True)]


@dataclass(frozen=True)
class AWP(Ascent):
    """Adversarial weight perturbation (Wu, Xia, Wang, arXiv 2004.05884, eq. 9–12, one ascent step).

        u_l = γ ||W_l|| g_l / ||g_l||,   update with the gradient at W + u, applied at W.                        (3)

    g is the gradient of the same loss at the same adversarial examples. Running statistics are updated in the pass at W
    (the authors' code updates them at W + u; with γ = 0.01 the two agree closely), and weight decay acts on W, not on W + u.

    Args:
        gamma: γ, relative radius of every layer; in the paper 0.01 for adversarial training, 0.005 for TRADES.
        schedule: When it acts; the ramp scales γ.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=AWP(0.01)).extra_passes()
        (1.0, 1.0)
    """

    gamma: float = 0.01
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)
    default_layers: ClassVar[str] = "weights"

    def __post_init__(self) -> None:
        check_positive("AWP", gamma=self.gamma)

    def displacement(self, layers: Layers, g: Sequence[Tensor], factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (3)."""
        return by_layer(layers, g, factor * self.gamma * layers.squared_norms().sqrt())


@dataclass(frozen=True)
class WCIAdversary(Ascent):
    """The worst case within the radii of the WCI posterior: AWP with shares that the Weight-Curvature Index makes optimal.

        u_l = sqrt(d_l) σ_l g_l / ||g_l||,    σ_l² = λ s_l as in `WCIPosterior`,    ||u|| = r ||W||              (4)

    The radii are the root mean square lengths of the posterior's draws, the direction is adversarial instead of random. The
    traces in s_l come from one Gauss–Newton draw on the outputs of the pass at W (one backward more), averaged over steps.

    Args:
        relative_size: r. A gradient direction hurts far more than a random one: start at AWP's sizes (0.01), not at the
            posterior's (1).
        floor: As in `WCIPosterior`.
        schedule: When it acts; the ramp scales r.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=WCIAdversary(0.01)).extra_passes()
        (1.0, 2.0)
    """

    relative_size: float = 0.01
    floor: float = FLOOR
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)
    default_layers: ClassVar[str] = "weights"
    measures_traces: ClassVar[bool] = True  # by Gauss–Newton on the outputs of the pass at W, one more backward

    def __post_init__(self) -> None:
        check_positive("WCIAdversary", relative_size=self.relative_size, floor=self.floor)

    def displacement(self, layers: Layers, g: Sequence[Tensor], factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (4)."""
        d = layers.sizes()
        posterior = WCIPosterior(self.relative_size, floor=self.floor).posterior(
            layers.squared_norms(), d, traces, factor
        )
        return by_layer(layers, g, d.sqrt() * posterior.sigma)


@dataclass(frozen=True)
class VaSSO(Ascent):
    """Variance-suppressed sharpness-aware optimization (Li, Giannakis, arXiv 2309.15639): SAM along a smoothed gradient.

        m_t = (1 − θ) m_{t−1} + θ g_t,   m_0 = 0,    u = ρ m_t / ||m_t||                                        (5)

    m is part of the optimizer's state (one copy of the perturbed tensors). Micro-batches and processes each ascend along
    their own m_t; what is kept is the mean.

    Args:
        rho: ρ, length of u.
        theta: θ, in (0, 1]; 1 is SAM.
        schedule: When it acts; m stands still while it does not.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=VaSSO(0.05)).extra_passes()
        (1.0, 1.0)
    """

    rho: float = 0.05
    theta: float = 0.4
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        check_positive("VaSSO", rho=self.rho, theta=self.theta)
        if self.theta > 1:
            raise ValueError(f"VaSSO.theta: got {self.theta}; expected at most 1. 1 is SAM.")

    @property
    def smoothing(self) -> float:  # type: ignore[override]
        """Return θ."""
        return self.theta

    def displacement(self, layers: Layers, g: Sequence[Tensor], factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (5); ``g`` is m."""
        return along(layers, g, factor * self.rho)


@dataclass(frozen=True)
class GradientNorm(Ascent):
    """Gradient-norm penalty (Zhao, Zhang, Hu, arXiv 2202.03599): L + λ ||g|| to first order in r.

        ∇(L + λ ||g||) = g + λ H g / ||g|| ≈ (1 − α) g(W) + α g(W + r g/||g||),    α = λ / r                      (6)

    Args:
        strength: λ; the default is α = 0.8 at r = 0.05. λ = r is SAM.
        radius: r, length of the finite difference.
        schedule: When it acts; the ramp scales λ (r stays).

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=GradientNorm(0.04)).extra_passes()
        (1.0, 1.0)
    """

    strength: float = 0.04
    radius: float = 0.05
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        check_positive("GradientNorm", strength=self.strength, radius=self.radius)

    def combination(self, factor: float = 1.0) -> Combination:
        """Return (6)."""
        alpha = factor * self.strength / self.radius
        return Combination(1 - alpha, alpha)

    def displacement(self, layers: Layers, g: Sequence[Tensor], factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return r g / ||g||."""
        return along(layers, g, self.radius)


@dataclass(frozen=True)
class GSAM(Ascent):
    """Surrogate-gap guided SAM (Zhuang et al., arXiv 2203.08065, algorithm 1).

        u = ρ g / ||g||,   h = g(W + u),   step on  h − α g_⊥,   g_⊥ = g − (<g, h> / ||h||²) h                    (7)

    The step decreases the perturbed loss and, orthogonally to that, *increases* the plain one, which narrows the gap
    between them. The ascent is undone before the step (the widespread implementation leaves the weights perturbed). Inner
    products are over the perturbed tensors of one micro-batch on one process. ρ is constant here; the authors tie it to the
    learning rate.

    Args:
        rho: ρ, length of u.
        alpha: α, weight of the orthogonal part.
        schedule: When it acts; the ramp scales ρ.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=GSAM(0.05)).extra_passes()
        (1.0, 1.0)
    """

    rho: float = 0.05
    alpha: float = 0.2
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        check_positive("GSAM", rho=self.rho, alpha=self.alpha)

    def combination(self, factor: float = 1.0) -> Combination:
        """Return the weight of g; that of h is known once h is (`weight_there`)."""
        return Combination(-self.alpha, 1.0)

    def weight_there(self, layers: Layers, here: Sequence[Tensor], there: Sequence[Tensor]) -> float:
        """Return 1 + α <g, h> / ||h||², the weight of h in (7)."""
        length = layers.dots(there, there).sum()
        return float(1 + self.alpha * layers.dots(there, here).sum() / length.clamp_min(TINY))

    def displacement(self, layers: Layers, g: Sequence[Tensor], factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return ρ g / ||g||."""
        return along(layers, g, factor * self.rho)


@dataclass(frozen=True)
class CRSAM(Ascent):
    """Curvature-regularized SAM (Wu, Luo, Wunsch, arXiv 2312.13555), in the form of its published code.

        u = ρ g / ||g||,   step on  g(W+u) + α [g(W+u) + g(W−u) − 2 g(W)] + β [g(W+u) − g(W−u)]                   (8)

    The brackets are the gradients of the second and of the first difference of the loss along the *gradient* (no random
    direction, so it is not a trace). The paper penalises the logarithms of the two, whose gradients divide the brackets by
    the differences themselves; its code does not, and neither does this, since a second difference may be zero or negative.

    Args:
        rho: ρ; 0.1 in the paper.
        alpha, beta: α and β; 0.1 and 0.01 in the paper.
        schedule: When it acts; the ramp scales ρ.

    Example:
        >>> from wcitrain import RegularizedOptimizer
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> RegularizedOptimizer(base, model, perturbation=CRSAM()).extra_passes()
        (2.0, 2.0)
    """

    rho: float = 0.1
    alpha: float = 0.1
    beta: float = 0.01
    schedule: StrengthSchedule = field(default_factory=StrengthSchedule)

    def __post_init__(self) -> None:
        check_positive("CRSAM", rho=self.rho, alpha=self.alpha, beta=self.beta)

    def combination(self, factor: float = 1.0) -> Combination:
        """Return (8)."""
        return Combination(-2 * self.alpha, 1 + self.alpha + self.beta, self.alpha - self.beta)

    def displacement(self, layers: Layers, g: Sequence[Tensor], factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return ρ g / ||g||."""
        return along(layers, g, factor * self.rho)


def along(layers: Layers, g: Sequence[Tensor], length: float) -> list[Tensor]:
    """Return ``length · g / ||g||`` over all layers together; zero where g is zero."""
    scale = _over(length, layers.dots(g, g).sum().sqrt())
    return [x * scale.to(x.dtype) for x in g]


def by_layer(layers: Layers, g: Sequence[Tensor], radii: Tensor) -> list[Tensor]:
    """Return ``radii_l · g_l / ||g_l||`` for every layer; zero where g_l is zero."""
    scales = _over(radii, layers.dots(g, g).sqrt())
    return [x * s for x, s in zip(g, layers.spread(scales), strict=True)]


def _over(value: Tensor | float, length: Tensor) -> Tensor:
    return torch.where(length > 0, value / length.clamp_min(TINY), 0.0)
