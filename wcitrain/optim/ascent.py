"""Weight perturbations along the gradient: SAM and its family, AWP, the worst case within the WCI posterior.

Legend: g gradient of the loss at W, at fixed adversarial examples; u perturbation; d_l = numel(W_l); σ_l the
posterior's standard deviation (`random_directions`).

A rule steps on g(W + u), for one forward and one backward pass more, unless it says otherwise. The ascent
uses the gradient of the micro-batch on its own process ("m-sharpness", as all published code does). Running
statistics move in the pass at W only; weight decay acts on W. All trainable tensors move, biases and
normalisation too, except under AWP and WCIAdversary, defined on weight matrices; the wrapper's ``layers``
changes that.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.passes import Captured, Passes, Step, carry_nan
from wcitrain.method import NonNegative, Positive, PositiveShare, method
from wcitrain.optim.perturbation import (
    TINY,
    Combination,
    LastPass,
    Schedule,
    State,
    WeightPerturbation,
    moved_passes,
    relative_size,
)
from wcitrain.optim.random_directions import FLOOR, Floor, RelativeSize, WCIPosterior
from wcitrain.optim.schedule import ALWAYS
from wcitrain.params import Layers

Tensors = Sequence[Tensor]
Rho = Annotated[Positive, Field(description="ρ, length of the perturbation over all tensors together.")]


class Ascent(WeightPerturbation):
    """A rule whose direction is made of the gradient at W: ``u = ρ g / ||g||``, unless it says otherwise."""

    rho: float
    default_layers: ClassVar[str] = "all"

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return u for gradients ``g`` of the layers' tensors, at ``factor`` of full strength."""
        return along(layers, g, factor * self.rho)

    def gradient(self, passes: Passes, state: State, factor: float, last_pass: LastPass | None) -> Step:
        """Ascend along the gradient at W; its own weight, where it has one, is added in that same pass."""
        weights = self.combination(factor)
        with passes.local():
            loss, g, traces = self._at_the_weights(passes, weights.here)
        smoothed = self.smoothed(g, state.memory)
        direction = self.displacement(passes.layers, smoothed or g, factor, state.traces)
        size = relative_size(passes, direction)
        last_pass = last_pass or self.own_last_pass(passes, g)
        steps, _ = moved_passes(passes, direction, weights, last_pass, keep_statistics=True)
        shown, last = carry_nan(loss, sum(step.loss for step in steps)), steps[-1]
        return Step(shown, traces if last.traces is None else last.traces, size, last.strength, smoothed)

    def _at_the_weights(self, passes: Passes, weight: float) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Return loss, gradient and, if measured, traces at W; a gradient with a weight goes to ``.grad``."""
        if weight:
            with Captured(passes.layers, weight * passes.share) as captured:
                loss = passes.plain(weight)
            return loss, passes.filled(captured.gradients), None
        evaluated = passes.evaluate()
        g = passes.filled(passes.layer_gradients(evaluated.total, retain_graph=self.measures_traces))
        traces = None
        if self.measures_traces:
            generator = passes.generator("gauss_newton")
            traces = gauss_newton_samples(evaluated, passes.layers, generator=generator).mean(0)
        return evaluated.total.detach(), g, traces

    def smoothed(self, g: list[Tensor], memory: Tensors | None) -> list[Tensor] | None:
        """Return the smoothed gradient to ascend along and to carry on, for a rule that has one."""
        return None

    def own_last_pass(self, passes: Passes, g: list[Tensor]) -> LastPass | None:
        """Return what the rule does at W + u instead of a plain pass, if anything; ``g`` is that at W."""
        return None

    def extra_passes(self, model: nn.Module) -> tuple[int, int]:
        """Return a pass for each point beside the last one, and one backward for traces."""
        moved = 1 + (self.combination().minus != 0)
        return moved, moved + self.measures_traces


@method
class SAM(Ascent):
    """Sharpness-aware minimization (Foret et al., arXiv 2010.01412, eq. 2): g at the worst point nearby.

        u = ρ g / ||g||,    ρ = 0.05 in the paper on CIFAR-10                                              (1)

    Example:
        >>> from wcitrain import RegularizedOptimizer, cross_entropy
        >>> model = torch.nn.Linear(2, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = RegularizedOptimizer(base, model, perturbation=SAM(0.05))
        >>> loss = optimizer.step(lambda: cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0])))
        >>> optimizer.extra_passes()
        (1.0, 1.0)
    """

    rho: Rho = 0.05
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "SAM ρ={rho:g}"


@method
class ASAM(Ascent):
    """Adaptive SAM (Kwon et al., arXiv 2102.11600, eq. 9): a radius in units of every weight's own size.

        u = ρ T² g / ||T g||,    T = |W| + η elementwise, 1 for biases                                     (2)

    so ||T⁻¹ u|| = ρ, which is invariant under rescaling of weights for η = 0. As in the authors' code T is 1
    for every tensor not named "weight"; the widespread unofficial code has T = |W|. ρ and η are the paper's.
    """

    rho: Positive = Field(default=0.5, description="ρ, length of the perturbation in units of each weight.")
    eta: NonNegative = Field(default=0.01, description="η, added to the size of each weight.")
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "ASAM ρ={rho:g}"

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (2)."""
        scales = [
            w.detach().abs() + self.eta if name.endswith("weight") else torch.ones_like(w)
            for name, w in zip(layers.names, layers.tensors, strict=True)
        ]
        scaled = [t * x for t, x in zip(scales, g, strict=True)]
        scale = _over(factor * self.rho, layers.dots(scaled, scaled).sum().sqrt())
        return [t * x * scale.to(x.dtype) for t, x in zip(scales, scaled, strict=True)]


@method
class AWP(Ascent):
    """Adversarial weight perturbation (Wu, Xia, Wang, arXiv 2004.05884, eq. 9 to 12, one ascent step).

        u_l = γ ||W_l|| g_l / ||g_l||,   update with the gradient at W + u, applied at W.                  (3)

    The authors' code updates running statistics at W + u; with γ = 0.01 the two agree closely. The paper has
    γ = 0.01 for adversarial training and 0.005 for TRADES.
    """

    gamma: Positive = Field(default=0.01, description="γ, perturbation norm over each layer's norm.")
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "AWP γ={gamma:g}"
    default_layers: ClassVar[str] = "weights"

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (3)."""
        return by_layer(layers, g, factor * self.gamma * layers.squared_norms().sqrt())


@method
class WCIAdversary(Ascent):
    """The worst case within the radii of the WCI posterior: AWP with shares from the index.

        u_l = sqrt(d_l) σ_l g_l / ||g_l||,    σ_l² = λ s_l as in `WCIPosterior`,    ||u|| = r ||W||        (4)

    The radii are the root mean square lengths of the posterior's draws. The traces in s_l come from one
    Gauss–Newton draw a step on the outputs of the pass at W (one backward more). A gradient direction hurts
    far more than a random one: start at AWP's sizes, not at the posterior's.
    """

    relative_size: RelativeSize = 0.01
    floor: Floor = FLOOR
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "worst-case WCI r={relative_size:g}"
    default_layers: ClassVar[str] = "weights"
    measures_traces: ClassVar[bool] = True

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return (4)."""
        d, posterior = layers.sizes(), WCIPosterior(self.relative_size, floor=self.floor)
        sigma = posterior.posterior(layers.squared_norms(), d, traces, factor).sigma
        return by_layer(layers, g, d.sqrt() * sigma)


@method
class VaSSO(Ascent):
    """Variance-suppressed SAM (Li, Giannakis, arXiv 2309.15639): along a smoothed gradient.

        m_t = (1 − θ) m_{t−1} + θ g_t,   m_0 = 0,    u = ρ m_t / ||m_t||                                   (5)

    m is part of the optimizer's state (one copy of the perturbed tensors) and stands still while the rule
    does not act. Micro-batches and processes each ascend along their own m_t; what is kept is the mean.
    """

    rho: Rho = 0.05
    theta: PositiveShare = Field(default=0.4, description="θ, weight of the newest gradient; 1 is SAM.")
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "VaSSO ρ={rho:g} θ={theta:g}"

    def smoothed(self, g: list[Tensor], memory: Tensors | None) -> list[Tensor] | None:
        """Return m_t."""
        past = memory or [torch.zeros_like(x) for x in g]
        return [(1 - self.theta) * m + self.theta * x for m, x in zip(past, g, strict=True)]


@method
class GradientNorm(Ascent):
    """Gradient-norm penalty (Zhao, Zhang, Hu, arXiv 2202.03599): L + λ ||g|| to first order in r.

        ∇(L + λ ||g||) = g + λ H g / ||g|| ≈ (1 − α) g(W) + α g(W + r g/||g||),    α = λ / r               (6)

    The default is α = 0.8; λ = r is SAM.
    """

    strength: Positive = Field(default=0.04, description="λ, weight of the gradient's norm in the loss.")
    radius: Positive = Field(default=0.05, description="r, length of the finite difference.")
    schedule: Schedule = Field(default=ALWAYS, description="When it acts; the ramp scales λ, r stays.")
    label: ClassVar[str] = "gradient norm {strength:g}"

    def combination(self, factor: float = 1.0) -> Combination:
        """Return (6)."""
        alpha = factor * self.strength / self.radius
        return Combination(1 - alpha, alpha)

    def displacement(self, layers: Layers, g: Tensors, factor: float, traces: Tensor | None) -> list[Tensor]:
        """Return r g / ||g||."""
        return along(layers, g, self.radius)


@method
class GSAM(Ascent):
    """Surrogate-gap guided SAM (Zhuang et al., arXiv 2203.08065, algorithm 1).

        u = ρ g / ||g||,   h = g(W + u),   step on  h − α g_⊥,   g_⊥ = g − (<g, h> / ||h||²) h             (7)

    The step decreases the perturbed loss and, orthogonally to that, *increases* the plain one, which narrows
    the gap between them. The widespread implementation leaves the weights perturbed; here the ascent is
    undone. Inner products are over one micro-batch on one process. The authors tie ρ to the learning rate.
    Among several processes one more backward pass.
    """

    rho: Rho = 0.05
    alpha: Positive = Field(default=0.2, description="α, weight of the orthogonal part.")
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "GSAM ρ={rho:g} α={alpha:g}"

    def combination(self, factor: float = 1.0) -> Combination:
        """Return the weight of g; `own_last_pass` weighs h."""
        return Combination(-self.alpha, 1.0)

    def own_last_pass(self, passes: Passes, g: list[Tensor]) -> LastPass:
        """Add h with its weight 1 + α <g, h> / ||h||² in (7)."""

        def weight(h: list[Tensor]) -> float:
            length = passes.layers.dots(h, h).sum()
            return float(1 + self.alpha * passes.layers.dots(h, g).sum() / length.clamp_min(TINY))

        return lambda: Step(passes.plain_weighed(weight))


@method
class CRSAM(Ascent):
    """Curvature-regularized SAM (Wu, Luo, Wunsch, arXiv 2312.13555), in the form of its published code.

        u = ρ g / ||g||,   step on  g(W+u) + α [g(W+u) + g(W−u) − 2 g(W)] + β [g(W+u) − g(W−u)]            (8)

    The brackets are the gradients of the second and the first difference of the loss along the gradient. The
    paper penalises their logarithms, whose gradients divide the brackets by the differences themselves; its
    code does not, since a second difference may be zero or negative. The defaults are the paper's. Extra
    passes: two of each.
    """

    rho: Rho = 0.1
    alpha: Positive = Field(default=0.1, description="α, weight of the second difference.")
    beta: Positive = Field(default=0.01, description="β, weight of the first difference.")
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "CR-SAM ρ={rho:g}"

    def combination(self, factor: float = 1.0) -> Combination:
        """Return (8)."""
        return Combination(-2 * self.alpha, 1 + self.alpha + self.beta, self.alpha - self.beta)


ASCENTS: dict[str, type[WeightPerturbation]] = {
    "sam": SAM,
    "asam": ASAM,
    "awp": AWP,
    "vasso": VaSSO,
    "gsam": GSAM,
    "gradient_norm": GradientNorm,
    "cr_sam": CRSAM,
    "wci_adversary": WCIAdversary,
}


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
