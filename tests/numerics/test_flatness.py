"""Average and worst-case flatness against second order, closed forms of linear models, and symmetries."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, image_batch
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.curvature import cross_entropy, exact_trace
from wcitrain.measures import Measurement, Problem
from wcitrain.measures.flatness import AverageFlatness, WorstFlatness, draw_perturbation, strongest
from wcitrain.measures.means import example_losses
from wcitrain.measures.spectrum import LambdaMax
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


# Average flatness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "k"), [("code", lambda d: 1), ("paper", lambda d: d / (d + 2))])
def test_average_flatness_is_the_sum_of_squared_wci_over_sizes(protocol, k):
    """(ξ²/2) Σ k a t / d ties Stutz's measure to the index; a wrong norm, factor or layer set shows here.

    Odd orders vanish in the mean over ν: what is left out is of relative order ξ² = 4e-4. Only draws err.
    """
    model, x, y = stationary_regression()
    layers = select_layers(model, "weights+biases")
    a, t = layers.squared_norms(), exact_trace(cross_entropy(model(x), y), layers).mean
    d = layers.sizes()
    factors = torch.tensor([k(float(size)) for size in d]).double()
    truth = float((0.02**2 / 2 * factors * a * t / d).sum())
    result = average(model, x, y, xi=0.02, num_draws=600, protocol=protocol)
    error = result.parts["stderr_draws"]
    assert 4 * error < 0.2 * truth  # ball and sphere differ by 24 %
    assert abs(result.value - truth) < 4 * error + 1e-3 * truth


def test_average_flatness_attacks_every_perturbed_model_anew():
    """With old adversarial images the rise is underestimated; here the worst case at W + ν is known.

    20 steps of 0.223 eps cross the ball from any start; a linear model's best iterate is then the worst case.
    """
    model, x, y = binary_model()
    layers = select_layers(model, "weights+biases")
    expected = []
    for draw in range(3):
        ν = draw_perturbation(
            layers, 0.5, generator_from("cpu", 7, "average_flatness", draw, 0), on_sphere=True
        )
        with torch.no_grad():
            expected.append(robust_losses(model.weight + ν[0], model.bias + ν[1], x, y).mean())
    with torch.no_grad():
        reference = robust_losses(model.weight, model.bias, x, y).mean()
    result = average(model, x, y, EPS, num_draws=3, protocol="code", chunk_size=16, seed=7)
    assert result.parts["reference_loss"] == pytest.approx(float(reference), rel=1e-12)
    assert result.value == pytest.approx(float(torch.stack(expected).mean() - reference), rel=1e-10)
    assert result.parts["max"] == pytest.approx(float(max(expected) - reference), rel=1e-10)


def test_one_nu_for_all_examples_does_not_depend_on_the_chunks():
    """Otherwise the number would depend on the memory of the machine. (Under attack the starts do.)"""
    model, x, y = binary_model()
    values = [average(model, x, y, protocol="code", chunk_size=size).value for size in (3, 40)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)  # sums of 40 float64 in another order


def test_perturbations_have_the_radius_of_their_layer_and_leave_normalisation_alone():
    """A global norm, or moving BatchNorm's scales, is another measure."""
    model = BatchNormNet().double()
    layers = select_layers(model, "weights+biases")
    assert tuple(layers) == ("conv.weight", "fc.weight", "fc.bias")
    for draw in range(20):
        for on_sphere in (True, False):
            ν = draw_perturbation(layers, 0.5, generator_from("cpu", draw), on_sphere=on_sphere)
            shares = torch.stack([u.norm() / w.norm() for u, w in zip(ν, layers.tensors, strict=True)])
            assert bool((shares <= 0.5 * (1 + 1e-12)).all())
            assert bool((shares >= 0.5 * (1 - 1e-12)).all()) == on_sphere
    with torch.no_grad():
        model.fc.bias.zero_()
    assert not draw_perturbation(layers, 0.5, generator_from("cpu", 0), on_sphere=True)[2].any()


def test_the_error_covers_examples_and_draws():
    """An error over one of the two alone is too small: differences between models would look significant.

    60 repetitions: the deviation of z is known to 9 %; the interaction counts twice, so it may be below 1.
    """
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.mul_(6)
    x, y = torch.rand(2000, 4).double(), torch.randint(0, 3, (2000,))
    truth = average(model, x, y, protocol="code", num_draws=800, chunk_size=2000)
    z, shares = [], []
    for seed in range(60):
        rows = torch.randint(0, 2000, (40,), generator=torch.Generator().manual_seed(seed))
        result = average(model, x[rows], y[rows], protocol="code", num_draws=8, seed=seed)
        z.append((result.value - truth.value) / result.stderr)
        shares.append(result.parts["stderr_draws"] / result.stderr)
    assert truth.stderr < 0.2 * result.stderr
    assert 0.75 < torch.tensor(z).std() < 1.3
    assert abs(torch.tensor(z).mean()) < 4 / math.sqrt(60)
    assert 0.1 < torch.tensor(shares).mean() < 0.99  # both kinds matter in this test


# The attack -----------------------------------------------------------------------------------------------


def test_the_best_iterate_is_kept():
    """The last iterate of large steps is not the worst: the reference is too low, flatness too high."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        model[1].weight.mul_(6)
    x, y = image_batch(60)
    x = x.double()
    threat = ThreatModel("linf", 0.3)

    def best(num_steps: int, num_restarts: int = 1) -> torch.Tensor:
        attack = Attack(threat, num_steps, 0.3, num_restarts=num_restarts)
        images, losses = strongest(model, x, y, attack, torch.Generator().manual_seed(3))
        torch.testing.assert_close(losses, example_losses(model, images, y).detach(), rtol=1e-12, atol=0)
        assert float((images - x).abs().max()) <= 0.3 + 1e-12
        assert images.min() >= 0
        assert images.max() <= 1
        return losses

    last = Attack(threat, 8, 0.3)(model, x, y, torch.Generator().manual_seed(3))
    last_losses = example_losses(model, last, y).detach()
    assert bool((best(8) >= last_losses - 1e-12).all())
    assert (best(8) - last_losses).max() > 0.01
    for less, more in [(best(0), best(1)), (best(1), best(8)), (best(8), best(8, 3))]:
        assert bool((more >= less).all())
        assert bool((more > less).any())


# Worst-case flatness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [None, EPS], ids=["clean", "linf"])
@pytest.mark.parametrize("protocol", ["paper", "code"])
def test_for_small_xi_worst_flatness_is_the_relative_gradient_norm(protocol, threat):
    """ξ Σ_l ||W_l|| ||g_l||: leaving the ball, a wrong radius or a wrong sharing of ν shows as a factor.

    The closed robust loss gives g, of every chunk (paper) or of all examples in one chunk (code). Second
    order is of relative order ξ.
    """
    model, x, y = binary_model()
    xi = 1e-4

    def slope(rows: slice) -> float:
        W, b = (p.detach().clone().requires_grad_() for p in model.parameters())
        losses = F.cross_entropy(x[rows] @ W.T + b, y[rows], reduction="none")
        g = torch.autograd.grad(
            (losses if threat is None else robust_losses(W, b, x[rows], y[rows])).mean(), (W, b)
        )
        return sum(float(w.detach().norm() * v.norm()) for w, v in zip((W, b), g, strict=True))

    chunks = [slice(0, 40)] if protocol == "code" else [slice(0, 20), slice(20, 40)]
    truth = xi * sum(slope(rows) for rows in chunks) / len(chunks)
    result = worst(
        model, x, y, threat, xi=xi, protocol=protocol, chunk_size=40 // len(chunks), num_restarts=2
    )
    # By hand: curvature over slope, times ξ, is below 10 ξ = 1e-3; steps on the images reach the worst case.
    assert result.value == pytest.approx(truth, rel=2e-3)
    assert result.num_examples == 40


def test_chunks_with_their_own_nu_are_worse():
    """Maximising chunk by chunk can only raise the mean; equality would mean that ν is shared."""
    model, x, y = binary_model()
    shared, own = (
        worst(model, x, y, EPS, xi=0.05, weight_lr=0.05, protocol=name, chunk_size=10, num_restarts=2).value
        for name in ("code", "paper")
    )
    assert own > 1.02 * shared > 0


def test_more_restarts_never_make_it_smaller():
    """A maximum over attempts that is not one would depend on the order of the attempts."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = image_batch(30)
    options = {"xi": 0.5, "weight_lr": 0.3, "num_steps": 5, "chunk_size": 15}

    def value(**more) -> float:
        return worst(model, x.double(), y, EPS, **options, **more).value

    # the first is not best in both chunks
    assert value(num_restarts=1) < value(num_restarts=4)


def test_flatness_ignores_scale_between_layers_and_sharpness_does_not():
    """Made for this: (W_1, b_1) c and W_2 / c is the same function; λ_max alone can be made anything.

    c = 4 is exact in binary, so only norms are rounded: 1e-15, amplified by 20 attack steps.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = image_batch(40)
    x = x.double()
    problem = Problem(model, [(x, y)], EPS)

    def values() -> list[float]:
        return [
            average(model, x, y, EPS, num_draws=3).value,
            worst(model, x, y, EPS, xi=0.01, num_restarts=2).value,
            LambdaMax(layers="3.weight", tolerance=1e-10).measure(problem).value,
        ]

    before = values()
    with torch.no_grad():
        model[1].weight.mul_(4)
        model[1].bias.mul_(4)
        model[3].weight.div_(4)
    after = values()
    assert after[:2] == pytest.approx(before[:2], rel=1e-9)
    # the last layer's block is quadratic in its features
    assert after[2] == pytest.approx(16 * before[2], rel=1e-7)
