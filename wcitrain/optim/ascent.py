"""Weight perturbations along the gradient: SAM and its family, AWP, the worst case within the WCI posterior.

Legend: g gradient of the loss at W, at fixed adversarial examples; u perturbation; d_l = numel(W_l); σ_l the
posterior's standard deviation (`random_directions`).

A rule steps on g(W + u), unless it says otherwise. The ascent uses the gradient of the micro-batch on its own
process ("m-sharpness", as all published code does).
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.passes import TINY, Passes, Step, carry_nan
from wcitrain.method import NonNegative, Positive, PositiveShare, method, setting
from wcitrain.optim.perturbation import ALWAYS, Combination, LastPass, Schedule, WeightPerturbation, visit
from wcitrain.optim.random_directions import FLOOR, Floor, RelativeSize, WCIPosterior
from wcitrain.params import Layers

Tensors = Sequence[Tensor]
Rho = Annotated[Positive, Field(description="ρ, length of the perturbation over all tensors together.")]


class Ascent(WeightPerturbation):
    """A rule whose direction is made of the gradient at W: ``u = ρ g / ||g||``, unless it says otherwise."""

    rho: float
    cost: ClassVar[str] = "1 forward and 1 backward pass more"
    default_layers = "all"

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return u for gradients ``g`` of the layers' tensors, at ``factor`` of full strength."""
        return along(layers, g, factor * self.rho)

    def gradient(self, passes: Passes, factor: float, last_pass: LastPass | None) -> Step:
        """Ascend along the gradient at W; its own weight, where it has one, is added in that same pass."""
        weights, traces = self.combination(factor), None
        with passes.local():
            loss, g = passes.gradients(weights.here, retain_graph=self.measures_traces)
        if self.measures_traces:
            generator = passes.generator("gauss_newton")
            traces = gauss_newton_samples(loss, passes.layers, generator=generator)[0]
        memory = self.smoothed(g, passes.memory)
        direction = self.displacement(passes.layers, memory or g, factor, passes.traces)
        size = passes.relative_size(direction)
        last_pass = last_pass or self.own_last_pass(passes, g)
        del g  # as large as the weights; most rules have done with it
        steps, _ = visit(passes, direction, weights, last_pass, keep_statistics=True)
        shown, last = carry_nan(loss.total.detach(), sum(step.loss for step in steps)), steps[-1]
        traces = traces if last.traces is None else last.traces
        return Step(shown, traces, None, size, last.strength, memory)

    def smoothed(self, g: list[Tensor], memory: Tensors | None) -> list[Tensor] | None:
        """Return the smoothed gradient to ascend along and to carry on, for a rule that has one."""
        return None

    def own_last_pass(self, passes: Passes, g: list[Tensor]) -> LastPass | None:
        """Return what the rule does at W + u instead of a plain pass, if anything; ``g`` is that at W."""
        return None

    def extra_passes(self) -> tuple[int, int]:
        """Return a pass for each point beside the last one, and one backward for traces."""
        moved = 1 + (self.combination().minus != 0)
        return moved, moved + self.measures_traces


@method
class SAM(Ascent):
    """Sharpness-aware minimization: step on the gradient at the worst point nearby.

    u = ρ g / ||g||,    ρ = 0.05 in the paper on CIFAR-10                                              (1)
    """

    rho: Rho = 0.05
    schedule: Schedule = ALWAYS
    label = "SAM ρ={rho:g}"
    source = "Foret et al., arXiv 2010.01412, eq. 2"


@method
class ASAM(Ascent):
    """Adaptive SAM: a radius in units of every weight's own size.

        u = ρ T² g / ||T g||,    T = |W| + η elementwise, 1 for biases                                     (2)

    As in the authors' code T is 1 for every tensor not named "weight"; the unofficial code has T = |W|.
    """

    rho: Positive = setting(0.5, "ρ, length of the perturbation in units of each weight.")
    eta: NonNegative = setting(0.01, "η, added to the size of each weight.")
    schedule: Schedule = ALWAYS
    label = "ASAM ρ={rho:g}"
    source = "Kwon et al., arXiv 2102.11600, eq. 9"

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (2)."""
        named = zip(layers.names, layers.tensors, strict=True)
        sizes = ((w.detach().abs(), n.endswith("weight")) for n, w in named)
        scales = [size + self.eta if is_weight else torch.ones_like(size) for size, is_weight in sizes]
        scaled = [t * x for t, x in zip(scales, g, strict=True)]
        scale = _over(factor * self.rho, layers.dots(scaled, scaled).sum().sqrt())
        return [t * x * scale.to(x.dtype) for t, x in zip(scales, scaled, strict=True)]


@method
class AWP(Ascent):
    """Adversarial weight perturbation: one ascent step, each layer in proportion to its norm.

        u_l = γ ||W_l|| g_l / ||g_l||,   update with the gradient at W + u, applied at W.                  (3)

    The authors' code updates running statistics at W + u. The paper has γ = 0.005 for TRADES.
    """

    gamma: Positive = setting(0.01, "γ, perturbation norm over each layer's norm.")
    schedule: Schedule = ALWAYS
    label = "AWP γ={gamma:g}"
    source = "Wu, Xia & Wang, arXiv 2004.05884, eq. 9 to 12"
    default_layers = "weights"

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (3)."""
        return by_layer(layers, g, factor * self.gamma * layers.squared_norms().sqrt())


@method
class WCIAdversary(Ascent):
    """The worst case within the radii of the WCI posterior: AWP with shares from the index.

        u_l = sqrt(d_l) σ_l g_l / ||g_l||,    σ_l² = λ s_l as in `WCIPosterior`,    ||u|| = r ||W||        (4)

    The traces come from one Gauss–Newton draw a step on the outputs of the pass at W. A gradient direction
    hurts far more than a random one: start at AWP's sizes, not at the posterior's.
    """

    relative_size: RelativeSize = 0.01
    floor: Floor = FLOOR
    schedule: Schedule = ALWAYS
    label = "worst-case WCI r={relative_size:g}"
    source = "this project, on the index of Xu & Zhang, arXiv 2410.07719"
    cost = "1 forward and 2 backward passes more"
    default_layers = "weights"
    measures_traces = True

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (4)."""
        d = layers.sizes()
        posterior = WCIPosterior(self.relative_size, floor=self.floor, cap=None, size_of="network")
        sigma = posterior.posterior(layers.squared_norms(), d, traces, factor).sigma
        return by_layer(layers, g, d.sqrt() * sigma)


@method
class VaSSO(Ascent):
    """Variance-suppressed SAM: the ascent follows a smoothed gradient.

        m_t = (1 − θ) m_{t−1} + θ g_t,   m_0 = 0,    u = ρ m_t / ||m_t||                                   (5)

    Micro-batches and processes each ascend along their own m_t; what is kept is the mean.
    """

    rho: Rho = 0.05
    theta: PositiveShare = setting(0.4, "θ, weight of the newest gradient; 1 is SAM.")
    schedule: Schedule = ALWAYS
    label = "VaSSO ρ={rho:g} θ={theta:g}"
    source = "Li & Giannakis, arXiv 2309.15639"
    has_memory = True

    def smoothed(self, g: list[Tensor], memory: Tensors | None) -> list[Tensor] | None:
        """Return m_t."""
        past = memory or [torch.zeros_like(x) for x in g]
        return [(1 - self.theta) * m + self.theta * x for m, x in zip(past, g, strict=True)]


@method
class GradientNorm(Ascent):
    """A penalty on the gradient's norm, L + λ ||g||, to first order in r.

        ∇(L + λ ||g||) = g + λ H g / ||g|| ≈ (1 − α) g(W) + α g(W + r g/||g||),    α = λ / r               (6)

    The default is α = 0.8; λ = r is SAM.
    """

    strength: Positive = setting(0.04, "λ, weight of the gradient's norm in the loss.")
    radius: Positive = setting(0.05, "r, length of the finite difference.")
    schedule: Schedule = setting(ALWAYS, "When it acts; the ramp scales λ, r stays.")
    label = "gradient norm {strength:g}"
    source = "Zhao, Zhang & Hu, arXiv 2202.03599"

    def combination(self, factor: float = 1.0) -> Combination:
        """Return (6)."""
        alpha = factor * self.strength / self.radius
        return Combination(1 - alpha, alpha)

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return r g / ||g||."""
        return along(layers, g, self.radius)


@method
class GSAM(Ascent):
    """Surrogate-gap guided SAM: narrow the gap between the perturbed loss and the plain one.

        u = ρ g / ||g||,   h = g(W + u),   step on  h − α g_⊥,   g_⊥ = g − (<g, h> / ||h||²) h             (7)

    The step decreases the perturbed loss and, orthogonally to that, *increases* the plain one.
    """

    rho: Rho = 0.05
    alpha: Positive = setting(0.2, "α, weight of the orthogonal part.")
    schedule: Schedule = ALWAYS
    label = "GSAM ρ={rho:g} α={alpha:g}"
    source = "Zhuang et al., arXiv 2203.08065, algorithm 1"
    cost = "1 forward and 1 backward pass more, among several processes 2 backward"

    def combination(self, factor: float = 1.0) -> Combination:
        """Return the weight of g; `own_last_pass` weighs h."""
        return Combination(-self.alpha, 1.0)

    def own_last_pass(self, passes: Passes, g: list[Tensor]) -> LastPass:
        """Add h with its weight 1 + α <g, h> / ||h||² in (7)."""

        def weight(h: list[Tensor]) -> Tensor:
            length = passes.layers.dots(h, h).sum()
            return 1 + self.alpha * passes.layers.dots(h, g).sum() / length.clamp_min(TINY)

        return lambda: Step(passes.plain_weighed(weight))


@method
class CRSAM(Ascent):
    """Curvature-regularized SAM, in the form of its published code.

        u = ρ g / ||g||,   step on  g(W+u) + α [g(W+u) + g(W−u) − 2 g(W)] + β [g(W+u) − g(W−u)]            (8)

    The brackets are the gradients of the second and the first difference of the loss along the gradient, of
    which the paper penalises the logarithms.
    """

    rho: Rho = 0.1
    alpha: Positive = setting(0.1, "α, weight of the second difference.")
    beta: Positive = setting(0.01, "β, weight of the first difference.")
    schedule: Schedule = ALWAYS
    label = "CR-SAM ρ={rho:g}"
    source = "Wu, Luo & Wunsch, arXiv 2312.13555"
    cost = "2 forward and 2 backward passes more"

    def combination(self, factor: float = 1.0) -> Combination:
        """Return (8)."""
        return Combination(-2 * self.alpha, 1 + self.alpha + self.beta, self.alpha - self.beta)


def along(layers: Layers, g: Tensors, length: float) -> list[Tensor]:
    """Return ``length · g / ||g||`` over all layers together; zero where g is zero."""
    scale = _over(length, layers.dots(g, g).sum().sqrt())
    return [x * scale.to(x.dtype) for x in g]


def by_layer(layers: Layers, g: Tensors, radii: Tensor) -> list[Tensor]:
    """Return ``radii_l · g_l / ||g_l||`` for every layer; zero where g_l is zero."""
    scales = _over(radii, layers.dots(g, g).sqrt())
    return [x * s for x, s in zip(g, layers.spread(scales), strict=True)]


def _over(value: Tensor | float, length: Tensor) -> Tensor:
    return torch.where(length > 0, value / length.clamp_min(TINY), 0.0)
