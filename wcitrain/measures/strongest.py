"""The attack behind the flatness measures, PGD that keeps its best point, and the ball the weights move in.

Legend: x images [B, *dims], W_l weights of layer l, ν_l perturbation, d_l = numel(W_l), U uniform in [0, 1].

A ball per layer, relative to the layer's own length (Stutz, Hein & Schiele, ICCV 2021, section 3):

    B_ξ(W) = { W + ν : ||ν_l|| <= ξ ||W_l|| for all l }                                                    (1)
    ν_l = r_l ξ ||W_l|| z_l / ||z_l||,   z_l ~ N(0, I)                                                     (2)
    "sphere": r_l = 1,    "ball": r_l = U^(1/d_l) (uniform in the ball),    "radius": r_l = U              (3)

and the ascent on weights and images together, δ the perturbation of the images, g_l the gradient of a chunk's
mean loss in layer l, η ``weight_lr``, s the steepest step of the threat's norm:

    δ ← Box Project( δ + step s(∇_δ ℓ) ),    ν_l ← Project( ν_l + η ||W_l|| g_l / ||g_l|| )                (4)

With one ν for many chunks and η beyond ξ each chunk's step overwrites what the chunks before have found: the
last iterate is nearly the last chunk's own worst direction. A zero layer (a bias at its start) stays.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wcitrain.attacks import ThreatModel
from wcitrain.attacks.ascent import ascend, check_images, starting_point
from wcitrain.measures.adversarial import Chunks, example_losses, losses_of
from wcitrain.optim.ascent import by_layer
from wcitrain.params import Layers
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from

SAMPLERS = ("sphere", "ball", "radius")
STEP_OVER_EPS = 0.007 / (8 / 255)  # 0.223: the step 0.007 of Stutz et al. as a share of their radius 8/255
L1_SHARE = 0.05


def attack_step(threat: ThreatModel | None, step_size: float | None) -> float:
    """Return the step in the threat's norm; by default 0.223 eps (0.007 for 8/255), whatever their number."""
    if step_size is not None:
        return step_size
    return 0.0 if threat is None else STEP_OVER_EPS * threat.eps


def strongest(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel | None,
    *,
    num_steps: int,
    step_size: float,
    num_restarts: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return each example's image of highest cross-entropy that PGD visited, and these losses [B].

    ``adversarial.attacked`` takes the last iterate; here all ``num_steps + 1`` iterates of all restarts
    compete, the random starts included, the clean images not. Cost: ``num_steps + 1`` forward and
    ``num_steps`` backward passes a restart.

    Args:
        model: Inside ``measuring``.
        x, y: Images in [0, 1] and classes.
        threat: The adversary; None returns the clean images and their losses.
        num_steps, num_restarts: Of PGD, >= 0 and >= 1.
        step_size: In the threat's norm.
        generator: Source of the uniform starts.
    """
    if threat is None:
        with torch.no_grad():
            return x, example_losses(model, x, y)
    check_images(x, "strongest")
    x = x.detach()
    worst, worst_losses = x, x.new_full((len(x),), -torch.inf)
    for _ in range(num_restarts):
        x_adv = starting_point(x, threat, "uniform", generator)
        for step in range(num_steps + 1):
            is_last = step == num_steps
            x_adv = x_adv.detach().requires_grad_(not is_last)
            with torch.set_grad_enabled(not is_last):
                losses = example_losses(model, x_adv, y)
            # A loss that is no number counts as worst, and shows.
            is_worse = ~(losses.detach() <= worst_losses)
            worst = torch.where(is_worse.reshape(-1, *[1] * (x.ndim - 1)), x_adv.detach(), worst)
            worst_losses = torch.where(is_worse, losses.detach(), worst_losses)
            if not is_last:
                gradient = torch.autograd.grad(losses.sum(), x_adv)[0]
                x_adv = ascend(x, x_adv.detach(), gradient, threat, step_size, L1_SHARE)
    return worst, worst_losses


class Adversary(NamedTuple):
    """The adversary on images: ``attack(model, chunks, k, restarts)`` returns the losses [n_k] of chunk k."""

    threat: ThreatModel | None
    num_steps: int
    step_size: float
    seed: int

    def __call__(self, model: nn.Module, chunks: Chunks, k: int, num_restarts: int) -> Tensor:
        """Return the losses; the starts are a function of seed and k."""
        x, y = chunks[k]
        _, losses = strongest(
            model,
            x,
            y,
            self.threat,
            num_steps=self.num_steps,
            step_size=self.step_size,
            num_restarts=num_restarts,
            generator=generator_from(x.device, self.seed, "attack", k),
        )
        return losses.double().cpu()


def joint_ascent(
    model: nn.Module,
    layers: Layers,
    group: Chunks,
    attack: Adversary,
    *,
    xi: float,
    sampler: str,
    weight_lr: float,
    keep: str,
    generator: torch.Generator,
) -> Tensor:
    """Return the losses [n] of a group of chunks, which share a ν, after (4) from random ν and δ.

    Args:
        group: The chunks; they take turns, ``attack.num_steps`` rounds.
        xi, sampler: Radius of the ball, and how the first ν is drawn in it.
        weight_lr: η.
        keep: The ``"last"`` iterate, or the ``"best"`` after a round.
        generator: Source of the starts.
    """
    threat = attack.threat
    norms = layers.squared_norms().sqrt()
    ν = draw_perturbation(layers, xi, sampler, generator)
    images = [x if threat is None else starting_point(x, threat, "uniform", generator) for x, _ in group]
    best: Tensor | None = None
    with perturbed(layers.tensors, ν) as move:  # reads ν anew at every move
        for step in range(attack.num_steps):
            for k, (x, y) in enumerate(group):
                move(+1)
                x_adv = images[k].detach().requires_grad_()
                loss = example_losses(model, x_adv, y).mean()
                slope, *g = torch.autograd.grad(
                    loss, [x_adv, *layers.tensors], allow_unused=True, materialize_grads=True
                )
                if threat is not None:
                    images[k] = ascend(x, x_adv.detach(), slope, threat, attack.step_size, L1_SHARE)
                ascent = by_layer(layers, g, weight_lr * norms)
                moved = [u + v for u, v in zip(ν, ascent, strict=True)]
                torch._foreach_copy_(ν, project_per_layer(layers, moved, xi * norms))
            if keep == "best" or step == attack.num_steps - 1:
                move(+1)
                losses = losses_of(model, [(z.detach(), y) for z, (_, y) in zip(images, group, strict=True)])
                if best is None or keep == "last" or losses.mean() > best.mean():
                    best = losses
    assert best is not None
    return best


def draw_perturbation(layers: Layers, xi: float, sampler: str, generator: torch.Generator) -> list[Tensor]:
    """Return ν of (2) with the radii (3), one tensor for each of the layers' tensors."""
    device = layers.tensors[0].device
    z = [torch.randn(t.shape, generator=generator, device=device, dtype=t.dtype) for t in layers.tensors]
    radii = xi * layers.squared_norms().sqrt()
    if sampler != "sphere":
        u = torch.rand(len(layers), generator=generator, device=device).to(radii)
        radii = radii * (u ** (1 / layers.sizes()) if sampler == "ball" else u)
    return by_layer(layers, z, radii)


def project_per_layer(layers: Layers, ν: list[Tensor], radii: Tensor) -> list[Tensor]:
    """Return the closest point to ν of the ball with ``radii`` [L]."""
    lengths = layers.dots(ν, ν).sqrt()
    factors = torch.where(lengths > radii, radii / lengths.clamp_min(torch.finfo(radii.dtype).tiny), 1.0)
    return [t * f for t, f in zip(ν, layers.spread(factors), strict=True)]
