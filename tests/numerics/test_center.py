"""Rules with their centre at the weights before training: exact gradients, the bound, noise from zero on.

Legend: W⁰ weights before training, a_l = ||W_l − W_l⁰||_F², d_l, t_l, s_l, σ_l, λ as in `random_directions`.
"""

import copy

import pytest
import torch
from cases import BatchNormNet, SmoothNet, everything, image_batch, make, run, wrapped
from oracles import exact_trace
from torch import nn
from torch.distributions import Normal, kl_divergence

from wcitrain.curvature import cross_entropy
from wcitrain.measures import Problem, WeightCurvatureIndex
from wcitrain.optim import (
    AWP,
    FrobeniusPenalty,
    FrobeniusTracePenalty,
    TracePenalty,
    UniformNoise,
    WCIPenalty,
    WCIPosterior,
    record,
)
from wcitrain.params import select_layers

FROM = {"center": "initial"}


def moved(seed: int = 0, by: float = 0.1, **options):
    """A smooth network in float64 whose wrapper was made before its weights moved; images; its weights."""
    torch.manual_seed(seed)
    model = SmoothNet().double()
    optimizer, start = wrapped(model, **options), [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn_like(p))
    x, y = torch.randn(12, 4).double(), torch.randint(0, 3, (12,))
    return model, optimizer, lambda: cross_entropy(model(x), y), start


def gradients_of(model: nn.Module, value: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), materialize_grads=True))


# ---- exact gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_the_penalty_has_the_gradient_of_the_index_from_the_start(parts):
    """λ sqrt(||W − W⁰||² Tr(H)) of the dense Hessian: W for W − W⁰ in one of two places would pass by eye.

    The head alone, where the estimator is exact: its trace is the closed form, its average the same number.
    """
    rule = WCIPenalty(0.3, estimator="top_layer", center="initial")
    model, optimizer, loss_fn, start = moved(penalty=rule, num_micro_batches=parts)
    for _ in range(2):  # the first one measures
        optimizer.zero_grad()
        for _ in range(parts):
            optimizer.backward(loss_fn)
        found = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    loss, head = loss_fn().total, model.second.weight
    t = exact_trace(loss, {"second.weight": head}, create_graph=True)[0]
    expected = gradients_of(model, loss + 0.3 * ((head - start[2]).square().sum() * t).sqrt())
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-12)
    norm = (head - start[2]).square().sum().detach()
    assert optimizer.metrics()["frobenius_from_initial/second.weight"] == pytest.approx(float(norm))
    index = optimizer.metrics()["wci_from_initial/total"]
    assert index == pytest.approx(float((norm * t.detach()).sqrt()))
    assert not any(name.startswith(("wci/", "frobenius/")) for name in optimizer.metrics())


@pytest.mark.parametrize("rule", [FrobeniusPenalty, FrobeniusTracePenalty])
def test_squared_distances_pull_to_the_start(rule):
    """2 λ (W − W⁰), W⁰ kept for layers alone; a pull to zero is the very thing the centre is to replace."""
    weight = {"strength" if rule is FrobeniusPenalty else "frobenius_weight": 0.2}
    model, optimizer, loss_fn, start = moved(penalty=rule(**weight, center="initial"))
    optimizer.backward(loss_fn)
    plain = gradients_of(model, loss_fn().total)
    for p, g, w0, factor in zip(model.parameters(), plain, start, (0.4, 0, 0.4, 0), strict=True):
        torch.testing.assert_close(p.grad, g + factor * (p.detach() - w0), rtol=1e-12, atol=1e-13)


def test_the_posterior_minimises_the_bound_with_its_prior_at_the_start():
    """½ Σ σ² t + λ² KL(N(W, σ²) ‖ N(W⁰, σ²)): its minimiser is the rule's noise, its value λ times the index.

    Its gradient is that of the Frobenius term.
    """
    torch.manual_seed(0)
    w0, t, strength = [torch.randn(n).double() for n in (6, 15)], torch.tensor([3.0, 0.4]).double(), 0.05
    w = [(w + 0.3 * torch.randn_like(w)).requires_grad_() for w in w0]

    def bound(sigma: torch.Tensor) -> torch.Tensor:
        pairs = zip(w, w0, sigma, strict=True)
        kl = sum(kl_divergence(Normal(one, s), Normal(mean, s)).sum() for one, mean, s in pairs)
        return 0.5 * (sigma.square() * t).sum() + strength**2 * kl

    a = torch.stack([(one - mean).square().sum() for one, mean in zip(w, w0, strict=True)]).detach()
    d = torch.tensor([6.0, 15.0]).double()
    rule = WCIPosterior(strength=strength, frobenius=True, floor=1e-6, cap=None, center="initial")
    found = rule.posterior(a, d, t, 1.0)
    sigma = found.sigma.clone().requires_grad_()
    value = bound(sigma)
    assert float(value.detach()) == pytest.approx(strength * float((a * t).sqrt().sum()), rel=1e-12)
    slope, *pull = torch.autograd.grad(value, [sigma, *w])
    assert torch.allclose(slope, torch.zeros_like(slope), atol=1e-12)
    assert all(bound(sigma * factor) > value for factor in (0.9, 1.1))
    for one, mean, g, c in zip(w, w0, pull, found.frobenius, strict=True):
        torch.testing.assert_close(c * (one - mean), g, rtol=1e-12, atol=0)


# ---- from distance zero on ---------------------------------------------------------------------------------

NOISES = [
    WCIPosterior(0.5, **FROM),
    WCIPosterior(0.5, passes=1, **FROM),
    WCIPosterior(strength=1e-2, frobenius=True, **FROM),
    WCIPosterior(strength=1e-2, cap=None, passes=1, **FROM),
    UniformNoise(0.5, passes=1, **FROM),
    WCIPosterior(0.5, traces="gauss_newton", frobenius=True, **FROM),
]


@pytest.mark.parametrize("rule", NOISES, ids=str)
def test_the_first_step_is_the_plain_one_and_noise_follows_the_way(rule):
    """0/0 at W⁰ would be NaN for good; noise of any other size there would not be that of the bound."""
    model, optimizer = make({"perturbation": rule}, lr=0.05)
    reference, plain = make({}, lr=0.05)
    start = everything(model)
    run(model, optimizer, steps=1)
    run(reference, plain, steps=1)
    for name, value in everything(reference).items():  # ½ g + ½ g is g
        torch.testing.assert_close(everything(model)[name], value, rtol=0, atol=0)
    knows = rule.traces == "gauss_newton"
    assert (optimizer.traces() is not None and optimizer.traces().isfinite().all()) == knows
    run(model, optimizer, steps=3, start=1)
    layers = select_layers(model)
    way = torch.stack([(w.detach() - start[name]).norm() for name, w in layers.items()]).double()
    before = everything(model)
    drawn, x = [], image_batch()[0]
    model.register_forward_pre_hook(lambda *_: drawn.append(everything(model)))
    optimizer.backward(lambda: cross_entropy(model(x), torch.arange(12) % 3))
    u = torch.stack([(drawn[0][name] - before[name]).norm() for name in layers]).double()
    r = (u / way).square().mean().sqrt()
    assert float(r) == pytest.approx(float(optimizer._state.window.latest["relative_size"]), rel=1e-4)
    if rule.strength if isinstance(rule, WCIPosterior) else None:
        assert rule.cap is None or (u <= way * (1 + 1e-4)).all()
    else:
        assert float(r) == pytest.approx(0.5, rel=1e-4)
    assert torch.isfinite(optimizer.traces()).all()


@pytest.mark.parametrize("rule", [NOISES[0], NOISES[1], NOISES[5]], ids=str)
def test_autocast_trains_from_distance_zero(rule):
    """bfloat16 rounds the first noise away: estimates of it must not be infinite, nor W⁰ be rounded."""
    model, optimizer = make({"perturbation": rule})
    x, y = image_batch()
    for _ in range(4):
        optimizer.zero_grad()

        def loss():
            with torch.autocast("cpu", torch.bfloat16):
                return cross_entropy(model(x), y)

        optimizer.backward(loss)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(w.dtype == torch.float32 for w in optimizer._record["initial"].values())


def test_traces_from_growing_noise_weigh_by_its_square():
    """(4): an average of equal weights keeps the first estimates, whose noise is a hundred times the last.

    y_k = t + noise of variance 1 / σ_k², σ_k = k: the variance of the best average is 1 / Σ σ², that of the
    equal one Σ σ^-2 / n². Copies are layers. The stated error is at least the spread.
    """
    copies, n, decay = 4000, 20, 0.999999
    layers = select_layers(nn.ModuleDict({"a": nn.Linear(2, 2)}))
    own, equal = record.fresh(layers), record.fresh(layers)
    for one in (own, equal):
        one |= {key: torch.zeros(copies).double() for key in (*record.SUMS, *record.COUNTS)}
    g, sigma = torch.Generator().manual_seed(0), torch.arange(1.0, n + 1).double()
    for s in sigma:
        y = 1 + torch.randn(copies, generator=g).double() / s
        record.fold(own, y, decay, weight=s.square().expand(copies))
        record.fold(equal, y, decay)
    record.fold(own, torch.full((copies,), torch.nan).double(), decay, weight=torch.zeros(copies).double())
    (mean, error), (plain, _) = record.averages(own), record.averages(equal)
    best, worse = sigma.square().sum() ** -0.5, sigma.square().reciprocal().sum().sqrt() / n
    # A spread of 4,000 normal numbers is known to 1/sqrt(8,000) = 1.1 %, four of them 4.5 %.
    assert float(mean.std()) == pytest.approx(float(best), rel=0.045)
    assert float(plain.std()) == pytest.approx(float(worse), rel=0.045)
    assert worse > 3 * best
    assert abs(float(mean.mean()) - 1) < 4 * float(best) / copies**0.5
    assert error.square().mean().sqrt() > best


def test_estimates_of_a_run_weigh_their_squared_noise():
    """Of two pairs of steps the first began with no noise and is none; the second weighs ||u_l||²."""
    model, optimizer = make({"perturbation": UniformNoise(0.5, passes=1, **FROM)}, lr=0.05)
    start = everything(model)
    run(model, optimizer, steps=3)
    layers = select_layers(model)
    squares = torch.stack([(w.detach() - start[name]).square().sum() / 4 for name, w in layers.items()])
    run(model, optimizer, steps=1, start=3)
    weight = optimizer._record["trace_weight"]
    torch.testing.assert_close(weight, (1 - 0.98**2) * squares.double(), rtol=1e-5, atol=0)  # of float32 sums


def test_traces_of_a_run_from_the_start_are_right():
    """The rule learns traces from noise that was zero at first: one pass, against the dense Hessian."""
    torch.manual_seed(0)
    model, g = SmoothNet().double(), torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 4, generator=g).double(), torch.randint(0, 3, (64,), generator=g)
    optimizer = wrapped(model, 0.02, perturbation=WCIPosterior(0.5, passes=1, center="initial"))
    for step in range(200):
        if step == 40:  # far enough: from here on it stands still, and the traces are those of one place
            optimizer.param_groups[0]["lr"] = 0.0
        optimizer.zero_grad()
        with optimizer.perturbed():
            cross_entropy(model(x), y).total.backward()
        optimizer.step()
    exact = exact_trace(cross_entropy(model(x), y), select_layers(model))
    mean, error = record.averages(optimizer._record)
    # Truncation is O(σ²): r² = .25 of the way, which is a tenth of the weights.
    assert ((mean - exact).abs() < 4 * error + 0.02 * exact).all(), (mean, error, exact)
    assert (error < 0.3 * exact).all()


# ---- what it keeps, and what is lost -----------------------------------------------------------------------


def test_the_index_from_the_start_depends_on_scale():
    """A layer before a normalisation has no scale of its own, its W⁰ has: comparisons must know of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8, bias=False), nn.LayerNorm(8, eps=0), nn.Linear(8, 3))
    model, (x, y) = model.double(), image_batch(40)
    start = {name: value + 0.01 * torch.randn_like(value) for name, value in model.state_dict().items()}

    def index(scale: float, start: dict, center: str) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[1].weight.mul_(scale)
        problem = Problem(other, [(x.double(), y)], None, initial=start)
        return WeightCurvatureIndex(center=center).by_layer(problem).total

    rescaled = start | {"1.weight": 3 * start["1.weight"]}
    assert index(3, start, "origin") == pytest.approx(index(1, start, "origin"), rel=1e-9)
    assert index(3, rescaled, "initial") == pytest.approx(index(1, start, "initial"), rel=1e-9)
    assert index(3, start, "initial") > 2 * index(1, start, "initial")


def test_states_bring_their_start_and_those_without_one_are_told_apart():
    """A resumed run that starts from where it stopped would have no noise, and say nothing."""
    rule = {"perturbation": WCIPosterior(0.5, **FROM)}
    model, optimizer = make(rule)
    start = everything(model)
    run(model, optimizer, steps=2)
    for loaded in (True, False):
        other, resumed = make(rule, seed=5)
        mine = everything(other)
        other.load_state_dict(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict())
        if not loaded:
            state["param_groups"][0].pop("regularizer")
        resumed.load_state_dict(state)
        for name, w in resumed._record["initial"].items():
            assert torch.equal(w, (start if loaded else mine)[name])
    own, plain = make({"perturbation": WCIPosterior(0.5)})
    run(own, plain, steps=1)
    with pytest.raises(ValueError, match="load_state_dict: got a state without initial weights"):
        optimizer.load_state_dict(plain.state_dict())
    plain.load_state_dict(optimizer.state_dict())
    assert "initial" not in plain._record


def test_frozen_layers_keep_their_start_and_new_ones_begin_where_they_join():
    """Thawed again with another W⁰, a layer would have travelled nowhere."""
    torch.manual_seed(0)
    model = BatchNormNet()
    model.fc.weight.requires_grad_(False)
    optimizer = wrapped(model, 0.1, perturbation=WCIPosterior(0.5, **FROM))
    start = everything(model)
    for frozen, thawed in ((model.fc, model.fc), (model.conv, model.fc), (model.fc, model.conv)):
        run(model, optimizer, steps=2)
        frozen.weight.requires_grad_(False)
        thawed.weight.requires_grad_(True)
    run(model, optimizer, steps=1)
    assert torch.equal(optimizer._record["initial"]["conv.weight"], start["conv.weight"])
    assert torch.equal(optimizer._record["initial"]["fc.weight"], start["fc.weight"])  # had not moved


def test_parts_of_a_tensor_have_ways_of_their_own():
    """Query, key and value that share one distance would share noise: the parts are the layers."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.tanh(q * k) + v

    torch.manual_seed(0)
    model = Attention().double()
    optimizer = wrapped(model, split_qkv=True, penalty=FrobeniusPenalty(0.5, center="initial"))
    with torch.no_grad():
        model.qkv.weight[4:8] += 0.1  # the keys
    found = optimizer.metrics()
    assert [found[f"frobenius_from_initial/qkv.weight[{part}]"] for part in "qkv"] == pytest.approx(
        [0, 0.16, 0]
    )
    optimizer = wrapped(model, split_qkv=True, perturbation=UniformNoise(0.5, passes=1, **FROM))
    with torch.no_grad():
        model.qkv.weight[4:8] += 0.1
    before = model.qkv.weight.detach().clone()
    with optimizer.perturbed():
        u = model.qkv.weight.detach() - before
    assert [float(part.norm()) for part in u.chunk(3)] == pytest.approx([0, 0.5 * 0.16**0.5, 0])


@pytest.mark.parametrize("rule", [AWP, TracePenalty])
def test_rules_without_such_a_norm_have_no_centre(rule):
    """It would have no effect."""
    with pytest.raises(ValueError, match="center"):
        rule(center="initial")
