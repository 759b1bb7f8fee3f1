"""Robust flatness: how much the robust loss rises when the weights move at random, or in the worst way.

Legend: N examples, D draws, L layers, W_l weights, a_l = ||W_l||_F², d_l = numel(W_l), t_l = Tr(H_l), ν
perturbation of the weights, δ of the images, ξ relative radius, ℓ cross-entropy, g_l gradient of a chunk's
mean loss in layer l, η ``weight_lr``, s the steepest step of the threat's norm, U uniform in [0, 1].

    R(W) = (1/N) Σ_n max_{δ_n} ℓ(x_n + δ_n; W)                                                             (1)
    average flatness = E_ν R(W + ν) − R(W),     worst flatness = max_{ν in B_ξ(W)} R(W + ν) − R(W)         (2)

(Stutz, Hein & Schiele, "Relating Adversarially Robust Generalization to Flat Minima", ICCV 2021, section 3),
in the ball B_ξ(W) of a radius for each layer, relative to its own length; a zero layer stays:

    ν_l = r_l ξ ||W_l|| z_l / ||z_l||,   z_l ~ N(0, I),   r_l = 1 (sphere) or U^(1/d_l) (ball)         (3)

With the adversarial examples held fixed, and up to order ξ⁴ since odd orders vanish in the mean,

    average flatness = (ξ²/2) Σ_l k_l a_l t_l / d_l,  k_l = 1 (sphere) or d_l/(d_l + 2) (ball)      (4)

whose summand is WCI_l² / d_l (smooth networks; kinks that ν crosses add to it). Both measures are unchanged
when scale moves between layers of a network of piecewise linear units.

    joint ascent:  δ ← Box Project( δ + step s(∇_δ ℓ) ),   ν_l ← Project( ν_l + η ||W_l|| g_l / ||g_l|| )  (5)

The paper's text and the code behind its figures differ; ``protocol`` decides:

|                                  | ``"paper"``               | ``"code"``                        |
|----------------------------------|---------------------------|-----------------------------------|
| a ν is drawn                     | in the ball               | on the sphere ||ν_l|| = ξ ||W_l||  |
| one ν is for                     | a chunk                   | all examples                      |
| ``weight_lr`` unless it is given | 0.001                     | 0.01 (both beyond the default ξ)  |
| the iterate that counts          | the best (text is silent) | the last                          |

Both: cross-entropy, eval mode, weights and biases as layers of their own, no normalisation parameters, PGD-20
with step 0.007 at eps 8/255, one start, reference R(W) by ten, the best iterate of each example kept, chunks
of 128 examples. So the problem's threat and seed count here, and the length of its attack does not.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks import Attack
from wcitrain.attacks.ascent import ascend, check_images, starting_point
from wcitrain.measures.means import Chunks, example_losses, losses_of, mean_and_error
from wcitrain.measures.problem import Measure, Problem, Taken, attack_text
from wcitrain.method import Positive, PositiveCount, StepSize, Text, method
from wcitrain.optim.ascent import by_layer
from wcitrain.params import Layers, select_layers
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from

WEIGHT_LR = {"paper": 0.001, "code": 0.01}
STEP_OVER_EPS = 0.007 / (8 / 255)  # 0.223: the step 0.007 of Stutz et al. as a share of their radius 8/255
Xi = Annotated[Positive, Field(description="ξ, perturbation norm over each layer's norm.")]


@method
class Flatness(Measure):
    """What the two measures have in common: the options of the protocol, and the reference R(W)."""

    xi: Xi = 0.5
    protocol: Literal["paper", "code"] = Field(
        default="paper", description="Stutz et al.: what their paper says, or what their code does."
    )
    layers: Text = Field(
        default="weights+biases", description="Which tensors move, see params.select_layers."
    )
    num_steps: PositiveCount = Field(default=20, description="Steps of every attack.")
    step_size: StepSize | None = Field(
        default=None, description="Of the attack, in the threat's norm; null: 0.223 eps (0.007 for 8/255)."
    )
    num_restarts: PositiveCount = Field(default=1, description="Attempts; the worst counts.")
    reference_restarts: PositiveCount = Field(default=10, description="Attacks on each image at W.")
    chunk_size: PositiveCount = Field(default=128, description="Images attacked at once.")
    source = "Stutz, Hein & Schiele, ICCV 2021, section 3"

    def attack(self, problem: Problem, num_restarts: int) -> Attack | None:
        """Return the adversary on images."""
        if problem.threat is None:
            return None
        step = STEP_OVER_EPS * problem.threat.eps if self.step_size is None else self.step_size
        return Attack(problem.threat, self.num_steps, step, num_restarts=num_restarts)

    def losses(self, problem: Problem, k: int, num_restarts: int) -> Tensor:
        """Return the losses [n_k] of chunk k under attack; the starts are a function of seed and k."""
        x, y = problem.clean(self.chunk_size)[k]
        generator = generator_from(x.device, problem.seed, "attack", k)
        found = strongest(problem.model, x, y, self.attack(problem, num_restarts), generator)
        return found[1].double().cpu()

    def reference(self, problem: Problem) -> Tensor:
        """Return the losses [N] at W."""
        numbers = range(len(problem.clean(self.chunk_size)))
        return torch.cat([self.losses(problem, k, self.reference_restarts) for k in numbers])


@method
class AverageFlatness(Flatness):
    """Mean rise (2) of the robust loss under random weight perturbations, each attacked anew.

    All attacks on a chunk begin at the same random starts. The standard error adds the variance over examples
    of each one's mean rise to that over draws: both are samples. (Their interaction counts twice, slightly
    too much.) With one draw it is unknown (NaN). ``parts``: ``reference_loss`` R(W), ``perturbed_loss`` mean
    of R(W + ν), ``max`` over draws of the rise, ``stderr_examples``, ``stderr_draws``.
    """

    num_draws: PositiveCount = Field(default=10, description="D, weight perturbations.")
    name = "average_flatness"
    cost = "num_draws · num_restarts + reference_restarts attacks"

    def take(self, problem: Problem) -> Taken:
        """Return (2), average."""
        is_shared, rows = self.protocol == "code", []
        layers = select_layers(problem.model, self.layers)
        reference = self.reference(problem)
        for draw in range(self.num_draws):
            losses = []
            for k in range(len(problem.clean(self.chunk_size))):
                place = "average_flatness", draw, 0 if is_shared else k
                generator = generator_from(problem.device, problem.seed, *place)
                ν = draw_perturbation(layers, self.xi, generator, on_sphere=is_shared)
                with perturbed(layers.tensors, ν) as move:
                    move(+1)
                    losses.append(self.losses(problem, k, self.num_restarts))
            rows.append(torch.cat(losses))
        rises = torch.stack(rows) - reference  # [D, N]
        by_example, by_draw = mean_and_error(rises.mean(0)), mean_and_error(rises.mean(1))
        value = by_example[0], math.hypot(by_example[1], by_draw[1]), len(reference)
        parts = {
            "reference_loss": float(reference.mean()),
            "perturbed_loss": float(torch.stack(rows).mean()),
            "max": float(rises[rises.mean(1).argmax()].mean()),
            "stderr_examples": by_example[1],
            "stderr_draws": by_draw[1],
        }
        kind = "sphere, one nu a draw" if is_shared else "ball, one nu a chunk"
        settings = f"xi {self.xi:g}, mean of {self.num_draws} draws, {kind}, "
        return value, settings + attack_text(self.attack(problem, self.num_restarts)), parts


@method
class WorstFlatness(Flatness):
    """Largest rise (2) of the robust loss in the ball, by the joint ascent (5) on ν and δ.

    Both steps use the gradients at the same (ν, δ). With one ν for all examples the chunks take turns,
    ``num_steps`` rounds. Of the restarts the one with the highest mean loss counts: of the chunk where a
    chunk has its own ν, of all examples otherwise.

    The value is a lower estimate of the maximum; where 2 ξ > ``weight_lr * num_steps`` the ball is not even
    crossed, which ``settings`` say: raise one of the two with ξ. It can be negative for small ξ: the
    reference has more restarts. The standard error is over examples, ν taken as given. ``parts``:
    ``reference_loss``, ``perturbed_loss``.
    """

    xi: Xi = 0.00075  # the paper's main table; 0.003 in its supplement
    num_restarts: PositiveCount = Field(default=10, description="Attempts; the worst counts.")
    weight_lr: Positive | None = Field(default=None, description="η, step on ν over each layer's norm.")
    name = "worst_flatness"
    cost = "num_restarts + reference_restarts attacks, those with gradients in the weights too"

    def take(self, problem: Problem) -> Taken:
        """Return (2), worst, by example."""
        is_shared, worst = self.protocol == "code", []
        weight_lr = self.weight_lr or WEIGHT_LR[self.protocol]
        layers = select_layers(problem.model, self.layers)
        reference, chunks = self.reference(problem), problem.clean(self.chunk_size)
        for number, group in enumerate([list(chunks)] if is_shared else [[chunk] for chunk in chunks]):
            rows = []
            for restart in range(self.num_restarts):
                place = "worst_flatness", number, restart
                generator = generator_from(problem.device, problem.seed, *place)
                rows.append(self._climbed(problem, layers, group, weight_lr, generator))
            attempts = torch.stack(rows)  # [R, n]
            worst.append(attempts[attempts.mean(1).argmax()])
        losses = torch.cat(worst)
        parts = {"reference_loss": float(reference.mean()), "perturbed_loss": float(losses.mean())}
        reach = f"weight_lr {weight_lr:g}"
        if weight_lr * self.num_steps < 2 * self.xi:
            reach += " (too short to cross the ball)"
        kind = "one nu for all, last iterate" if is_shared else "one nu a chunk, best iterate"
        settings = f"xi {self.xi:g}, {self.num_restarts} restarts, {kind}, {reach}, joint "
        return losses - reference, settings + attack_text(self.attack(problem, 1)), parts

    def _climbed(
        self, problem: Problem, layers: Layers, group: Chunks, weight_lr: float, generator: Generator
    ) -> Tensor:
        """Return the losses [n] of chunks that share a ν, after (5) from random ν and δ."""
        attack, norms = self.attack(problem, 1), layers.squared_norms().sqrt()
        takes_last = self.protocol == "code"
        ν = draw_perturbation(layers, self.xi, generator, on_sphere=takes_last)
        images = [x for x, _ in group]
        if attack is not None:
            images = [starting_point(x, attack.threat, "uniform", generator) for x in images]
        best: Tensor | None = None
        with perturbed(layers.tensors, ν) as move:  # reads ν anew at every move
            for number in range(self.num_steps):
                for k, (x, y) in enumerate(group):
                    move(+1)
                    x_adv = images[k].detach().requires_grad_()
                    loss = example_losses(problem.model, x_adv, y).mean()
                    inputs = [x_adv, *layers.tensors]
                    slope, *g = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
                    if attack is not None:
                        sizes = attack.step_size, attack.l1_share
                        images[k] = ascend(x, x_adv.detach(), slope, attack.threat, *sizes)
                    moved = [u + v for u, v in zip(ν, by_layer(layers, g, weight_lr * norms), strict=True)]
                    torch._foreach_copy_(ν, project_per_layer(layers, moved, self.xi * norms))
                if not takes_last or number == self.num_steps - 1:
                    move(+1)
                    there = [(z.detach(), y) for z, (_, y) in zip(images, group, strict=True)]
                    losses = losses_of(problem.model, there)
                    if best is None or losses.mean() > best.mean():
                        best = losses
        assert best is not None
        return best


def strongest(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Return each example's image of highest cross-entropy that an attack visited, and these losses [B].

    All ``num_steps + 1`` iterates of all restarts compete, the uniform starts included, the clean images not.
    """
    if attack is None:
        with torch.no_grad():
            return x, example_losses(model, x, y)
    check_images(x, "strongest")
    x = x.detach()
    worst, worst_losses = x, x.new_full((len(x),), -torch.inf)
    for _ in range(attack.num_restarts):
        x_adv = starting_point(x, attack.threat, "uniform", generator)
        for step in range(attack.num_steps + 1):
            is_last = step == attack.num_steps
            x_adv = x_adv.detach().requires_grad_(not is_last)
            with torch.set_grad_enabled(not is_last):
                losses = example_losses(model, x_adv, y)
            # A loss that is no number counts as worst, and shows.
            is_worse = ~(losses.detach() <= worst_losses)
            worst = torch.where(is_worse.reshape(-1, *[1] * (x.ndim - 1)), x_adv.detach(), worst)
            worst_losses = torch.where(is_worse, losses.detach(), worst_losses)
            if not is_last:
                gradient = torch.autograd.grad(losses.sum(), x_adv)[0]
                sizes = attack.step_size, attack.l1_share
                x_adv = ascend(x, x_adv.detach(), gradient, attack.threat, *sizes)
    return worst, worst_losses


def draw_perturbation(layers: Layers, xi: float, generator: Generator, *, on_sphere: bool) -> list[Tensor]:
    """Return ν of (3), one tensor for each of the layers' tensors."""
    device = layers.tensors[0].device
    z = [torch.randn(t.shape, generator=generator, device=device, dtype=t.dtype) for t in layers.tensors]
    radii = xi * layers.squared_norms().sqrt()
    if not on_sphere:
        u = torch.rand(len(layers), generator=generator, device=device).to(radii)
        radii = radii * u ** (1 / layers.sizes())
    return by_layer(layers, z, radii)


def project_per_layer(layers: Layers, ν: list[Tensor], radii: Tensor) -> list[Tensor]:
    """Return the closest point to ν of the ball with ``radii`` [L]."""
    lengths = layers.dots(ν, ν).sqrt()
    factors = torch.where(lengths > radii, radii / lengths.clamp_min(torch.finfo(radii.dtype).tiny), 1.0)
    return [t * f for t, f in zip(ν, layers.spread(factors), strict=True)]
