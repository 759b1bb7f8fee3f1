"""Weight perturbations by random signs: the WCI posterior and uniform noise.

Legend: a_l = ||W_l||_F², d_l = numel(W_l), t_l = Tr(H_l) of the loss at fixed adversarial examples,
q_l = a_l t_l, s_l = sqrt(a_l / t_l), r_l = sqrt(d_l) σ_l / ||W_l|| the relative noise of layer l, λ the
penalty's strength, g(·) gradient. v_l are random signs, u_l = σ_l v_l.

With two passes a rule averages the gradients at W + u and W − u. The pair cancels first-order noise, and its
difference gives the traces for nothing: a Taylor expansion and E[v vᵀ] = I give

    u_lᵀ (g+ − g−)_l / (2 σ_l²)  =  v_lᵀ (H v)_l + ...,       expectation t_l,                             (1)
    ½ (g+ + g−)                  =  ∇[ L + ½ uᵀ H u ] + ...,  expectation ∇[ L + ½ Σ_l σ_l² t_l ],         (2)

exactly on a quadratic loss, up to O(σ²) on a smooth one. On ReLU networks (1) is the curvature of the loss
smoothed over the radius, not Tr(H).

With one pass a step takes g(W + u) alone, and the next one turns the sign of u: an ordinary step at other
weights, which costs no pass. u_lᵀ g_l / σ_l² has the expectation t_l too. Its noise is about ||g_l|| / σ_l,
from the first-order term, of which two steps cancel what their gradients at W have in common. All micro-
batches and processes of a step share u, so they equal one large batch. The estimator is that of IVON (Shen
et al., arXiv 2402.17641), a number a layer in place of one a weight.

``center: initial`` puts W − W⁰ for W in all norms, W⁰ being the weights before training (random ones too, as
of a new head: they do not depend on the data either). With prior N(W⁰, σ_l²) and posterior N(W, σ_l²)

    ½ Σ_l σ_l² t_l + λ² KL,    KL = Σ_l a_l / (2 σ_l²),    a_l = ||W_l − W_l⁰||_F²,                        (3)

is least at σ_l² = λ s_l, where it is λ Σ sqrt(q_l): noise is zero at first and grows with the way. r_l and
``cap`` are relative to the way: a fixed r is another λ in every step, a ``strength`` is one bound all along.
At W = W⁰ a trace by (1) is 0/0: none. The next ones come from little noise and have variances of about
(||g_l|| / σ_l)², with two passes by rounding, so each weighs σ_l²: the best linear average, with no 0/0,

    t_l  =  Σ_k w_k σ_k² (u_kᵀ g_k / σ_k²) / Σ_k w_k σ_k²,     w_k = decay^(n−k).                          (4)

Until some trace is positive all r_l are equal. ``traces: gauss_newton`` does not depend on σ_l: for bfloat16,
where small noise is lost in rounding. The index is no longer invariant to the scale of a layer, as W⁰ does
not follow. The gradient of λ sqrt(q_l) has the norm λ sqrt(t_l) however short the way, and is taken as zero
at W⁰: the Frobenius term and `WCIPenalty` hold a layer there whose gradient is smaller, as a group lasso.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.passes import TINY, Passes, Step
from wcitrain.method import Positive, PositiveShare, method, refuse, setting
from wcitrain.optim.perturbation import (
    ALWAYS,
    Centered,
    Combination,
    Displacement,
    LastPass,
    Schedule,
    WeightPerturbation,
    visit,
)
from wcitrain.params import wide

Maybe = Tensor | None
FLOOR = 1e-4  # of penalties and ascents: s_l of a layer is at most 1/sqrt(FLOOR) = 100 times the mean layer's
DEFAULT_SIZE = 0.5
DEFAULT_FLOOR = 0.1  # of the posterior
FIRST_SIZE = 0.1  # relative size of perturbations that measure, before traces turn λ into a size

RelativeSize = Annotated[Positive, Field(description="r, perturbation norm over weight norm.")]
LOWEST = "Lowest norm-curvature product of a layer, as a share of the layers' mean, in (0, 1]."
Floor = Annotated[PositiveShare, Field(description=LOWEST)]
NumPasses = Annotated[
    Literal[1, 2], Field(description="2: average W + u and W − u; 1: W + u alone, u turned every step.")
]
Traces = Annotated[
    Literal["difference", "gauss_newton"],
    Field(description="difference: from the gradients, for nothing; gauss_newton: one backward pass more."),
]
AttackAt = Annotated[
    Literal["perturbed", "weights"] | None,
    Field(description="Weights that the trainer attacks; null: perturbed (W + u) with one pass, else W."),
]


class Posterior(NamedTuple):
    """A layer-wise distribution around the weights."""

    sigma: Tensor  # standard deviation of every element of layer l [L]
    frobenius: Tensor | None  # gradient coefficient of W_l [L]
    strength: Tensor  # λ, NaN where it is not defined
    relative_size: Tensor  # r, as the rule counts it


class Noise(WeightPerturbation):
    """A random rule with one standard deviation a layer: `posterior` says which."""

    cost: ClassVar[str] = "1 forward and 1 backward pass more"
    measures_traces: ClassVar[bool] = True
    is_gaussian: ClassVar[bool] = False  # else signs
    passes: int = 2
    traces: str = "difference"
    attack_at: str | None = None
    frobenius: bool = False

    def __post_init__(self) -> None:
        if self.passes == 2 and self.attack_at == "perturbed":
            text = "got perturbed with passes=2, which has no weights of its own; expected weights"
            refuse("attack_at", f"{text}. Set passes to 1, or leave it out.")
        is_paired = self.passes == 1 and self.traces == "difference"
        vars(self).update(is_paired=is_paired, is_one_pass=is_paired and not self.frobenius)
        vars(self).update(attacks_perturbed=self.passes == 1 and self.attack_at != "weights")

    def combination(self, factor: float = 1.0) -> Combination:
        """Average the antithetic pair, or take one of it."""
        return Combination(0.0, 0.5, 0.5) if self.passes == 2 else Combination()

    def posterior(self, a: Tensor, d: Tensor, t: Maybe, factor: float, is_active: Maybe = None) -> Posterior:
        """Return the posterior for squared norms ``a``, sizes ``d`` and traces ``t`` (if known), all [L].

        No noise where ``is_active`` [L] is False: the layer gets no gradients, see ``record.see``.
        """
        raise NotImplementedError

    def displace(self, passes: Passes, factor: float) -> Displacement:
        """Draw u from the posterior; with one pass once a step."""
        if "drawn" in passes.shared:
            return passes.shared["drawn"]
        a, d = passes.squared_norms(self.center), passes.layers.sizes()
        found, one_pass = self.posterior(a, d, passes.traces, factor, passes.is_active), self.passes == 1
        u, sigma = passes.random_direction(found.sigma, gaussian=self.is_gaussian, antithetic=one_pass)
        weight = None if self.center == "origin" else d * wide(sigma).square()  # ||u_l||²
        drawn = Displacement(u, found.relative_size, sigma, found.strength, found.frobenius, weight)
        return passes.shared.setdefault("drawn", drawn) if one_pass else drawn

    def gradient(self, passes: Passes, factor: float, last_pass: LastPass | None) -> Step:
        """Draw u, take the gradient there or the pair's mean, and the traces."""
        weights, drawn = self.combination(factor), self.displace(passes, factor)
        by_difference = self.traces == "difference"
        last = None if by_difference else partial(_measured_pass, passes, weights.minus or weights.plus)
        given = passes, drawn.u, weights, last
        steps, difference = visit(*given, keep_statistics=False, needs_slopes=by_difference)
        passes.add_norm_gradients(drawn.frobenius, 1.0, self.center)
        step = steps[-1]._replace(loss=torch.stack([step.loss for step in steps]).mean())
        return drawn.noted(step, difference, self.passes)

    def extra_passes(self) -> tuple[int, int]:
        """Return those of the pair, and one backward for Gauss–Newton traces."""
        forward, backward = super().extra_passes()
        return forward, backward + (self.traces == "gauss_newton")


def _measured_pass(passes: Passes, weight: float) -> Step:
    """Make a plain pass, with one Gauss–Newton draw of the traces on its outputs."""
    loss, generator = passes.evaluate(), passes.generator("gauss_newton")
    traces = gauss_newton_samples(loss, passes.layers, generator=generator, retain_graph=True)[0]
    passes.backward(loss.total, weight)
    is_seen = traces != 0
    return Step(loss.total.detach(), torch.where(is_seen, traces, torch.nan), is_seen)


@method
class WCIPosterior(Noise):
    """Train on the loss averaged over the PAC-Bayes optimal posterior: the index as an objective.

        E_u L(W + u) + (λ/2) Σ a_l / s_l  ≈  L + (λ/2) Σ (s_l t_l + a_l / s_l)  =  L + λ Σ sqrt(q_l),      (5)
        σ_l² = λ s_l,    that is    r_l² = λ d_l / sqrt(q_l).                                              (6)

    The last equality of (5) holds at the optimal s_l, which (6) plugs in from a running average of t_l. The
    index is one of a family, all of them invariant to the scale of a layer where the centre is the origin:

        R_p = Σ_l d_l^(1−p) q_l^(p/2),    r_l² = p λ (q_l / d_l²)^(p/2 − 1).                               (7)

    p = 1 is the index, p = 2 noise of the same r in all layers; p > 2 puts more noise into sharp layers. No
    r_l exceeds ``cap``: beyond 1 the layer is noise. λ follows from ``relative_size``, the root mean square
    of r_l over layers, or ||u|| / ||W|| of the whole network (``size_of``); or it is given.

    A layer whose q_l is below ``floor`` times the mean, or negative, counts with that floor; one without any
    estimate with the mean. A layer without weights or gradients gets no noise and is not in the means. Until
    some trace is positive the noise is uniform, and the size of a run by ``strength`` is 0.1. Under bfloat16
    traces from perturbations below about 0.05 are rounding noise: avoid long ramps.
    """

    relative_size: Positive | None = setting(None, "r, noise over weights; null: 0.5 or by strength.")
    strength: Positive | None = setting(None, "λ, weight of R_p in the loss, instead of relative_size.")
    frobenius: bool = setting(False, "Add the gradient λ ∂R_p/∂W at constant traces (p = 1: λ W_l / s_l).")
    floor: Floor = DEFAULT_FLOOR
    schedule: Schedule = ALWAYS
    power: Positive = setting(1.0, "p of the family: 1 the index, 2 uniform noise.")
    cap: Positive | None = setting(1.0, "Largest relative noise of a layer; null: none.")
    size_of: Literal["layers", "network"] = setting("layers", "What r is taken over.")
    passes: NumPasses = 2
    traces: Traces = "difference"
    attack_at: AttackAt = None
    center: Centered = "origin"
    source = "this project, on the index of Xu & Zhang, arXiv 2410.07719; one pass: as IVON, arXiv 2402.17641"
    cost = "1 forward and 1 backward pass more, with one pass none; gauss_newton 1 backward more"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relative_size is not None and self.strength is not None:
            text = f"got {self.strength:g} beside relative_size={self.relative_size:g}; expected one of them."
            refuse("strength", f"{text} Leave one out.")
        size = self.relative_size or (DEFAULT_SIZE if self.strength is None else 0.0)
        if self.cap is not None and size > self.cap:
            text = f"got {size:g} above the cap {self.cap:g}; expected at most that"
            refuse("relative_size", f"{text}. Lower it, or set cap to null.")
        if self.power == 2 and self.floor != DEFAULT_FLOOR:
            text = f"got {self.floor:g} with power=2, where no trace counts; expected none"
            refuse("floor", f"{text}. Leave it out.")

    def __str__(self) -> str:
        size = self.relative_size or DEFAULT_SIZE
        parts = [f"WCI r={size:g}" if self.strength is None else f"WCI λ={self.strength:g}"]
        parts += [f"p={self.power:g}"] * (self.power != 1) + ["+F"] * self.frobenius
        parts += ["from initial"] * (self.center != "origin")
        parts += ["one pass"] * (self.passes == 1) + ["GN"] * (self.traces == "gauss_newton")
        return " ".join(parts + ["of ||W||"] * (self.size_of == "network"))

    def posterior(self, a: Tensor, d: Tensor, t: Maybe, factor: float, is_active: Maybe = None) -> Posterior:
        """Return (7)."""
        is_active = a > 0 if is_active is None else is_active & (a > 0)
        product, is_known = counted_products(a, t, self.floor, is_active)
        shape = torch.where(is_known, (product / d.square()) ** (self.power / 2 - 1), 1.0) * is_active
        weight = (torch.ones_like(a) if self.size_of == "layers" else a) * is_active
        total = weight.sum().clamp_min(TINY)
        cap = torch.inf if self.cap is None else self.cap**2
        size = self.relative_size or (DEFAULT_SIZE if self.strength is None else FIRST_SIZE)
        scale = scale_under_cap(shape, weight, (factor * size) ** 2 * total, cap)
        if self.strength is not None:
            scale = torch.where(is_known, self.power * factor * self.strength, scale)
        squares = (scale * shape).clamp_max(cap)  # r_l²
        frobenius = None
        if self.frobenius and t is not None:
            frobenius = scale * d ** (1 - self.power) * (a * t).clamp_min(0) ** (self.power / 2) / a
            frobenius = torch.where(is_active & (t > 0), frobenius, 0.0)
        sigma, r = (squares * a / d).sqrt(), ((weight * squares).sum() / total).sqrt()
        return Posterior(sigma, frobenius, torch.where(is_known, scale / self.power, torch.nan), r)


@method
class UniformNoise(Noise):
    """Train on the loss averaged over noise of the same relative size in every layer: the control.

    σ_l² = r² a_l / d_l,    (7) of `WCIPosterior` with p = 2 and without a cap                         (8)
    """

    relative_size: RelativeSize = 0.5
    schedule: Schedule = ALWAYS
    passes: NumPasses = 2
    attack_at: AttackAt = None
    center: Centered = "origin"
    source = "this project, as a control"
    cost = "1 forward and 1 backward pass more, with one pass none"

    def __str__(self) -> str:
        start = " from initial" * (self.center != "origin")
        return f"noise r={self.relative_size:g}{start}{' one pass' * (self.passes == 1)}"

    def posterior(self, a: Tensor, d: Tensor, t: Maybe, factor: float, is_active: Maybe = None) -> Posterior:
        """Return (8)."""
        r = a.new_full((), factor * self.relative_size)
        is_active = a > 0 if is_active is None else is_active
        return Posterior(r * (a / d).sqrt() * is_active, None, torch.full_like(r, torch.nan), r)


def counted_products(a: Tensor, t: Tensor | None, floor: float, is_active: Tensor) -> tuple[Tensor, Tensor]:
    """Return q_l [L] > 0 as layers count with it, and whether any trace is positive; else ones."""
    if t is None:
        return torch.ones_like(a), torch.zeros((), dtype=torch.bool, device=a.device)
    product = a * t
    is_measured = torch.isfinite(product) & is_active
    positive = torch.where(is_measured, product, 0.0).clamp_min(0)
    mean = positive.sum() / is_measured.sum().clamp_min(1)
    counted = torch.where(is_measured, positive.clamp_min(floor * mean), mean)
    return torch.where(mean > 0, counted, 1.0).clamp_min(TINY), mean > 0


def scale_under_cap(shape: Tensor, weight: Tensor, total: Tensor, cap: float) -> Tensor:
    """Return c with ``Σ_l weight_l min(c · shape_l, cap) = total``, where ``shape`` [L] >= 0; no sync.

    The largest shapes reach the cap first: c is that of the fewest at the cap with which no other exceeds it.
    """
    shape, order = shape.sort(descending=True)
    weight = weight.gather(0, order)
    mass = (weight * shape).flip(0).cumsum(0).flip(0)  # Σ over the layers below the cap, from each on
    above = weight.cumsum(0) - weight
    left = total - cap * above if cap < torch.inf else total.expand_as(mass)
    scales = left / mass.clamp_min(TINY)
    fits = scales * shape <= cap * (1 + torch.finfo(shape.dtype).eps ** 0.5)  # MPS has float32 alone
    first = fits.to(torch.uint8).argmax().reshape(1)
    return scales.gather(0, first)[0]


def posterior_shape(a: Tensor, d: Tensor, t: Tensor | None, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """Return ``s_l = sqrt(a_l / t_l)`` [L], a floor on ``a_l t_l``, else ``a_l / d_l``; if any t_l > 0."""
    product, is_known = counted_products(a, t, floor, torch.ones_like(a, dtype=torch.bool))
    return torch.where(is_known, a / product.sqrt(), a / d), is_known
