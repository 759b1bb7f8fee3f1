"""Sharpness of the loss: along one step of SAM, ASAM or AWP; of small batches under noise, or at worst.

Legend: L mean loss of all examples, g its gradient in the weights that move, W_l a layer's weights; S a batch
of m examples, L_S its mean loss, H its Hessian, c scales (1, or |W| if adaptive), e = u / c, ⊙ elementwise.

    one step     L(W + u) − L(W)                                                                           (1)
    average      mean_S E_u L_S(W + u) − L_S(W),  u ~ N(0, ρ² c²)         → (ρ²/2) Σ_i c_i² H_ii           (2)
    worst        mean_S max { L_S(W + u) − L_S(W) : ||u / c|| <= ρ }      → (ρ²/2) λ_max(H ⊙ c cᵀ)         (3)

The steps (1) are those of the optimizers of the same name (`optim.ascent`), of all examples in eval mode. The
limits of (2) and (3) are those of small ρ; that of (3) where S's own gradient is zero.

As in the authors' code (2) draws Gaussian noise of standard deviation ρ, which is no radius, and all
trainable tensors move. Unlike theirs: adaptive ascent is steepest in e (their code multiplies by |W| but
divides by ||g||); the search is `largest_rise` (theirs: APGD, 20 steps from 2ρ); logits are not normalised;
batches count by size. Under attack a rise is that of the robust loss, attacked anew at W + u.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from wcitrain.measures.means import chunk_mean_and_error, count_examples, losses_of, mean_gradient
from wcitrain.measures.problem import Measure, Problem, Taken, attack_text
from wcitrain.method import NonNegative, Positive, PositiveCount, Text, method, setting
from wcitrain.optim.ascent import ASAM, AWP, SAM, Ascent
from wcitrain.params import select_layers
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from, seed_from

Tensors = Sequence[Tensor]
Moved = Annotated[Text, Field(description="Which tensors move, see params.select_layers.")]
Adaptive = Annotated[bool, Field(description="c = |W| instead of 1; a weight that is zero does not move.")]
BatchSize = Annotated[PositiveCount, Field(description="m, examples a batch.")]


class StepSharpness(Measure):
    """The rise (1) at one ascent step. ``parts``: ``loss``, ``perturbed_loss``.

    The standard error is over examples of their own rise, the step taken as given.
    """

    layers: str
    rule: ClassVar[type[Ascent]]  # whose step it is; the other settings are the rule's
    cost = "2 attacks, 2 forward passes, 1 forward and backward pass"

    def take(self, problem: Problem) -> Taken:
        """Return (1) by example."""
        model, images = problem.model, problem.adversarial()
        lengths = {name: value for name, value in vars(self).items() if name != "layers"}
        selected = select_layers(model, self.layers)
        before = losses_of(model, images)
        _, g = mean_gradient(model, images, selected.tensors)
        with perturbed(selected.tensors, self.rule(**lengths).displacement(selected, g, 1.0, None)) as move:
            move(+1)
            after = losses_of(model, problem.attacked_anew(problem.clean()))
        parts = {"loss": float(before.mean()), "perturbed_loss": float(after.mean())}
        size = ", ".join(f"{name} {value:g}" for name, value in lengths.items())
        return after - before, f"layers {self.layers}, {size}, {attack_text(problem.attack)}", parts


@method
class SAMSharpness(StepSharpness):
    """Rise of the loss at SAM's step ρ g / ||g||, of one length over all tensors together."""

    rho: Positive = setting(0.05, "ρ, length of the step.")
    layers: Moved = "all"
    name = "sam_sharpness"
    rule = SAM
    source = "Foret et al., arXiv 2010.01412, eq. 2"


@method
class ASAMSharpness(StepSharpness):
    """Rise of the loss at ASAM's step, of one length in units of every weight's own size.

    It is ρ T² g / ||T g||, T = |W| + η (1 for biases). With η = 0 and ``layers="weights"`` the rise is
    unchanged by rescalings of weights that keep the function.
    """

    rho: Positive = setting(0.5, "ρ, length of the step in units of T.")
    eta: NonNegative = setting(0.0, "η in T = |W| + η; training uses 0.01.")
    layers: Moved = "all"
    name = "asam_sharpness"
    rule = ASAM
    source = "Kwon et al., arXiv 2102.11600, eq. 9"


@method
class AWPSharpness(StepSharpness):
    """Rise of the loss at AWP's step γ ||W_l|| g_l / ||g_l||, in every layer relative to the layer's norm.

    Unchanged when scale moves between layers. Model in eval mode, where AWP's proxy is in train mode.
    """

    gamma: Positive = setting(0.01, "γ, length of the step over each layer's norm.")
    layers: Moved = "weights"
    name = "awp_sharpness"
    rule = AWP
    source = "Wu et al., arXiv 2004.05884, eq. 9 to 12"


class BatchSharpness(Measure):
    """The mean of a rise over batches, each with random numbers of its own; ``parts``: ``loss`` at W.

    The standard error is over batches, NaN for one.
    """

    adaptive: bool
    m: int
    layers: str
    text: ClassVar[str]  # how it is taken
    source = "Andriushchenko et al., arXiv 2302.07011"

    def rise(self, batch: Problem, tensors: Tensors, c: Tensor, loss: float, generator: Generator) -> float:
        """Return the rise of one batch's loss from ``loss`` when W in the tensors moves, for scales c [P]."""
        raise NotImplementedError

    def take(self, problem: Problem) -> Taken:
        """Return the mean over batches."""
        tensors = select_layers(problem.model, self.layers).tensors
        flat = torch.cat([t.detach().flatten() for t in tensors])
        c = flat.abs() if self.adaptive else torch.ones_like(flat)
        chunks, rises, losses = problem.clean(self.m), [], []
        for number, chunk in enumerate(chunks):
            seed = seed_from(problem.seed, number)
            batch = Problem(problem.model, [chunk], problem.attack, seed, chunk_size=self.m)
            losses.append(_mean_loss(batch))
            generator = generator_from(c.device, problem.seed, self.name, number)
            rises.append(self.rise(batch, tensors, c, losses[-1], generator))
        text = self.text.format(self, adaptive=", adaptive" if self.adaptive else "")
        value = *chunk_mean_and_error(rises, chunks), count_examples(chunks)
        parts = {"loss": chunk_mean_and_error(losses, chunks)[0]}
        return value, f"{text}, {attack_text(problem.attack)}", parts


@method
class AverageSharpness(BatchSharpness):
    """Mean rise of the loss of batches of m under Gaussian noise on the weights."""

    rho: Positive = setting(0.1, "ρ, deviation of the noise; 0.05 to 0.4 in the paper.")
    adaptive: Adaptive = False
    m: BatchSize = 128
    num_draws: PositiveCount = setting(10, "Draws of noise a batch.")
    layers: Moved = "all"
    name = "average_sharpness"
    text = "rho {0.rho:g}{adaptive}, m {0.m}, {0.num_draws} draws"
    cost = "num_draws + 1 attacks and forward passes"

    def rise(self, batch: Problem, tensors: Tensors, c: Tensor, loss: float, generator: Generator) -> float:
        """Return (2) for one batch."""
        total = 0.0
        for _ in range(self.num_draws):
            with _moved(tensors, self.rho * c * torch.empty_like(c).normal_(generator=generator)):
                total += _mean_loss(batch)
        return total / self.num_draws - loss


@method
class WorstSharpness(BatchSharpness):
    """Mean over batches of m of the largest rise of the loss that is found within a radius.

    A lower estimate of the maximum, never negative (u = 0 is in the ball).
    """

    rho: Positive = setting(0.5, "ρ, over all tensors together. Adaptive radii are larger.")
    adaptive: Adaptive = False
    m: BatchSize = 128
    ascent_steps: PositiveCount = setting(20, "Of the search over u.")
    layers: Moved = "all"
    name = "worst_sharpness"
    text = "rho {0.rho:g} l2{adaptive}, m {0.m}, {0.ascent_steps} ascent steps"
    cost = "ascent_steps + 2 forward and backward passes, as many attacks"

    def rise(self, batch: Problem, tensors: Tensors, c: Tensor, loss: float, generator: Generator) -> float:
        """Return (3) for one batch."""

        def rise_at(e: Tensor) -> tuple[float, Tensor]:
            with _moved(tensors, c * e):
                value, g = mean_gradient(batch.model, batch.attacked_anew(batch.clean()), tensors)
            return value - loss, c * torch.cat([x.flatten() for x in g])

        start = torch.empty_like(c).normal_(generator=generator)
        return largest_rise(rise_at, start, self.rho, self.ascent_steps)


def _mean_loss(batch: Problem) -> float:
    """Return the mean loss under an attack of its own at the weights as they are now."""
    return float(losses_of(batch.model, batch.attacked_anew(batch.clean())).mean())


@contextmanager
def _moved(tensors: Tensors, u: Tensor) -> Iterator[None]:
    """Put the weights at W + u, for u [P]."""
    parts = u.split([t.numel() for t in tensors])
    with perturbed(tensors, [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]) as move:
        move(+1)
        yield


def largest_rise(
    rise_at: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, rho: float, num_steps: int
) -> float:
    """Return the largest rise found in the ball ||e|| <= ρ, at least zero.

        e' = Project( e + α ∇/||∇|| ),   α = 2ρ at first                                                   (4)

    from a random point of the sphere; ``rise_at(e)`` is the rise and its gradient ∇. e' is taken if the loss
    is higher, else α halves.
    """
    tiny = torch.finfo(start.dtype).tiny
    e, α = rho * (start / start.norm().clamp_min(tiny)), 2 * rho
    best, gradient = rise_at(e)
    for _ in range(num_steps):
        trial = e + α * (gradient / gradient.norm().clamp_min(tiny))
        trial = trial * (rho / trial.norm().clamp_min(rho))
        rise, trial_gradient = rise_at(trial)
        if rise > best:
            e, best, gradient = trial, rise, trial_gradient
        else:
            α /= 2
    return best if math.isnan(best) else max(0.0, best)
