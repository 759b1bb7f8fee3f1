"""Robust flatness: how much the robust loss rises when the weights move at random, or in the worst way.

Legend: N examples, D draws, L layers, W_l weights, a_l = ||W_l||_F², d_l = numel(W_l), t_l = Tr(H_l), ν
perturbation of the weights, δ of the images, ξ relative radius, ℓ cross-entropy, g_l gradient of a chunk's
mean loss in layer l, η ``weight_lr``, s the steepest step of the threat's norm, U uniform in [0, 1].

    R(W) = (1/N) Σ_n max_{δ_n} ℓ(x_n + δ_n; W)                                                             (1)
    average flatness = E_ν R(W + ν) − R(W),     worst flatness = max_{ν in B_ξ(W)} R(W + ν) − R(W)         (2)

(Stutz, Hein & Schiele, "Relating Adversarially Robust Generalization to Flat Minima", ICCV 2021, section 3),
in the ball B_ξ(W) of a radius for each layer, relative to its own length; a zero layer stays:

    ν_l = U^(1/d_l) ξ ||W_l|| z_l / ||z_l||,   z_l ~ N(0, I)                                               (3)

With the adversarial examples held fixed, and up to order ξ⁴ since odd orders vanish in the mean,

    average flatness = (ξ²/2) Σ_l a_l t_l / (d_l + 2)                                                      (4)

whose summand is WCI_l² / (d_l + 2) (smooth networks; kinks that ν crosses add to it). Both measures are
unchanged when scale moves between layers of a network of piecewise linear units.

    joint ascent:  δ ← Box Project( δ + step s(∇_δ ℓ) ),   ν_l ← Project( ν_l + η ||W_l|| g_l / ||g_l|| )  (5)

As in the paper's text, each chunk of 128 examples has ν of its own, and PGD-20 with step 0.007 at eps 8/255
from one start climbs the cross-entropy; R(W) is by ten starts, and the best iterate of each example counts.
So the problem's threat and seed count here, and the length of its attack does not. The code behind the
paper's figures has one ν on the sphere for all chunks, η = 0.01, and the last iterate of (5). Weights and
biases are layers of their own; parameters of normalisation stay.
"""

import math
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from wcitrain.attacks import Attack
from wcitrain.attacks.ascent import ascend, check_images, starting_point
from wcitrain.curvature.loss import gradients_of
from wcitrain.curvature.passes import TINY
from wcitrain.measures.means import example_losses, losses_of, mean_and_error
from wcitrain.measures.problem import Measure, Problem, Taken, attack_text
from wcitrain.method import Positive, PositiveCount, Text, method, setting
from wcitrain.optim.ascent import by_layer
from wcitrain.params import Layers, select_layers
from wcitrain.preserve import naming_reentrant, perturbed
from wcitrain.seeding import generator_from

STEP_OVER_EPS = 0.007 / (8 / 255)  # 0.223: the step 0.007 of Stutz et al. as a share of their radius 8/255
Xi = Annotated[Positive, Field(description="ξ, perturbation norm over each layer's norm.")]


@method
class Flatness(Measure):
    """What the two measures have in common: the attack, and the reference R(W)."""

    xi: Xi = 0.5
    layers: Text = setting("weights+biases", "Which tensors move, see params.select_layers.")
    num_steps: PositiveCount = setting(20, "Steps of every attack.")
    num_restarts: PositiveCount = setting(1, "Attempts; the worst counts.")
    reference_restarts: PositiveCount = setting(10, "Attacks on each image at W.")
    chunk_size: PositiveCount = setting(128, "Images attacked at once.")
    source = "Stutz, Hein & Schiele, ICCV 2021, section 3"

    def attack(self, problem: Problem, num_restarts: int) -> Attack | None:
        """Return the adversary on images."""
        if problem.attack is None:
            return None
        threat = problem.attack.threat
        size = threat.step_for(self.num_steps, None if threat.norm == "l1" else STEP_OVER_EPS * threat.eps)
        return Attack(threat, self.num_steps, size, num_restarts=num_restarts)

    def losses(self, problem: Problem, k: int, num_restarts: int) -> Tensor:
        """Return each example's highest loss [n_k] over all iterates of an attack on chunk k and its starts.

        The starts are a function of seed and k.
        """
        (x, y), attack = problem.clean(self.chunk_size)[k], self.attack(problem, num_restarts)
        if attack is None:
            return losses_of(problem.model, [(x, y)])
        check_images(x, "flatness")
        generator = generator_from(x.device, problem.seed, "attack", k)
        worst = x.new_full((len(x),), -torch.inf)
        for _ in range(attack.num_restarts):
            x_adv = starting_point(x, attack.threat, "uniform", generator)
            for _ in range(attack.num_steps):
                x_adv = x_adv.detach().requires_grad_()
                losses = example_losses(problem.model, x_adv, y)
                worst = worst.maximum(losses.detach())  # NaN stays, and shows
                with naming_reentrant():
                    gradient = torch.autograd.grad(losses.sum(), x_adv)[0]
                x_adv = ascend(x, x_adv.detach(), gradient, attack.threat, attack.step_size)
            with torch.no_grad():
                worst = worst.maximum(example_losses(problem.model, x_adv, y))
        return worst.double().cpu()

    def reference(self, problem: Problem) -> Tensor:
        """Return the losses [N] at W."""
        numbers = range(len(problem.clean(self.chunk_size)))
        return torch.cat([self.losses(problem, k, self.reference_restarts) for k in numbers])


def _mean(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return example_losses(model, x, y).mean()


@method
class AverageFlatness(Flatness):
    """Mean rise (2) of the robust loss under random weight perturbations, each attacked anew.

    All attacks on a chunk begin at the same random starts. The standard error adds the variance over examples
    of each one's mean rise to that over draws: both are samples. (Their interaction counts twice, slightly
    too much.) With one draw it is unknown (NaN). ``parts``: ``reference_loss`` R(W), ``perturbed_loss`` mean
    of R(W + ν), ``max`` over draws of the rise, ``stderr_examples``, ``stderr_draws``.
    """

    num_draws: PositiveCount = setting(10, "D, weight perturbations.")
    name = "average_flatness"
    cost = "num_draws · num_restarts + reference_restarts attacks"

    def take(self, problem: Problem) -> Taken:
        """Return (2), average."""
        layers, reference, rows = select_layers(problem.model, self.layers), self.reference(problem), []
        for draw in range(self.num_draws):
            losses = []
            for k, (x, _) in enumerate(problem.clean(self.chunk_size)):
                generator = generator_from(x.device, problem.seed, "average_flatness", draw, k)
                with perturbed(layers.tensors, draw_perturbation(layers, self.xi, generator)) as move:
                    move(+1)
                    losses.append(self.losses(problem, k, self.num_restarts))
            rows.append(torch.cat(losses))
        rises = torch.stack(rows) - reference  # [D, N]
        by_example, by_draw = mean_and_error(rises.mean(0)), mean_and_error(rises.mean(1))
        parts = {
            "reference_loss": float(reference.mean()),
            "perturbed_loss": float(torch.stack(rows).mean()),
            "max": float(rises[rises.mean(1).argmax()].mean()),
            "stderr_examples": by_example[1],
            "stderr_draws": by_draw[1],
        }
        settings = f"xi {self.xi:g}, mean of {self.num_draws} draws, ball, one nu a chunk, "
        value = by_example[0], math.hypot(by_example[1], by_draw[1]), len(reference)
        return value, settings + attack_text(self.attack(problem, self.num_restarts)), parts


@method
class WorstFlatness(Flatness):
    """Largest rise (2) of the robust loss in the ball, by the joint ascent (5) on ν and δ.

    Of a chunk's restarts, and of their iterates, the one with the highest mean loss counts.

    The value is a lower estimate of the maximum; where 2 ξ > ``weight_lr * num_steps`` the ball is not even
    crossed. It can be negative for small ξ: the reference has more restarts. The standard error is over
    examples, ν taken as given. ``parts``: ``reference_loss``, ``perturbed_loss``.
    """

    xi: Xi = 0.00075  # the paper's main table; 0.003 in its supplement
    num_restarts: PositiveCount = setting(10, "Attempts; the worst counts.")
    weight_lr: Positive = setting(0.001, "η, step on ν over each layer's norm.")
    name = "worst_flatness"
    cost = "num_restarts + reference_restarts attacks, those with gradients in the weights too"

    def take(self, problem: Problem) -> Taken:
        """Return (2), worst, by example."""
        layers, reference, worst = select_layers(problem.model, self.layers), self.reference(problem), []
        for k, (x, y) in enumerate(problem.clean(self.chunk_size)):
            places = ((problem.seed, "worst_flatness", k, restart) for restart in range(self.num_restarts))
            generators = (generator_from(x.device, *place) for place in places)
            # [restarts, n_k]
            attempts = torch.stack([self._climbed(problem, layers, x, y, one) for one in generators])
            worst.append(attempts[attempts.mean(1).argmax()])
        losses = torch.cat(worst)
        parts = {"reference_loss": float(reference.mean()), "perturbed_loss": float(losses.mean())}
        kind = f"{self.num_restarts} restarts, one nu a chunk, best iterate, weight_lr {self.weight_lr:g}"
        settings = f"xi {self.xi:g}, {kind}, joint {attack_text(self.attack(problem, 1))}"
        return losses - reference, settings, parts

    def _climbed(
        self, problem: Problem, layers: Layers, x: Tensor, y: Tensor, generator: Generator
    ) -> Tensor:
        """Return the losses [n] of a chunk after (5) from random ν and δ, at the iterate of highest mean."""
        model, attack, norms = problem.model, self.attack(problem, 1), layers.squared_norms().sqrt()
        ν, best = draw_perturbation(layers, self.xi, generator), torch.empty(0)
        x_adv = x if attack is None else starting_point(x, attack.threat, "uniform", generator)
        with perturbed(layers.tensors, ν) as move:  # reads ν anew at every move
            move(+1)
            for _ in range(self.num_steps):
                x_adv = x_adv.detach().requires_grad_()
                loss, inputs = example_losses(model, x_adv, y).mean(), [x_adv, *layers.tensors]
                found = zip(inputs, gradients_of(loss, inputs, partial(_mean, model, x_adv, y)), strict=True)
                slope, *g = (torch.zeros_like(t) if v is None else v for t, v in found)
                if attack is not None:
                    x_adv = ascend(x, x_adv.detach(), slope, attack.threat, attack.step_size)
                steps = by_layer(layers, [one.detach() for one in g], self.weight_lr * norms)
                moved = [u + v for u, v in zip(ν, steps, strict=True)]
                lengths, radii = layers.dots(moved, moved).sqrt(), self.xi * norms
                factors = torch.where(lengths > radii, radii / lengths.clamp_min(TINY), 1.0)
                torch._foreach_copy_(ν, [t * f for t, f in zip(moved, layers.spread(factors), strict=True)])
                move(+1)
                losses = losses_of(model, [(x_adv.detach(), y)])
                if not len(best) or losses.mean() > best.mean():
                    best = losses
        return best


def draw_perturbation(layers: Layers, xi: float, generator: Generator) -> list[Tensor]:
    """Return ν of (3), one tensor for each of the layers' tensors."""
    device = layers.tensors[0].device
    z = [torch.randn(t.shape, generator=generator, device=device, dtype=t.dtype) for t in layers.tensors]
    radii = xi * layers.squared_norms().sqrt()
    u = torch.rand(len(layers), generator=generator, device=device).to(radii)
    return by_layer(layers, z, radii * u ** (1 / layers.sizes()))
