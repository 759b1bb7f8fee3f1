"""Sharpness along one step, on average and at worst, against explicit formulas and the dense Hessian."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_flatness import EPS, binary_model, robust_losses, stationary_regression
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.curvature import cross_entropy, dense_hessian
from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.measures.means import chunk_mean_and_error
from wcitrain.measures.problem import Problem
from wcitrain.measures.sharpness import (
    ASAMSharpness,
    AverageSharpness,
    AWPSharpness,
    SAMSharpness,
    WorstSharpness,
    largest_rise,
)

# One step -------------------------------------------------------------------------------------------------


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


def test_asam_and_awp_ignore_scale_between_layers():
    """The reason for adaptive radii; SAM's own does not survive it. Scaling by 4 is exact in binary."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)).double()
    _, x, y = binary_model()
    problem, measures = Problem(model, [(x, y)], EPS), (ASAMSharpness(), AWPSharpness(), SAMSharpness())
    before = [measure.measure(problem).value for measure in measures]
    with torch.no_grad():
        model[0].weight.mul_(4)
        model[2].weight.div_(4)
    after = [measure.measure(problem).value for measure in measures]
    assert after[:2] == pytest.approx(before[:2], rel=1e-9)
    assert abs(after[2] / before[2] - 1) > 0.1


# m-sharpness ----------------------------------------------------------------------------------------------


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
def test_worst_sharpness_in_l2_is_the_largest_eigenvalue(stationary, adaptive):
    """(ρ²/2) λ_max(H ⊙ c cᵀ): a step that is steepest in u instead of u/c would find less.

    Third order is of relative order ρ = 1e-3; 40 steps of a shifted power iteration leave less.
    """
    model, data, H = stationary
    c = model.weight.detach().flatten().abs() if adaptive else torch.ones(12).double()
    truth = 1e-6 / 2 * float(torch.linalg.eigvalsh(H * c[:, None] * c)[-1])
    value = WorstSharpness(1e-3, adaptive=adaptive, ascent_steps=40).measure(Problem(model, data)).value
    assert value == pytest.approx(truth, rel=5e-3)


def test_worst_sharpness_in_linf_finds_the_best_corner(stationary):
    """max over ||u||_∞ <= ρ of ½ uᵀHu is at one of 4096 corners, all of which are tried here."""
    model, data, H = stationary
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12)), dtype=torch.float64)
    truth = 1e-6 / 2 * float((corners @ H * corners).sum(1).max())
    value = WorstSharpness(1e-3, "linf", ascent_steps=40).measure(Problem(model, data)).value
    assert 0.9 * truth < value < 1.005 * truth  # an ascent may end in another corner; above, third order only


def test_more_steps_find_more(stationary):
    """A search that forgets its best would fall back."""
    model, data, _ = stationary
    problem = Problem(model, data, EPS)
    values = [WorstSharpness(0.5, ascent_steps=steps).measure(problem).value for steps in (1, 4, 12)]
    assert 0 <= values[0] <= values[1] <= values[2]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_search_over_weights_settles_inside_the_ball(norm):
    """Steps that never shorten jump from border to border (-1 to 1); the maximum lies at 0.3 ± 1/2^30."""

    def rise_at(e: torch.Tensor) -> tuple[float, torch.Tensor]:
        return float(1 - (e - 0.3).square().sum()), -2 * (e - 0.3)

    assert largest_rise(rise_at, torch.ones(1).double(), 1.0, norm, 60) == pytest.approx(1, abs=1e-6)


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
    assert (mean, error) == pytest.approx((float(peer.mean), float(peer.stderr)), rel=1e-12)
    assert mean == pytest.approx(4.0)
    loss = AverageSharpness(m=16).measure(problem).parts["loss"]
    assert loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-12)
