"""The passes of the weight perturbations: the gradient at W where a rule needs it, then those at W + u and W − u.

The order is always W, W + u, W − u, each only where its weight is not zero; all but the last run on their own process.
Running statistics move in the pass at W if there is one, else in the last.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.two_point import trace_from_slopes
from wcitrain.optim.ascent import GSAM, Ascent
from wcitrain.optim.passes import Captured, Passes, Slopes
from wcitrain.optim.perturbation import RWP, TINY, Combination, Noise, WeightPerturbation
from wcitrain.preserve import kept_buffers, perturbed


class Step(NamedTuple):
    """What a rule leaves beside the gradients."""

    loss: Tensor
    traces: Tensor | None = None  # estimates of t_l [L]
    relative_size: Tensor | None = None  # ||u|| / ||W||
    strength: Tensor | None = None  # λ of the posterior this step amounts to, NaN where there is none
    memory: list[Tensor] | None = None  # the smoothed gradient, for rules that keep one


LastPass = Callable[[], Step]


def perturbed_step(
    passes: Passes,
    rule: WeightPerturbation,
    factor: float,
    traces: Tensor | None,
    memory: Sequence[Tensor] | None = None,
    last_pass: LastPass | None = None,
) -> Step:
    """Make the passes of ``rule`` and leave its gradient in ``.grad``.

    Args:
        factor: Share of full strength, > 0.
        traces: Running averages of t_l [L], None before any.
        memory: The smoothed gradient so far; None before any.
        last_pass: What to do at W + u instead of a plain pass (a penalty there); only where its gradient is taken alone.
    """
    if isinstance(rule, Ascent):
        return ascending(passes, rule, factor, traces, memory, last_pass)
    assert isinstance(rule, Noise | RWP)
    return sampling(passes, rule, factor, traces, last_pass)


def ascending(
    passes: Passes,
    rule: Ascent,
    factor: float,
    traces: Tensor | None,
    memory: Sequence[Tensor] | None,
    last_pass: LastPass | None,
) -> Step:
    """The gradient at W gives the direction; its own weight, where it has one, is added in that same pass."""
    layers, weights, estimate = passes.layers, rule.combination(factor), None
    with passes.local():
        if weights.here:
            with Captured(layers, weights.here * passes.share) as captured:
                loss = passes.plain(weights.here)
            found: Sequence[Tensor | None] = captured.gradients
        else:
            evaluated = passes.evaluate()
            loss = evaluated.total.detach()
            found = passes.layer_gradients(evaluated.total, retain_graph=rule.measures_traces)
            if rule.measures_traces:
                estimate = gauss_newton_samples(evaluated, layers, generator=passes.generator("gauss_newton")).mean(0)
    g = passes.filled(found)
    smoothed = None
    if rule.smoothing is not None:
        past = memory or [torch.zeros_like(x) for x in g]
        smoothed = [(1 - rule.smoothing) * m + rule.smoothing * x for m, x in zip(past, g, strict=True)]
    direction = rule.displacement(layers, smoothed or g, factor, traces)
    size = _relative_size(passes, direction)
    if isinstance(rule, GSAM):
        last_pass = lambda: Step(passes.plain_weighed(lambda there: rule.weight_there(layers, g, there)))  # noqa: E731
    last, losses, _ = _combined(passes, direction, weights, keep_statistics=True, last_pass=last_pass)
    shown = spoiled_by(loss, sum(losses))
    return Step(shown, estimate if last.traces is None else last.traces, size, last.strength, smoothed)


def sampling(
    passes: Passes, rule: Noise | RWP, factor: float, traces: Tensor | None, last_pass: LastPass | None
) -> Step:
    """A random direction; the antithetic pair also gives the traces, from its difference, for free."""
    layers, model, weights = passes.layers, passes.model, rule.combination(factor)
    posterior = None
    if isinstance(rule, Noise):
        posterior = rule.posterior(layers.squared_norms(), layers.sizes(), traces, factor)
    loss = None
    if weights.here:
        with passes.local():
            loss = passes.plain(weights.here)
    elif rule.statistics == "clean" and has_running_statistics(model):
        with torch.no_grad(), passes.local():
            loss = passes.evaluate(needs_graph=False).total
    if isinstance(rule, RWP):
        direction, sigma = rule.draw(passes, factor), None
    else:
        assert posterior is not None
        direction, sigma = passes.random_direction(posterior.sigma, gaussian=rule.is_gaussian)
    size = _relative_size(passes, direction) if posterior is None else posterior.relative_size
    last, losses, slopes = _combined(
        passes,
        direction,
        weights,
        keep_statistics=loss is not None,
        needs_slopes=sigma is not None,
        last_pass=last_pass,
    )
    mean = torch.stack(losses).mean()
    shown = mean if loss is None else spoiled_by(loss, mean)
    if posterior is None or sigma is None:
        return Step(shown, last.traces, size, last.strength)
    passes.add_norm_gradients(posterior.frobenius)
    estimate = trace_from_slopes(slopes[0].values, slopes[1].values, sigma) / (weights.plus * passes.share)
    return Step(shown, estimate, size, posterior.strength)


def _combined(
    passes: Passes,
    direction: list[Tensor],
    weights: Combination,
    *,
    keep_statistics: bool,
    needs_slopes: bool = False,
    last_pass: LastPass | None = None,
) -> tuple[Step, list[Tensor], list[Slopes]]:
    """Add the weighed gradients at W + u and W − u; return the last pass, the losses, and the slopes along u."""
    places = [(+1, weights.plus), (-1, weights.minus)] if weights.minus else [(+1, weights.plus)]
    losses, all_slopes, last = [], [], None
    with perturbed(passes.layers.tensors, direction) as move:
        for number, (sign, weight) in enumerate(places):
            is_last = number == len(places) - 1
            with ExitStack() as stack:
                stack.enter_context(nullcontext() if is_last else passes.local())
                stack.enter_context(kept_buffers(passes.model) if keep_statistics or not is_last else nullcontext())
                slopes = Slopes(passes.layers, direction)
                if needs_slopes:
                    stack.enter_context(slopes)
                move(sign)
                last = last_pass() if is_last and last_pass is not None else Step(passes.plain(weight))
            losses.append(last.loss)
            all_slopes.append(slopes)
    assert last is not None
    return last, losses, all_slopes


def _relative_size(passes: Passes, direction: list[Tensor]) -> Tensor:
    """Return ||u|| / ||W||."""
    layers = passes.layers
    return (layers.squares(direction).sum() / layers.squared_norms().sum().clamp_min(TINY)).sqrt()


def spoiled_by(loss: Tensor, other: Tensor | float) -> Tensor:
    """Return ``loss``, or NaN where ``other`` is not finite: a bad perturbed pass must not hide behind a good loss."""
    return loss + 0.0 * other


def has_running_statistics(model: nn.Module) -> bool:
    """Tell whether a forward pass in train mode moves anything."""
    return any(getattr(m, "running_mean", None) is not None for m in model.modules())


def extra_passes(rule: WeightPerturbation, model: nn.Module) -> tuple[int, int]:
    """Return the forward and backward passes of a step beyond one each."""
    weights = rule.combination()
    moved = 1 + (weights.minus != 0)
    if isinstance(rule, Ascent):
        return moved, moved + rule.measures_traces
    is_clean = isinstance(rule, Noise | RWP) and rule.statistics == "clean" and has_running_statistics(model)
    here = weights.here != 0
    return moved - 1 + (here or is_clean), moved - 1 + here
