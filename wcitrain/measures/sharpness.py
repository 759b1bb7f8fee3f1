"""Sharpness of the loss: along one step of SAM, ASAM or AWP; of small batches under noise, or at worst.

Legend: L mean loss of all examples, g its gradient in the weights that move, W_l a layer's weights; S a batch
of m examples, L_S its mean loss, H its Hessian, c scales (1, or |W| if adaptive), e = u / c, ⊙ elementwise.

    one step     L(W + u) − L(W)                                                                           (1)
    average      mean_S E_u L_S(W + u) − L_S(W),  u ~ N(0, ρ² c²)         → (ρ²/2) Σ_i c_i² H_ii           (2)
    worst        mean_S max { L_S(W + u) − L_S(W) : ||u / c||_p <= ρ }    → (ρ²/2) λ_max(H ⊙ c cᵀ)         (3)

| measure          | u of (1)                                     | length                                  |
|------------------|----------------------------------------------|-----------------------------------------|
| `sam_sharpness`  | ρ g / ||g||                                  | ρ over all tensors together             |
| `asam_sharpness` | ρ T² g / ||T g||, T = |W| + η (1 for biases) | ρ, each weight in units of its own size |
| `awp_sharpness`  | γ ||W_l|| g_l / ||g_l||                      | γ ||W_l|| in every layer                |

The steps (1) are those of the optimizers of the same name (`optim.ascent`), of all examples in eval mode. The
limits of (2) and (3) are those of small ρ; that of (3) is for p = 2, where S's own gradient is zero.

As in the authors' code (2) draws Gaussian noise of standard deviation ρ, which is no radius, and all
trainable tensors move. Unlike theirs: adaptive l2 ascent is steepest in e (their code multiplies by |W| but
divides by ||g||); the search is `largest_rise` (theirs: APGD, 20 steps from 2ρ); logits are not normalised;
batches count by size. Under attack a rise is that of the robust loss, attacked anew at W + u.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.measures.means import Chunks, chunk_mean_and_error, count_examples, losses_of, mean_gradient
from wcitrain.measures.problem import Measure, Problem, Taken
from wcitrain.method import NonNegative, Positive, PositiveCount, Text, method
from wcitrain.optim.ascent import ASAM, AWP, SAM, Ascent
from wcitrain.params import select_layers
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from, seed_from

RADII = {"l2": 0.5, "linf": 0.002}  # ρ of (3), inside the grids of the paper

Moved = Annotated[Text, Field(description="Which tensors move, see params.select_layers.")]
Adaptive = Annotated[bool, Field(description="c = |W| instead of 1; a weight that is zero does not move.")]
BatchSize = Annotated[PositiveCount, Field(description="m, examples a batch.")]


class StepSharpness(Measure):
    """The rise (1) at one ascent step. ``parts``: ``loss``, ``perturbed_loss``.

    The standard error is over examples of their own rise, the step taken as given.
    """

    layers: str
    size: ClassVar[str]  # the step's, for humans
    cost = "2 attacks, 2 forward passes, 1 forward and backward pass"

    def _rule(self) -> Ascent:
        """Return the rule whose step it is."""
        raise NotImplementedError

    def take(self, problem: Problem) -> Taken:
        """Return (1) by example."""
        model, images = problem.model, problem.adversarial()
        selected = select_layers(model, self.layers)
        before = losses_of(model, images)
        _, g = mean_gradient(model, images, selected.tensors)
        with perturbed(selected.tensors, self._rule().displacement(selected, g, 1.0, None)) as move:
            move(+1)
            after = losses_of(model, problem.attacked_anew(problem.clean()))
        parts = {"loss": float(before.mean()), "perturbed_loss": float(after.mean())}
        size = self.size.format(**vars(self))
        return after - before, f"layers {self.layers}, {size}, {problem.attack_text}", parts


@method
class SAMSharpness(StepSharpness):
    """Rise of the loss at SAM's step, of one length over all tensors together."""

    rho: Positive = Field(default=0.05, description="ρ, length of the step.")
    layers: Moved = "all"
    name = "sam_sharpness"
    size = "rho {rho:g}"
    source = "Foret et al., arXiv 2010.01412, eq. 2"

    def _rule(self) -> Ascent:
        return SAM(self.rho)


@method
class ASAMSharpness(StepSharpness):
    """Rise of the loss at ASAM's step, of one length in units of every weight's own size.

    With η = 0 and ``layers="weights"`` it is unchanged by rescalings of weights that keep the function.
    """

    rho: Positive = Field(default=0.5, description="ρ, length of the step in units of T.")
    eta: NonNegative = Field(default=0.0, description="η in T = |W| + η; training uses 0.01.")
    layers: Moved = "all"
    name = "asam_sharpness"
    size = "rho {rho:g}, eta {eta:g}"
    source = "Kwon et al., arXiv 2102.11600, eq. 9"

    def _rule(self) -> Ascent:
        return ASAM(self.rho, self.eta)


@method
class AWPSharpness(StepSharpness):
    """Rise of the loss at AWP's step, in every layer relative to the layer's norm.

    Unchanged when scale moves between layers. Model in eval mode, where AWP's proxy is in train mode.
    """

    gamma: Positive = Field(default=0.01, description="γ, length of the step over each layer's norm.")
    layers: Moved = "weights"
    name = "awp_sharpness"
    size = "gamma {gamma:g}"
    source = "Wu et al., arXiv 2004.05884, eq. 9 to 12"

    def _rule(self) -> Ascent:
        return AWP(self.gamma)


@dataclass(eq=False)
class Batch:
    """One batch S: its loss at W, and at W + u for u [P] in the chosen tensors."""

    problem: Problem  # of this batch alone
    chunk: tuple[Tensor, Tensor]
    tensors: Sequence[Tensor]
    c: Tensor  # [P]

    def __post_init__(self) -> None:
        self.loss = float(losses_of(self.problem.model, self.problem.attacked_anew([self.chunk])).mean())

    @contextmanager
    def moved(self, u: Tensor) -> Iterator[Chunks]:
        """Put the weights at W + u and yield the images to look at there."""
        parts = u.split([t.numel() for t in self.tensors])
        shaped = [part.view(t.shape) for part, t in zip(parts, self.tensors, strict=True)]
        with perturbed(self.tensors, shaped) as move:
            move(+1)
            yield self.problem.attacked_anew([self.chunk])

    def rise_at(self, e: Tensor) -> tuple[float, Tensor]:
        """Return L_S(W + c ⊙ e) − L_S(W) and its gradient in e [P]."""
        with self.moved(self.c * e) as images:
            value, g = mean_gradient(self.problem.model, images, self.tensors)
        return value - self.loss, self.c * torch.cat([x.flatten() for x in g])

    def normal(self, generator: torch.Generator) -> Tensor:
        """Return standard normal numbers [P]."""
        c = self.c
        return torch.randn(c.shape, generator=generator, device=c.device, dtype=c.dtype)


class BatchSharpness(Measure):
    """The mean of a rise over batches, each with random numbers of its own; ``parts``: ``loss`` at W.

    The standard error is over batches, NaN for one.
    """

    adaptive: bool
    m: int
    layers: str
    text: ClassVar[str]  # how it is taken
    source = "Andriushchenko et al., arXiv 2302.07011"

    def rise(self, batch: Batch, generator: torch.Generator) -> float:
        """Return the rise of one batch's loss."""
        raise NotImplementedError

    def take(self, problem: Problem) -> Taken:
        """Return the mean over batches."""
        tensors = select_layers(problem.model, self.layers).tensors
        flat = torch.cat([t.detach().flatten() for t in tensors])
        c = flat.abs() if self.adaptive else torch.ones_like(flat)
        chunks, rises, losses = problem.clean(self.m), [], []
        for number, chunk in enumerate(chunks):
            alone = Problem(problem.model, [chunk], problem.attack, seed_from(problem.seed, number))
            batch = Batch(alone, chunk, tensors, c)
            losses.append(batch.loss)
            rises.append(self.rise(batch, generator_from(c.device, problem.seed, self.name, number)))
        text = self.text.format(self, adaptive=", adaptive" if self.adaptive else "")
        value = *chunk_mean_and_error(rises, chunks), count_examples(chunks)
        parts = {"loss": chunk_mean_and_error(losses, chunks)[0]}
        return value, f"{text}, {problem.attack_text}", parts


@method
class AverageSharpness(BatchSharpness):
    """Mean rise of the loss of batches of m under Gaussian noise on the weights."""

    rho: Positive = Field(default=0.1, description="ρ, deviation of the noise; 0.05 to 0.4 in the paper.")
    adaptive: Adaptive = False
    m: BatchSize = 128
    num_draws: PositiveCount = Field(default=10, description="Draws of noise a batch.")
    layers: Moved = "all"
    name = "average_sharpness"
    text = "rho {0.rho:g}{adaptive}, m {0.m}, {0.num_draws} draws"
    cost = "num_draws + 1 attacks and forward passes"

    def rise(self, batch: Batch, generator: torch.Generator) -> float:
        """Return (2) for one batch."""
        draws = []
        for _ in range(self.num_draws):
            with batch.moved(self.rho * batch.c * batch.normal(generator)) as images:
                draws.append(float(losses_of(batch.problem.model, images).mean()))
        return sum(draws) / self.num_draws - batch.loss


@method
class WorstSharpness(BatchSharpness):
    """Mean over batches of m of the largest rise of the loss that is found within a radius.

    A lower estimate of the maximum, never negative (u = 0 is in the ball).
    """

    rho: Positive | None = Field(
        default=None, description="ρ; null: 0.5 in l2 and 0.002 in linf. Adaptive radii are larger."
    )
    norm: Literal["l2", "linf"] = Field(default="l2", description="p, over all tensors together.")
    adaptive: Adaptive = False
    m: BatchSize = 128
    ascent_steps: PositiveCount = Field(default=20, description="Of the search over u.")
    layers: Moved = "all"
    name = "worst_sharpness"
    text = "rho {0.radius:g} {0.norm}{adaptive}, m {0.m}, {0.ascent_steps} ascent steps"
    cost = "ascent_steps + 2 forward and backward passes, as many attacks"

    @property
    def radius(self) -> float:
        """ρ, or the norm's default."""
        return RADII[self.norm] if self.rho is None else self.rho

    def rise(self, batch: Batch, generator: torch.Generator) -> float:
        """Return (3) for one batch."""
        start = batch.normal(generator)
        return largest_rise(batch.rise_at, start, self.radius, self.norm, self.ascent_steps)


def largest_rise(
    rise_at: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, rho: float, norm: str, num_steps: int
) -> float:
    """Return the largest rise found in the ball ||e||_p <= ρ, at least zero.

        e' = Project( e + α s(∇) ),   s(∇) = ∇/||∇|| in l2, sign ∇ in linf,   α = 2ρ at first              (4)

    from a random point of the sphere (in linf: a corner). e' is taken if the loss is higher, else α halves.
    """

    def direction(x: Tensor) -> Tensor:
        return x.sign() if norm == "linf" else x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)

    def project(x: Tensor) -> Tensor:
        return x.clamp(-rho, rho) if norm == "linf" else x * (rho / x.norm().clamp_min(rho))

    e, α = rho * direction(start), 2 * rho
    best, gradient = rise_at(e)
    for _ in range(num_steps):
        trial = project(e + α * direction(gradient))
        rise, trial_gradient = rise_at(trial)
        if rise > best:
            e, best, gradient = trial, rise, trial_gradient
        else:
            α /= 2
    return best if math.isnan(best) else max(0.0, best)
