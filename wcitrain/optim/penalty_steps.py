"""The passes of the curvature penalties: g + ∇ Σ_l c_l t_l, one function an estimator, and L trace estimates for the averages.

Legend: c_l coefficients [L] held constant, v_l signs, u_l = √c_l v_l, g(W) gradient of the loss, H its Hessian, K probes.

| estimator                        | gradient of Σ c_l t_l                       | extra passes | needs                    |
|----------------------------------|---------------------------------------------|--------------|--------------------------|
| ``two_point``                    | k [g(W+u') + g(W−u') − 2 g(W)], u' = u/√k   | 2K, 2K       | nothing                  |
| ``gauss_newton``                 | autograd of Σ c_l t̂_l (`gauss_newton` eq. 1) | 0, 3K        | outputs, 2nd derivatives |
| ``hutchinson`` finite_difference | [H(W+hu) u − H(W−hu) u] / 2h                | 2K, 6K       | 2nd derivatives          |
| ``hutchinson`` autograd          | autograd of uᵀHu                            | 0, 8K        | 3rd derivatives          |
| ``top_layer``                    | autograd of the closed form                 | 0, 0         | outputs, a linear head   |

(Extra passes: forward, backward; a differentiated backward counts as two.) With coefficients zero every estimator only
measures, at less cost (gauss_newton: K backwards, hutchinson: 1 + 2K), and the gradient left is the plain one, bit for bit
(but for attention that hutchinson needs unfused, which rounds differently). Reentrant activation checkpointing works with none
of them: pass ``use_reentrant=False``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.hvp import hvp
from wcitrain.curvature.top_layer import HeadFeatures, top_layer_trace
from wcitrain.curvature.two_point import trace_from_slopes
from wcitrain.optim.passes import Passes, Slopes
from wcitrain.optim.penalty import Penalty, WCIPenalty
from wcitrain.optim.perturbed_steps import Step, spoiled_by
from wcitrain.params import wide
from wcitrain.preserve import full_precision, kept_buffers, perturbed


def penalized(
    passes: Passes, penalty: Penalty, estimator: str, factor: float, traces: Tensor | None, a: Tensor
) -> Step:
    """Leave ``g + factor · ∇ Σ_l c_l t_l`` in ``.grad`` and return the loss where the weights are, and the estimates of t_l.

    The norm terms of the penalty, which need no pass, are the caller's, and so are ``a``, the squared norms at W: beside a
    weight perturbation the pass is at W + u, and the coefficients c_l stay those of W.
    """
    d = passes.layers.sizes()
    shape, strength = penalty.trace_coefficients(a, d, traces)
    step = STEPS[estimator](passes, penalty, shape, factor * strength)
    if strength and isinstance(penalty, WCIPenalty):  # as a perturbation: ||u||² = λ Σ d_l s_l, shape = s/2
        size = (2 * factor * strength * (d * shape).sum() / a.sum()).sqrt()
        step = step._replace(relative_size=size, strength=a.new_tensor(factor * strength))
    return step


def two_point(passes: Passes, penalty: Penalty, shape: Tensor, strength: float) -> Step:
    """Differences at a small radius; strength = 0 only measures."""
    layers = passes.layers
    scale = penalty.radius * (layers.squared_norms().sum() / (layers.sizes() * shape).sum()).sqrt()
    # ||scale · √shape v|| = radius ||W||, and k = strength / scale² per probe.
    weight = float(strength / scale.square()) / penalty.num_probes if strength and scale > 0 else 0.0
    estimates, losses = [], []
    with full_precision(passes.model):
        with kept_buffers(passes.model), passes.local():
            for probe in range(penalty.num_probes):
                direction, sigma = passes.random_direction(scale * shape.sqrt(), probe)
                slopes = []
                with perturbed(layers.tensors, direction) as move:
                    for side in (+1, -1):
                        move(side)
                        if weight:
                            with Slopes(layers, direction) as slope:
                                losses.append(passes.plain(weight))
                            slopes.append(slope.values / (weight * passes.share))
                        else:
                            gradients = passes.layer_gradients(passes.evaluate().total)
                            found = layers.dots(direction, gradients)
                            slopes.append(torch.where(layers.missing(gradients), torch.nan, found))
                estimates.append(trace_from_slopes(slopes[0], slopes[1], sigma))
        traces = torch.stack(estimates).mean(0)
        if weight:
            return Step(spoiled_by(passes.plain(1 - 2 * weight * penalty.num_probes), sum(losses)), traces)
    return Step(passes.plain(), traces)


def gauss_newton(passes: Passes, penalty: Penalty, shape: Tensor, strength: float) -> Step:
    """One differentiable draw on the outputs of the pass itself."""
    loss = passes.evaluate()
    samples = gauss_newton_samples(
        loss,
        passes.layers,
        num_probes=penalty.num_probes,
        generator=passes.generator("gauss_newton"),
        create_graph=strength > 0,
        retain_graph=True,
    )
    traces = samples.mean(0)
    added = _weighted(traces, strength * shape, loss.total) if strength else None
    return Step(_backward_with(passes, loss.total, added), traces.detach())


def hutchinson(passes: Passes, penalty: Penalty, shape: Tensor, strength: float) -> Step:
    """uᵀHu, its gradient by third derivatives or by a central difference of Hessian-vector products."""
    if strength and penalty.gradient == "finite_difference":
        return _hutchinson_by_differences(passes, penalty, shape, strength)
    layers = passes.layers
    loss = passes.evaluate()
    gradients = passes.layer_gradients(loss.total, create_graph=True)
    terms, factor = [], strength or 1.0  # the directions carry √(factor · shape)
    for probe in range(penalty.num_probes):
        direction, sigma = passes.random_direction((factor * shape).sqrt(), probe)
        products = hvp(gradients, layers.tensors, direction, create_graph=strength > 0)
        terms.append(layers.dots(direction, products))
    weighted = torch.stack(terms).mean(0)  # c_l t_l: no division by the σ of a layer of zero norm
    shown = _backward_with(passes, loss.total, weighted.sum().to(loss.total) if strength else None)
    traces = weighted.detach() / wide(sigma).square()
    return Step(shown, torch.where(layers.missing(gradients), torch.nan, traces))


def _hutchinson_by_differences(passes: Passes, penalty: Penalty, shape: Tensor, strength: float) -> Step:
    """[H(W + hu) u − H(W − hu) u] / 2h with ||hu|| = radius ||W||: second derivatives only."""
    layers, share = passes.layers, passes.share
    norm = (layers.sizes() * strength * shape).sum().sqrt()  # ||u||
    size = layers.squared_norms().sum().sqrt()
    h = float(penalty.radius * torch.where(size > 0, size, 1.0) / torch.where(norm > 0, norm, 1.0))
    estimates, losses = [], []
    with full_precision(passes.model):
        with kept_buffers(passes.model), passes.local():
            for probe in range(penalty.num_probes):
                u, sigma = passes.random_direction((strength * shape).sqrt(), probe)
                found = []
                with perturbed(layers.tensors, [h * x for x in u]) as move:
                    for side in (+1, -1):
                        move(side)
                        loss = passes.evaluate().total
                        product = _inner(passes.layer_gradients(loss, create_graph=True), u, loss)
                        weight = side / (2 * h * penalty.num_probes)
                        with Slopes(layers, u) as slope:
                            passes.backward(product, weight)
                        found.append(slope.values / (weight * share))
                        losses.append(loss.detach())
                estimates.append((found[0] + found[1]) / (2 * wide(sigma).square()))
        return Step(spoiled_by(passes.plain(), sum(losses)), torch.stack(estimates).mean(0))


def top_layer(passes: Passes, penalty: Penalty, shape: Tensor, strength: float) -> Step:
    """The head's exact trace from the features of the pass itself; the head is the only layer."""
    with HeadFeatures(passes.model) as head:
        loss = passes.evaluate()
    trace = top_layer_trace(loss, head.features_of(loss)).reshape(1)
    added = _weighted(trace, strength * shape, loss.total) if strength else None
    return Step(_backward_with(passes, loss.total, added), trace.detach().to(shape))


STEPS: dict[str, Callable[[Passes, Penalty, Tensor, float], Step]] = {
    "two_point": two_point,
    "gauss_newton": gauss_newton,
    "hutchinson": hutchinson,
    "top_layer": top_layer,
}


def _backward_with(passes: Passes, total: Tensor, added: Tensor | None) -> Tensor:
    """Backward through ``total + added`` and return ``total``, NaN where what was added is not finite."""
    passes.backward(total if added is None else total + added)
    return total.detach() if added is None else spoiled_by(total.detach(), added.detach())


def _weighted(traces: Tensor, coefficients: Tensor, like: Tensor) -> Tensor:
    """Return Σ_l c_l t_l with its graph, in the loss's dtype."""
    return (coefficients.to(traces) * traces).sum().to(like.dtype)


def _inner(gradients: Sequence[Tensor | None], direction: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return <g, u> with its graph, over the layers whose gradient has one; ``0 · like`` where none has."""
    pairs = [(g, u) for g, u in zip(gradients, direction, strict=True) if g is not None and g.requires_grad]
    return torch.stack([0 * like, *((g * u).sum() for g, u in pairs)]).sum()


def extra_passes(penalty: Penalty, estimator: str) -> tuple[int, int]:
    """Return the forward and backward passes of a step beyond one each; a differentiated backward counts as two."""
    probes, is_active = penalty.num_probes, penalty.trace_strength > 0
    if estimator == "top_layer":
        return 0, 0
    if estimator == "gauss_newton":
        return 0, 3 * probes if is_active else probes
    if estimator == "hutchinson" and not is_active:
        return 0, 1 + 2 * probes
    if estimator == "hutchinson":
        return (2 * probes, 6 * probes) if penalty.gradient == "finite_difference" else (0, 8 * probes)
    return 2 * probes, 2 * probes  # two_point; "auto" before its dry run
