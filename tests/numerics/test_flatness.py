"""Flatness and sharpness against second order, closed forms of linear models and the dense Hessian."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, image_batch
from oracles import dense_hessian, exact_trace
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.curvature import TraceEstimate, cross_entropy
from wcitrain.measures import Measurement, Problem
from wcitrain.measures.flatness import AverageFlatness, WorstFlatness, draw_perturbation
from wcitrain.measures.means import chunk_mean_and_error, example_losses
from wcitrain.measures.sharpness import (
    ASAMSharpness,
    AverageSharpness,
    AWPSharpness,
    SAMSharpness,
    WorstSharpness,
    largest_rise,
)
from wcitrain.params import select_layers
from wcitrain.seeding import generator_from

EPS = ThreatModel("linf", 0.1)


def stationary_regression(
    classes: int = 3, bias: bool = True
) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Softmax regression at the minimum of its clean loss on random labels: gradient zero, Hessian known."""
    torch.manual_seed(0)
    model = nn.Linear(4, classes, bias=bias).double()
    x, y = torch.rand(90, 4).double(), torch.randint(0, classes, (90,))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-8
    optimizer.zero_grad()
    return model, x, y


def binary_model(seed: int = 0) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Two classes, linear: the worst linf images are known. Images far from the border of the box."""
    torch.manual_seed(seed)
    model = nn.Linear(5, 2).double()
    return model, 0.3 + 0.4 * torch.rand(40, 5).double(), torch.randint(0, 2, (40,))


def robust_losses(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The exact worst-case losses [N] of two classes: softplus(z_other − z_y + eps ||w_other − w_y||_1)."""
    w, b = weight[1 - y] - weight[y], bias[1 - y] - bias[y]
    return F.softplus((w * x).sum(1) + b + EPS.eps * w.abs().sum(1))


def average(model, x, y, threat=None, seed=0, **settings) -> Measurement:
    return AverageFlatness(**settings).measure(Problem(model, [(x, y)], threat, seed))


def worst(model, x, y, threat=None, **settings) -> Measurement:
    return WorstFlatness(**settings).measure(Problem(model, [(x, y)], threat))


def test_average_flatness_is_the_sum_of_squared_wci_over_sizes():
    """(ξ²/2) Σ a t / (d + 2) ties Stutz's measure to the index; a wrong norm, factor or layer set shows here.

    Odd orders vanish in the mean over ν: what is left out is of relative order ξ² = 4e-4. Only draws err.
    """
    model, x, y = stationary_regression()
    layers = select_layers(model, "weights+biases")
    a, t = layers.squared_norms(), exact_trace(cross_entropy(model(x), y), layers)
    truth = 0.02**2 / 2 * float((a * t / (layers.sizes() + 2)).sum())
    result = average(model, x, y, xi=0.02, num_draws=600)
    error = result.parts["stderr_draws"]
    assert 4 * error < 0.2 * truth  # without the 2, on the sphere, it would be 24 % more
    assert abs(result.value - truth) < 4 * error + 1e-3 * truth


def test_average_flatness_attacks_every_perturbed_model_anew():
    """With old adversarial images the rise is underestimated; here the worst case at W + ν is known.

    20 steps of 0.223 eps cross the ball from any start; a linear model's best iterate is then the worst case.
    Each of the chunks of 16, 16 and 8 has ν of its own.
    """
    model, x, y = binary_model()
    layers = select_layers(model, "weights+biases")
    W, b = model.weight.detach(), model.bias.detach()
    moved = []
    for draw in range(3):
        losses = []
        for k, rows in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
            ν = draw_perturbation(layers, 0.5, generator_from("cpu", 7, "average_flatness", draw, k))
            losses.append(robust_losses(W + ν[0], b + ν[1], x[rows], y[rows]))
        moved.append(torch.cat(losses).mean())
    reference = robust_losses(W, b, x, y).mean()
    result = average(model, x, y, EPS, num_draws=3, chunk_size=16, seed=7)
    assert result.parts["reference_loss"] == pytest.approx(float(reference), rel=1e-12)
    assert result.value == pytest.approx(float(torch.stack(moved).mean() - reference), rel=1e-10)
    assert result.parts["max"] == pytest.approx(float(max(moved) - reference), rel=1e-10)


def test_perturbations_have_the_radius_of_their_layer_and_leave_normalisation_alone():
    """A global norm, or moving BatchNorm's scales, is another measure."""
    model = BatchNormNet().double()
    layers = select_layers(model, "weights+biases")
    assert tuple(layers) == ("conv.weight", "fc.weight", "fc.bias")
    for draw in range(20):
        ν = draw_perturbation(layers, 0.5, generator_from("cpu", draw))
        shares = torch.stack([u.norm() / w.norm() for u, w in zip(ν, layers.tensors, strict=True)])
        assert bool((shares <= 0.5 * (1 + 1e-12)).all())
        assert shares[0] > 0.4  # of 36 dimensions: most of a ball is near its surface
    with torch.no_grad():
        model.fc.bias.zero_()
    assert not draw_perturbation(layers, 0.5, generator_from("cpu", 0))[2].any()


def test_the_error_covers_examples_and_draws():
    """An error over one of the two alone is too small: differences between models would look significant.

    60 repetitions: the deviation of z is known to 9 %; the interaction counts twice, so it may be below 1.
    """
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.mul_(6)
    x, y = torch.rand(2000, 4).double(), torch.randint(0, 3, (2000,))
    truth = average(model, x, y, num_draws=800, chunk_size=2000)
    z, shares = [], []
    for seed in range(60):
        rows = torch.randint(0, 2000, (40,), generator=torch.Generator().manual_seed(seed))
        result = average(model, x[rows], y[rows], num_draws=8, seed=seed)
        z.append((result.value - truth.value) / result.stderr)
        shares.append(result.parts["stderr_draws"] / result.stderr)
    assert truth.stderr < 0.2 * result.stderr
    assert 0.75 < torch.tensor(z).std() < 1.3
    assert abs(torch.tensor(z).mean()) < 4 / math.sqrt(60)
    assert 0.1 < torch.tensor(shares).mean() < 0.99  # both kinds matter in this test


def test_the_best_iterate_is_kept(monkeypatch):
    """The last iterate of large steps is not the worst: the reference is too low, flatness too high."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        model[1].weight.mul_(6)
    x, y = image_batch(60)
    x = x.double()
    threat = ThreatModel("linf", 0.3)

    def best(num_steps: int, num_restarts: int = 1) -> torch.Tensor:
        return AverageFlatness(num_steps=num_steps).losses(Problem(model, [(x, y)], threat), 0, num_restarts)

    monkeypatch.setattr("wcitrain.measures.flatness.STEP_OVER_EPS", 1.0)
    last = Attack(threat, 8, 0.3)(model, x, y, generator_from("cpu", 0, "attack", 0))
    last_losses = example_losses(model, last, y).detach()
    assert bool((best(8) >= last_losses - 1e-12).all())
    assert (best(8) - last_losses).max() > 0.01
    for less, more in [(best(1), best(8)), (best(8), best(8, 3))]:
        assert bool((more >= less).all())
        assert bool((more > less).any())


@pytest.mark.parametrize("threat", [None, EPS], ids=["clean", "linf"])
def test_for_small_xi_worst_flatness_is_the_relative_gradient_norm(threat):
    """ξ Σ_l ||W_l|| ||g_l||: leaving the ball, a wrong radius or a ν for all chunks shows as a factor.

    The closed robust loss gives g of every chunk. Second order is of relative order ξ.
    """
    model, x, y = binary_model()

    def slope(rows: slice) -> float:
        W, b = (p.detach().clone().requires_grad_() for p in model.parameters())
        clean = F.cross_entropy(x[rows] @ W.T + b, y[rows], reduction="none")
        losses = clean if threat is None else robust_losses(W, b, x[rows], y[rows])
        g = torch.autograd.grad(losses.mean(), (W, b))
        return sum(float(w.detach().norm() * v.norm()) for w, v in zip((W, b), g, strict=True))

    truth = 1e-4 * (slope(slice(0, 20)) + slope(slice(20, 40))) / 2
    result = worst(model, x, y, threat, xi=1e-4, chunk_size=20, num_restarts=2)
    # By hand: curvature over slope, times ξ, is below 10 ξ = 1e-3; steps on the images reach the worst case.
    assert result.value == pytest.approx(truth, rel=2e-3)
    assert result.num_examples == 40


def test_more_restarts_never_make_it_smaller():
    """A maximum over attempts that is not one would depend on the order of the attempts."""
    torch.manual_seed(1)
    layers = nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)
    model, (x, y) = nn.Sequential(*layers).double(), image_batch(30)
    options = {"xi": 0.5, "weight_lr": 0.3, "num_steps": 5, "chunk_size": 15}
    values = [worst(model, x.double(), y, EPS, **options, num_restarts=num).value for num in (1, 4)]
    assert values[0] < values[1]  # the first is not best in both chunks


def by_hand(measure, W: torch.Tensor, b: torch.Tensor, gW: torch.Tensor, gb: torch.Tensor):
    """The moved weight and bias, from the papers' formulas."""
    if isinstance(measure, SAMSharpness):
        length = (gW.square().sum() + gb.square().sum()).sqrt()
        return W + 0.1 * gW / length, b + 0.1 * gb / length
    if isinstance(measure, ASAMSharpness):  # T = 1 for the bias
        length = ((W * gW).square().sum() + gb.square().sum()).sqrt()
        return W + 0.3 * W.square() * gW / length, b + 0.3 * gb / length
    return W + 0.2 * W.norm() * gW / gW.norm(), b


@pytest.mark.parametrize(("kind", "radius"), [(SAMSharpness, 0.1), (ASAMSharpness, 0.3), (AWPSharpness, 0.2)])
def test_one_step_of_the_robust_loss_is_the_closed_form(kind, radius):
    """Gradient of all examples; each rule's own radius; the attack at W + u.

    A binary linear model under linf, where the worst images are known exactly; chunks of 7 do not divide 40.
    """
    measure = kind(radius)
    model, x, y = binary_model()
    W, b = (p.detach().clone().requires_grad_() for p in (model.weight, model.bias))
    gW, gb = torch.autograd.grad(robust_losses(W, b, x, y).mean(), (W, b))
    with torch.no_grad():
        W1, b1 = by_hand(measure, W, b, gW, gb)
        before, after = robust_losses(W, b, x, y), robust_losses(W1, b1, x, y)
    rise = after - before
    result = measure.measure(Problem(model, [(x, y)], EPS, chunk_size=7))
    # float64, 10 attack steps that agree in every sign
    assert result.value == pytest.approx(float(rise.mean()), rel=1e-9)
    assert result.stderr == pytest.approx(float(rise.std()) / math.sqrt(40), rel=1e-9)
    assert result.parts["loss"] == pytest.approx(float(before.mean()), rel=1e-12)


class Held(Problem):
    """Attacks once, and keeps the images found then."""

    def attacked_anew(self, chunks):
        self.kept = getattr(self, "kept", None) or super().attacked_anew(chunks)
        return self.kept


@pytest.mark.parametrize("measure", [SAMSharpness(2.0), AverageSharpness(0.5), WorstSharpness(0.5)])
def test_the_attack_is_run_anew_at_the_moved_weights(measure, monkeypatch):
    """Above, no sign changes and the worst images stay so; in l2 those found at W are too weak at W + u."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    _, x, y = binary_model()
    arguments = model, [(x, y)], ThreatModel("l2", 0.3)
    anew = measure.measure(Problem(*arguments)).value
    monkeypatch.setattr("wcitrain.measures.sharpness.Problem", Held)
    assert anew > measure.measure(Held(*arguments)).value + 1e-6


@pytest.fixture(scope="module")
def stationary():
    """A model without bias at its minimum, its clean problem, and its Hessian [12, 12]."""
    model, x, y = stationary_regression(bias=False)
    H = dense_hessian(cross_entropy(model(x), y), {"w": model.weight})["w"]
    return model, [(x, y)], H


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_sharpness_of_small_noise_is_the_weighted_trace(stationary, adaptive):
    """(ρ²/2) Σ c_i² H_ii at a stationary point: a radius ρ in place of a deviation gives d = 12 times less.

    16 seeds of 60 draws, so that the error is known; the rest is of relative order ρ² = 1e-4.
    """
    model, data, H = stationary
    c = model.weight.detach().flatten().abs() if adaptive else torch.ones(12).double()
    truth = 0.01**2 / 2 * float((c.square() * H.diagonal()).sum())
    measure = AverageSharpness(0.01, adaptive=adaptive, num_draws=60)
    values = torch.tensor([measure.measure(Problem(model, data, seed=seed)).value for seed in range(16)])
    error = float(values.std()) / 4
    assert error < 0.05 * truth
    assert abs(float(values.mean()) - truth) < 4 * error


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_sharpness_is_the_largest_eigenvalue(stationary, adaptive):
    """(ρ²/2) λ_max(H ⊙ c cᵀ): a step that is steepest in u instead of u/c would find less.

    Third order is of relative order ρ = 1e-3; 40 steps of a shifted power iteration leave less.
    """
    model, data, H = stationary
    c = model.weight.detach().flatten().abs() if adaptive else torch.ones(12).double()
    truth = 1e-6 / 2 * float(torch.linalg.eigvalsh(H * c[:, None] * c)[-1])
    value = WorstSharpness(1e-3, adaptive=adaptive, ascent_steps=40).measure(Problem(model, data)).value
    assert value == pytest.approx(truth, rel=5e-3)


def test_the_search_over_weights_settles_inside_the_ball():
    """Steps that never shorten jump from border to border (-1 to 1); the maximum lies at 0.3 ± 1/2^30."""

    def rise_at(e: torch.Tensor) -> tuple[float, torch.Tensor]:
        return float(1 - (e - 0.3).square().sum()), -2 * (e - 0.3)

    assert largest_rise(rise_at, torch.ones(1).double(), 1.0, 60) == pytest.approx(1, abs=1e-6)


def test_small_batches_are_sharper_and_ragged_ones_count_by_size():
    """m is part of the definition: the worst case adapts to a batch; the last of 16 + 16 + 8 counts half."""
    model, x, y = binary_model()
    problem = Problem(model, [(x, y)])
    whole, small = (WorstSharpness(0.1, m=m).measure(problem) for m in (40, 5))
    assert small.value > whole.value
    assert math.isnan(whole.stderr)
    assert small.stderr > 0
    samples, weights = torch.tensor([1.0, 4.0, 10.0]).double(), torch.tensor([16.0, 16.0, 8.0]).double()
    peer = TraceEstimate.from_samples(samples[:, None], weights)
    chunks = [(x, torch.zeros(size)) for size in (16, 16, 8)]
    mean, error = chunk_mean_and_error(samples, chunks)
    assert (mean, error) == pytest.approx((4.0, float(peer.stderr)), rel=1e-12)
    loss = AverageSharpness(m=16).measure(problem).parts["loss"]
    assert loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-12)
