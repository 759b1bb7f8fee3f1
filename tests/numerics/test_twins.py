"""The weight perturbations against straight-line references: plain tensors in float64, no wrapper."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import SmoothNet, wrapped
from oracles import exact_gauss_newton_trace, exact_trace, gradients
from torch import Tensor, nn

from wcitrain import optim
from wcitrain.curvature import GaussNewton, cross_entropy
from wcitrain.optim import RegularizedOptimizer, perturbation
from wcitrain.params import select_layers

Weights = list[Tensor]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator).double(), torch.randint(0, 3, (8,), generator=generator)


def network(w: Weights, x: Tensor) -> Tensor:
    """SmoothNet as a formula of its four tensors."""
    return torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]


def gradient(w: Weights, x: Tensor, y: Tensor) -> Weights:
    w = [p.clone().requires_grad_() for p in w]
    return list(torch.autograd.grad(F.cross_entropy(network(w, x), y), w))


def plus(w: Weights, u: Weights, sign: float = 1.0) -> Weights:
    return [a + sign * b for a, b in zip(w, u, strict=True)]


def norm(g: Weights) -> Tensor:
    return torch.cat([x.flatten() for x in g]).norm()


def inner(g: Weights, h: Weights) -> Tensor:
    return torch.cat([x.flatten() for x in g]) @ torch.cat([x.flatten() for x in h])


def sam(w: Weights, x: Tensor, y: Tensor, state: dict) -> Weights:
    g = gradient(w, x, y)
    return gradient(plus(w, g, 0.1 / norm(g)), x, y)


def asam(w: Weights, x: Tensor, y: Tensor, state: dict) -> Weights:
    g, t = gradient(w, x, y), [p.abs() + 0.01 if p.ndim > 1 else torch.ones_like(p) for p in w]
    length = norm([a * b for a, b in zip(t, g, strict=True)])
    return gradient([p + 0.3 * a * a * b / length for p, a, b in zip(w, t, g, strict=True)], x, y)


def awp(w: Weights, x: Tensor, y: Tensor, state: dict) -> Weights:
    g = gradient(w, x, y)
    moved = [p + 0.05 * p.norm() * b / b.norm() if p.ndim > 1 else p for p, b in zip(w, g, strict=True)]
    return gradient(moved, x, y)


def vasso(w: Weights, x: Tensor, y: Tensor, state: dict) -> Weights:
    old = state.get("m", [torch.zeros_like(p) for p in w])
    state["m"] = m = [0.7 * a + 0.3 * b for a, b in zip(old, gradient(w, x, y), strict=True)]
    return gradient(plus(w, m, 0.1 / norm(m)), x, y)


def gsam(w: Weights, x: Tensor, y: Tensor, state: dict) -> Weights:
    g = gradient(w, x, y)
    h = gradient(plus(w, g, 0.1 / norm(g)), x, y)
    parallel = [inner(g, h) / inner(h, h) * b for b in h]
    orthogonal = plus(g, parallel, -1)
    assert abs(inner(orthogonal, h)) < 1e-12
    return plus(h, orthogonal, -0.3)


def gradient_norm(w: Weights, x: Tensor, y: Tensor, state: dict) -> Weights:
    g = gradient(w, x, y)
    there = gradient(plus(w, g, 0.05 / norm(g)), x, y)
    return [a + 0.02 * (b - a) / 0.05 for a, b in zip(g, there, strict=True)]


def cr_sam(w: Weights, x: Tensor, y: Tensor, state: dict) -> Weights:
    g = gradient(w, x, y)
    up, down = (gradient(plus(w, g, s * 0.1 / norm(g)), x, y) for s in (1, -1))
    return [u + 0.2 * (u + d - 2 * a) + 0.05 * (u - d) for a, u, d in zip(g, up, down, strict=True)]


TWINS: dict[str, tuple[object, Callable]] = {
    "sam": (optim.SAM(0.1), sam),
    "asam": (optim.ASAM(0.3), asam),
    "awp": (optim.AWP(0.05), awp),
    "vasso": (optim.VaSSO(0.1, theta=0.3), vasso),
    "gsam": (optim.GSAM(0.1, alpha=0.3), gsam),
    "gradient norm": (optim.GradientNorm(0.02, radius=0.05), gradient_norm),
    "cr-sam": (optim.CRSAM(0.1, alpha=0.2, beta=0.05), cr_sam),
}


@pytest.mark.parametrize("name", TWINS)
def test_twenty_steps_equal_the_straight_line_reference(name):
    """Momentum and weight decay act on W, not on W + u, and nothing of one step leaks into the next."""
    rule, reference = TWINS[name]
    torch.manual_seed(0)
    model = SmoothNet().double()
    w = [p.detach().clone() for p in model.parameters()]
    base = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    optimizer = RegularizedOptimizer(base, model, perturbation=rule)
    momentum, state = [torch.zeros_like(p) for p in w], {}
    start = [p.clone() for p in w]
    for step in range(20):
        x, y = batch(step)
        optimizer.step(lambda x=x, y=y: cross_entropy(model(x), y))
        g = reference(w, x, y, state)
        momentum = [0.9 * m + b + 0.01 * p for m, b, p in zip(momentum, g, w, strict=True)]
        w = plus(w, momentum, -0.2)
    # float64, the same numbers in another order: 20 steps of a map with a Lipschitz constant of 1 to 2
    for p, expected, first in zip(model.parameters(), w, start, strict=True):
        assert torch.allclose(p, expected, rtol=1e-9, atol=1e-11)
        assert (expected - first).norm() > 0.1  # and they went somewhere


@pytest.fixture
def seen(monkeypatch) -> list[Weights]:
    """The perturbations of all passes, in their order."""
    made, original = [], perturbation.perturbed
    monkeypatch.setattr(perturbation, "perturbed", lambda w, u: (made.append(u), original(w, u))[1])
    return made


def test_the_wci_adversary_has_the_posteriors_radii_and_the_gradients_direction(seen):
    """Each layer moves by sqrt(d_l) sigma_l along its own gradient; the traces are Gauss–Newton's at W."""
    torch.manual_seed(0)
    model, (x, y), rule = SmoothNet().double(), batch(0), optim.WCIAdversary(0.05)
    optimizer = wrapped(model, perturbation=rule)
    samples, layers = [], select_layers(model)
    for _ in range(400):  # every step with other signs
        optimizer.backward(lambda: cross_entropy(model(x), y))
        samples.append(optimizer._state.window.traces[-1])
        known = optimizer.traces()
        optimizer.step()
    draws, exact = torch.stack(samples), exact_gauss_newton_trace(model(x), layers)
    assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / 20).all()
    shares = optim.WCIPosterior(0.05, floor=1e-4, cap=None, size_of="network")
    posterior = shares.posterior(layers.squared_norms(), layers.sizes(), known, 1.0)
    g = torch.autograd.grad(F.cross_entropy(model(x), y), layers.tensors)
    for u, b, sigma in zip(seen[-1], g, posterior.sigma, strict=True):
        assert torch.allclose(u, sigma * u.numel() ** 0.5 * b / b.norm(), rtol=1e-10)
    assert float(norm(seen[-1]) / layers.squared_norms().sum().sqrt()) == pytest.approx(0.05)
    assert optimizer.metrics()["relative_size"] == pytest.approx(0.05)


def test_noise_stability_is_isotropic_and_measures_the_trace():
    """(W ± u) with one sigma for all tensors, biases too; the mean gradient is that of the smoothed loss."""
    torch.manual_seed(0)
    model, (x, y), sigma, rows = SmoothNet().double(), batch(0), 0.02, []
    layers, optimizer = select_layers(model, "all"), wrapped(model, perturbation=optim.NoiseStability(sigma))
    loss = F.cross_entropy(model(x), y)
    trace = exact_trace(loss, layers, create_graph=True)
    plain = gradients(loss, layers.tensors)
    smoothed = gradients(sigma**2 / 2 * trace.sum(), layers.tensors)
    for _ in range(1500):
        optimizer.zero_grad()
        optimizer.backward(lambda: cross_entropy(model(x), y))
        added = [(t.grad - g).flatten() for t, g in zip(layers.tensors, plain, strict=True)]
        rows.append(torch.cat([*added, optimizer._state.window.traces[-1]]))
        optimizer.step()
    draws, expected = torch.stack(rows), torch.cat([*(g.flatten() for g in smoothed), trace.detach()])
    error, num = draws.mean(0) - expected, len(expected) - len(trace)
    # 4.5 standard errors for each of 44 numbers; truncation is of relative order sigma² / |w|² = 1e-3
    assert (error.abs() < 4.5 * draws.std(0) / len(draws) ** 0.5 + 0.01 * expected.abs()).all()
    for part in (slice(num), slice(num, None)):  # and it is not all noise
        assert error[part].norm() < 0.3 * expected[part].norm()


def test_rwp_moves_every_filter_in_proportion_to_its_norm(seen):
    """Filters of different size get noise of their own size, a vector counts as one filter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight[1].mul_(100)
        model[0].weight[2].zero_()
    optimizer = wrapped(model, perturbation=optim.RWP(0.01, schedule=optim.StrengthSchedule(ramp=1)))
    x, y = torch.rand(4, 2, 3, 3).double(), torch.tensor([0, 1, 0, 1])
    for _ in range(300):
        optimizer.step(lambda: cross_entropy(model(x), y))
    draws, bias = (torch.stack([u[i] for u in seen[1:]]) for i in (0, 1))  # the first is at half strength
    size, norms = draws.square().mean((0, 2, 3, 4)).sqrt(), model[0].weight.detach().flatten(1).norm(dim=1)
    # 299 * 18 numbers a filter: their standard deviation is known to 1 %
    assert torch.allclose(size, 0.01 * norms, rtol=0.05)
    wanted = 0.01 * float(model[0].bias.detach().norm())
    assert float(bias.square().mean().sqrt()) == pytest.approx(wanted, rel=0.15)


def test_rwp_mixes_the_two_gradients_in_its_proportion(seen):
    """(1 − α) g(W) + α g(W + u): with the two weights exchanged a run looks as healthy as before."""
    torch.manual_seed(0)
    model, (x, y) = SmoothNet().double(), batch(0)
    wrapped(model, perturbation=optim.RWP(0.3, mixing=0.3)).backward(lambda: cross_entropy(model(x), y))
    w = [p.detach() for p in model.parameters()]
    here, there = gradient(w, x, y), gradient(plus(w, seen[0]), x, y)
    for p, a, b in zip(model.parameters(), here, there, strict=True):
        assert torch.allclose(p.grad, 0.7 * a + 0.3 * b, atol=1e-13)
        assert not torch.allclose(a, b, atol=1e-3)


def test_the_coefficients_of_a_composed_penalty_are_those_of_the_unperturbed_weights(monkeypatch):
    """½ λ sqrt(a/t) with a at W + u, and ½ λ sqrt(t/a) with a at W, would be the gradient of no function."""
    seen, original = [], optim.WCIPenalty.trace_coefficients
    watched = lambda self, a, d, t: (seen.append(a), original(self, a, d, t))[1]  # noqa: E731
    monkeypatch.setattr(optim.WCIPenalty, "trace_coefficients", watched)
    model, (x, y) = SmoothNet().double(), batch(0)
    penalty = optim.WCIPenalty(0.5, estimator="gauss_newton")
    optimizer = wrapped(model, perturbation=optim.AWP(0.5), penalty=penalty)
    for _ in range(2):
        optimizer.step(lambda: cross_entropy(model(x), y))
    assert all(torch.equal(a, select_layers(model).squared_norms()) for a in seen)


def test_a_penalty_composed_with_an_ascent_is_the_penalty_at_the_perturbed_weights():
    """Loss plus penalty at W + u, with u from the loss alone, and the norm term at W."""
    torch.manual_seed(0)
    model, (x, y) = SmoothNet().double(), batch(0)
    moved, layers = copy.deepcopy(model), select_layers(model)
    g = torch.autograd.grad(F.cross_entropy(model(x), y), layers.tensors)
    with torch.no_grad():
        for t, b in zip(select_layers(moved).tensors, g, strict=True):
            t += 0.05 * t.norm() * b / b.norm()
    composed = optim.FrobeniusTracePenalty(0.01, 0.05, GaussNewton(2))
    alone = optim.TracePenalty(0.05, GaussNewton(2))
    both = {"perturbation": optim.AWP(0.05), "penalty": composed}
    for net, rules in ((model, both), (moved, {"penalty": alone})):
        wrapped(net, **rules, seed=3).backward(lambda net=net: cross_entropy(net(x), y))
    for (name, p), q in zip(model.named_parameters(), moved.parameters(), strict=True):
        norm_term = 2 * 0.01 * p.detach() if "weight" in name else 0.0
        assert torch.allclose(p.grad, q.grad + norm_term, atol=1e-12), name
