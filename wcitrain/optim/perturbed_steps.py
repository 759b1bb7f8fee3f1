"""The passes of the weight perturbations: AWP's ascent, and the antithetic pair of the random ones."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wcitrain.curvature.two_point import trace_from_slopes
from wcitrain.optim.passes import Passes, Slopes
from wcitrain.optim.perturbation import AWP, Posterior, UniformNoise, WCIPosterior
from wcitrain.preserve import kept_buffers, perturbed


class Step(NamedTuple):
    """What a rule leaves beside the gradients: the loss, its estimate of t_l [L], the posterior it amounts to."""

    loss: Tensor
    traces: Tensor | None = None
    posterior: Posterior | None = None


def adversarial(passes: Passes, rule: AWP, factor: float) -> Step:
    """AWP: ascend along the local gradient, take the gradient there."""
    layers = passes.layers
    with passes.local():
        loss = passes.evaluate().total
        found = passes.layer_gradients(loss)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(layers.tensors, found, strict=True)]
    radii = rule.radii(layers.squared_norms(), factor)
    lengths = layers.dots(gradients, gradients).sqrt()
    scales = torch.where(lengths > 0, radii / lengths.clamp_min(1e-30), 0.0)
    direction = [g * s for g, s in zip(gradients, layers.spread(scales), strict=True)]
    with kept_buffers(passes.model), perturbed(layers.tensors, direction) as move:
        move(+1)
        loss_there = passes.plain()
    return Step(spoiled_by(loss.detach(), loss_there))


def antithetic(passes: Passes, rule: WCIPosterior | UniformNoise, factor: float, traces: Tensor | None) -> Step:
    """Posterior: the mean of the gradients at W + u and W − u, and the traces from their difference for free."""
    layers, model = passes.layers, passes.model
    posterior = rule.posterior(layers.squared_norms(), layers.sizes(), traces, factor)
    use_clean_statistics = rule.statistics == "clean" and has_running_statistics(model)
    if use_clean_statistics:
        with torch.no_grad(), passes.local():
            loss = passes.evaluate(needs_graph=False).total
    direction, sigma = passes.random_direction(posterior.sigma)
    with perturbed(layers.tensors, direction) as move:
        with kept_buffers(model), passes.local(), Slopes(layers, direction) as plus:
            move(+1)
            loss_plus = passes.plain(0.5)
        with kept_buffers(model) if use_clean_statistics else nullcontext(), Slopes(layers, direction) as minus:
            move(-1)
            loss_minus = passes.plain(0.5)
    passes.add_norm_gradients(posterior.frobenius)
    estimate = trace_from_slopes(plus.values, minus.values, sigma) / (0.5 * passes.share)
    mean = (loss_plus + loss_minus) / 2
    return Step(spoiled_by(loss, mean) if use_clean_statistics else mean, estimate, posterior)


def spoiled_by(loss: Tensor, other: Tensor | float) -> Tensor:
    """Return ``loss``, or NaN where ``other`` is not finite: a bad perturbed pass must not hide behind a good loss."""
    return loss + 0.0 * other


def has_running_statistics(model: nn.Module) -> bool:
    """Tell whether a forward pass in train mode moves anything."""
    return any(getattr(m, "running_mean", None) is not None for m in model.modules())
