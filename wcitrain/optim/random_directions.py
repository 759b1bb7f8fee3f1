"""Weight perturbations in random directions: the WCI posterior, and noise of other shapes.

Legend: a_l = ||W_l||_F², d_l = numel(W_l), t_l = Tr(H_l) of the loss at fixed adversarial examples,
s_l = sqrt(a_l / t_l), λ the penalty's strength, r the relative size ||u|| / ||W||, w_j the j-th filter (row)
of a tensor.

All but `RWP` average the gradients at W + u and W − u, for one forward and one backward pass more.
"""

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from wcitrain.curvature.passes import Passes, Step, carry_nan
from wcitrain.curvature.two_point import trace_from_slopes
from wcitrain.method import Positive, PositiveShare, method, refuse
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
from wcitrain.optim.schedule import ALWAYS

FLOOR = 1e-4  # σ_l² of a layer is at most 1/sqrt(FLOOR) = 100 times that of the mean layer
FIRST_SIZE = 0.1  # relative size of perturbations that measure, before traces turn λ into a size

STATISTICS = "Where running statistics move: perturbed in the pass at W − u, clean in one more forward at W."
Statistics = Annotated[Literal["perturbed", "clean"], Field(description=STATISTICS)]
RelativeSize = Annotated[Positive, Field(description="r, perturbation norm over weight norm.")]
FLOOR_TEXT = "Lowest norm-curvature product of a layer, as a share of the layers' mean, in (0, 1]."
Floor = Annotated[PositiveShare, Field(description=FLOOR_TEXT)]


class Posterior(NamedTuple):
    """A layer-wise Gaussian-like posterior around the weights, all tensors [L] or scalars."""

    sigma: Tensor  # standard deviation of every element of layer l
    frobenius: Tensor | None  # gradient coefficient of W_l, or None
    strength: Tensor  # λ, NaN where it is not defined
    relative_size: Tensor  # r = sqrt(Σ d_l σ_l² / Σ a_l)


class Noise(WeightPerturbation):
    """A random rule with one standard deviation a layer: `posterior` says which.

    The antithetic pair cancels first-order noise, and its difference gives the traces for nothing.
    """

    statistics: Statistics
    measures_traces: ClassVar[bool] = True
    is_gaussian: ClassVar[bool] = False  # else signs

    def combination(self, factor: float = 1.0) -> Combination:
        """Average the antithetic pair."""
        return Combination(0.0, 0.5, 0.5)

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return the posterior for squared norms ``a``, sizes ``d`` and traces ``t`` (if known), all [L]."""
        raise NotImplementedError

    def gradient(self, passes: Passes, state: State, factor: float, last_pass: LastPass | None) -> Step:
        """Draw u, average the pair, and read the traces off its difference."""
        layers, weights = passes.layers, self.combination(factor)
        posterior = self.posterior(layers.squared_norms(), layers.sizes(), state.traces, factor)
        loss = statistics_pass(passes, self.statistics)
        direction, sigma = passes.random_direction(posterior.sigma, gaussian=self.is_gaussian)
        steps, slopes = moved_passes(
            passes, direction, weights, None, keep_statistics=loss is not None, needs_slopes=True
        )
        mean = torch.stack([step.loss for step in steps]).mean()
        passes.add_norm_gradients(posterior.frobenius)
        traces = trace_from_slopes(slopes[0].values, slopes[1].values, sigma) / (weights.plus * passes.share)
        shown = mean if loss is None else carry_nan(loss, mean)
        return Step(shown, traces, posterior.relative_size, posterior.strength)

    def extra_passes(self, model: nn.Module) -> tuple[int, int]:
        """Return one of each, and one forward for clean statistics."""
        return 1 + (self.statistics == "clean" and has_running_statistics(model)), 1


@method
class WCIPosterior(Noise):
    """Train on the loss averaged over the PAC-Bayes optimal posterior: the index as an objective.

        E_u L(W + u) + (λ/2) Σ a_l / s_l  ≈  L + (λ/2) Σ (s_l t_l + a_l / s_l)  =  L + λ Σ sqrt(a_l t_l),  (1)
        σ_l² = λ s_l,    s_l = sqrt(a_l / t_l),    λ = r² Σ a_l / Σ d_l s_l.                               (2)

    The last equality of (1) holds at the optimal s_l, which is what (2) plugs in, from a running average of
    t_l. Directions are random signs, so the relative size is r exactly. In (2) a layer whose product a_l t_l
    is below ``floor`` times the mean over layers, or negative, counts with that floor: its variance is at
    most 1/sqrt(floor) times that of a layer with the mean product, size and norm. A layer without any
    estimate (no gradient so far) counts with the mean. Until some trace is positive the shares are
    ``UniformNoise``'s, and a run by ``strength`` takes perturbations of relative size ``FIRST_SIZE``. Under
    bfloat16 traces from perturbations smaller than about 0.05 are rounding noise: avoid long ramps.

    Without the second term of (1) only the noise acts, and the weights may grow to escape it where the loss
    is scale-invariant. Between the two ``statistics`` no difference in accuracy was seen (DESIGN.md).

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> from wcitrain import RegularizedOptimizer, cross_entropy
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = RegularizedOptimizer(base, model, perturbation=WCIPosterior(0.5))
        >>> loss = optimizer.step(lambda: cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0])))
        >>> round(optimizer.metrics()["relative_size"], 4)
        0.5
    """

    relative_size: Positive | None = Field(
        default=None, description="r, perturbation norm over weight norm; null: 1, or by strength."
    )
    strength: Positive | None = Field(
        default=None, description="λ, weight of the index in the loss, instead of relative_size."
    )
    frobenius: bool = Field(default=False, description="Add the second term of (1), gradient λ W_l / s_l.")
    statistics: Statistics = "perturbed"
    floor: Floor = FLOOR
    schedule: Schedule = ALWAYS

    def __post_init__(self) -> None:
        if self.relative_size is not None and self.strength is not None:
            text = f"got {self.strength:g} beside relative_size={self.relative_size:g}; expected one of them."
            refuse("strength", f"{text} Leave one out.")

    @property
    def size(self) -> float:
        """r; where λ decides it, what it is before any trace is known."""
        return self.relative_size or (1.0 if self.strength is None else FIRST_SIZE)

    def __str__(self) -> str:
        knob = f"r={self.size:g}" if self.strength is None else f"λ={self.strength:g}"
        return f"WCI {knob}{' +F' * self.frobenius}"

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (2)."""
        s, is_known = posterior_shape(a, d, t, self.floor)
        volume = (d * s).sum().clamp_min(TINY)  # all layers zero: nothing to perturb, sigma = 0
        strength = (factor * self.size) ** 2 * a.sum() / volume
        if self.strength is not None:
            strength = torch.where(is_known, torch.full_like(strength, factor * self.strength), strength)
        frobenius = norm_coefficients(a, t) * strength if self.frobenius and t is not None else None
        size = (strength * volume / a.sum().clamp_min(TINY)).sqrt()
        return Posterior((strength * s).sqrt(), frobenius, strength, size)


@method
class UniformNoise(Noise):
    """Train on the loss averaged over noise of the same relative size in every layer.

        σ_l² = r² a_l / d_l                                                                                (3)

    The control for ``WCIPosterior``: same passes, same noise energy, other shares.
    """

    relative_size: RelativeSize = 1.0
    statistics: Statistics = "perturbed"
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "noise r={relative_size:g}"

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (3)."""
        r = factor * self.relative_size
        return Posterior(r * (a / d).sqrt(), None, a.new_tensor(torch.nan), a.new_tensor(r))


@method
class NoiseStability(Noise):
    """Noise stability optimization (Zhang, Li, Ju, arXiv 2306.08553): isotropic Gaussian noise.

        u ~ N(0, σ² I),  step on ½ [g(W + u) + g(W − u)],  expectation ∇[L + (σ²/2) Tr(H)] + O(σ⁴).        (4)

    One antithetic pair a step; the authors average several. All trainable tensors move, biases and
    normalisation included.
    """

    sigma: Positive = Field(default=0.01, description="σ, standard deviation of every weight, in its units.")
    statistics: Statistics = "perturbed"
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "NSO σ={sigma:g}"
    default_layers: ClassVar[str] = "all"
    is_gaussian: ClassVar[bool] = True

    def posterior(self, a: Tensor, d: Tensor, t: Tensor | None, factor: float) -> Posterior:
        """Return (4); the relative size is its root mean square."""
        sigma = factor * self.sigma
        size = sigma * (d.sum() / a.sum().clamp_min(TINY)).sqrt()
        return Posterior(torch.full_like(a, sigma), None, a.new_tensor(torch.nan), size)


@method
class RWP(WeightPerturbation):
    """Random weight perturbation relative to every filter (Bisla et al. 2022, LPF-SGD; Li et al. 2024, RWP).

        u_j = σ ||w_j|| ξ,  ξ ~ N(0, I),    step on (1 − α) g(W) + α g(W + u).                             (5)

    w_j are the rows of a tensor's first dimension (filters; a vector is one filter), so ||u_j|| is about
    σ sqrt(numel) ||w_j||. α = 1 is LPF-SGD with one sample and costs nothing; α < 1 is RWP's mixed loss (its
    authors take the two gradients on different halves of a batch, here both see the same images). Running
    statistics move at W where there is a pass at W.
    """

    sigma: Positive = Field(default=0.01, description="σ, standard deviation over the filter's norm.")
    mixing: PositiveShare = Field(default=0.5, description="α, share of the perturbed gradient, in (0, 1].")
    statistics: Statistics = Field(default="perturbed", description=f"{STATISTICS} Only where mixing is 1.")
    schedule: Schedule = ALWAYS
    label: ClassVar[str] = "RWP σ={sigma:g} α={mixing:g}"
    default_layers: ClassVar[str] = "all"

    def __post_init__(self) -> None:
        if self.mixing < 1 and self.statistics == "clean":
            text = "got clean with mixing below 1, where statistics move at the clean weights anyway"
            refuse("statistics", f"{text}; expected perturbed. Remove it.")

    def combination(self, factor: float = 1.0) -> Combination:
        """Mix the gradients at W and W + u."""
        return Combination(1 - self.mixing, self.mixing)

    def gradient(self, passes: Passes, state: State, factor: float, last_pass: LastPass | None) -> Step:
        """Draw u by (5) and mix."""
        weights = self.combination(factor)
        loss: Tensor | None
        if weights.here:
            with passes.local():
                loss = passes.plain(weights.here)
        else:
            loss = statistics_pass(passes, self.statistics)
        direction = [
            n * (factor * self.sigma) * filter_norms(t)
            for n, t in zip(passes.gaussian(), passes.layers.tensors, strict=True)
        ]
        size = relative_size(passes, direction)
        steps, _ = moved_passes(passes, direction, weights, last_pass, keep_statistics=loss is not None)
        shown = steps[0].loss if loss is None else carry_nan(loss, steps[0].loss)
        return steps[0]._replace(loss=shown, relative_size=size)

    def extra_passes(self, model: nn.Module) -> tuple[int, int]:
        """Return one of each for mixing, else at most one forward, for clean statistics."""
        if self.mixing < 1:
            return 1, 1
        return int(self.statistics == "clean" and has_running_statistics(model)), 0


def has_running_statistics(model: nn.Module) -> bool:
    """Tell whether a forward pass in train mode moves anything."""
    return any(getattr(m, "running_mean", None) is not None for m in model.modules())


def statistics_pass(passes: Passes, statistics: str) -> Tensor | None:
    """Move the running statistics by a forward pass at W, where they are to be clean; return its loss."""
    if statistics != "clean" or not has_running_statistics(passes.model):
        return None
    with torch.no_grad(), passes.local():
        return passes.evaluate(needs_graph=False).total


RANDOM_DIRECTIONS: dict[str, type[WeightPerturbation]] = {
    "wci": WCIPosterior,
    "noise": UniformNoise,
    "noise_stability": NoiseStability,
    "rwp": RWP,
}


def filter_norms(t: Tensor) -> Tensor:
    """Return the norms of a tensor's rows, shaped to broadcast; one norm for a vector or scalar."""
    if t.ndim <= 1:
        return t.detach().norm()
    return t.detach().flatten(1).norm(dim=1).reshape(-1, *[1] * (t.ndim - 1))


def posterior_shape(a: Tensor, d: Tensor, t: Tensor | None, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """Return ``s_l = sqrt(a_l / t_l)`` [L], a floor on ``a_l t_l``, and whether any trace is positive.

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
    """Return ``sqrt(t_l / a_l)`` [L], the gradient of sqrt(a t) in W_l over W_l; 0 for t <= 0 or NaN."""
    return torch.where(t > 0, (t / a.clamp_min(TINY)).sqrt(), 0.0) * (a > 0)
