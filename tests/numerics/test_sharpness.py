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
from wcitrain.measures.chunk_sums import chunk_mean_and_error
from wcitrain.measures.m_sharpness import _ascent, average_sharpness, worst_sharpness
from wcitrain.measures.sharpness import asam_sharpness, awp_sharpness, sam_sharpness

# One step -------------------------------------------------------------------------------------------------


def by_hand(name: str, W: torch.Tensor, b: torch.Tensor, gW: torch.Tensor, gb: torch.Tensor):
    """The moved weight and bias, from the papers' formulas."""
    if name == "sam":
        length = (gW.square().sum() + gb.square().sum()).sqrt()
        return W + 0.1 * gW / length, b + 0.1 * gb / length
    if name == "asam":  # T = 1 for the bias
        length = ((W * gW).square().sum() + gb.square().sum()).sqrt()
        return W + 0.3 * W.square() * gW / length, b + 0.3 * gb / length
    return W + 0.2 * W.norm() * gW / gW.norm(), b


STEPS = {
    "sam": lambda *args, **more: sam_sharpness(*args, rho=0.1, **more),
    "asam": lambda *args, **more: asam_sharpness(*args, rho=0.3, **more),
    "awp": lambda *args, **more: awp_sharpness(*args, gamma=0.2, **more),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("reattack", [True, False])
def test_one_step_of_the_robust_loss_is_the_closed_form(name, reattack):
    """Gradient of all examples; each rule's own radius; the attack at W + u, or the images found at W.

    A binary linear model under linf, where the worst images are known exactly; chunks of 7 do not divide 40.
    """
    model, x, y = binary_model()
    W, b = (p.detach().clone().requires_grad_() for p in (model.weight, model.bias))
    gW, gb = torch.autograd.grad(robust_losses(W, b, x, y).mean(), (W, b))
    with torch.no_grad():
        W1, b1 = by_hand(name, W, b, gW, gb)
        before = robust_losses(W, b, x, y)
        worst = x + EPS.eps * (W[1 - y] - W[y]).sign()
        after = (
            robust_losses(W1, b1, x, y)
            if reattack
            else F.cross_entropy(worst @ W1.T + b1, y, reduction="none")
        )
    rise = after - before
    result = STEPS[name](model, [(x, y)], EPS, reattack=reattack, chunk_size=7)
    # float64, 10 attack steps that agree in every sign
    assert result.value == pytest.approx(float(rise.mean()), rel=1e-9)
    assert result.stderr == pytest.approx(float(rise.std()) / math.sqrt(40), rel=1e-9)
    assert result.parts["loss"] == pytest.approx(float(before.mean()), rel=1e-12)


def test_the_attack_is_run_anew_after_the_step():
    """Above, no sign changes and the worst images stay so; in l2 those found at W are too weak at W + u."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    _, x, y = binary_model()
    threat = ThreatModel("l2", 0.3)
    anew, fixed = (sam_sharpness(model, [(x, y)], threat, rho=2.0, reattack=b).value for b in (True, False))
    assert anew > fixed + 1e-6


def test_a_small_sam_step_rises_by_the_gradient_norm():
    """ρ ||g|| + O(ρ²): a step against the gradient, or of another length, gives another factor."""
    model, x, y = binary_model()
    g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    norm = float(torch.cat([v.flatten() for v in g]).norm())
    assert sam_sharpness(model, [(x, y)], None, rho=1e-5).value == pytest.approx(1e-5 * norm, rel=1e-4)


def test_asam_and_awp_ignore_scale_between_layers():
    """The reason for adaptive radii; SAM's own does not survive it. Scaling by 4 is exact in binary."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)).double()
    _, x, y = binary_model()

    def values() -> list[float]:
        return [
            measure(model, [(x, y)], EPS).value for measure in (asam_sharpness, awp_sharpness, sam_sharpness)
        ]

    before = values()
    with torch.no_grad():
        model[0].weight.mul_(4)
        model[2].weight.div_(4)
    after = values()
    assert after[:2] == pytest.approx(before[:2], rel=1e-9)
    assert abs(after[2] / before[2] - 1) > 0.1


# m-sharpness ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stationary():
    """A model without bias at its minimum, its images and labels, and its Hessian [12, 12]."""
    model, x, y = stationary_regression(bias=False)
    H = dense_hessian(cross_entropy(model(x), y), {"w": model.weight})["w"]
    return model, x, y, H


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_sharpness_of_small_noise_is_the_weighted_trace(stationary, adaptive):
    """(ρ²/2) Σ c_i² H_ii at a stationary point: a radius ρ in place of a deviation gives d = 12 times less.

    16 seeds of 60 draws, so that the error is known; the rest is of relative order ρ² = 1e-4.
    """
    model, x, y, H = stationary
    c = model.weight.detach().flatten().abs() if adaptive else torch.ones(12).double()
    truth = 0.01**2 / 2 * float((c.square() * H.diagonal()).sum())
    values = torch.tensor(
        [
            average_sharpness(
                model, [(x, y)], None, rho=0.01, adaptive=adaptive, num_draws=60, seed=seed
            ).value
            for seed in range(16)
        ]
    )
    error = float(values.std()) / 4
    assert error < 0.05 * truth
    assert abs(float(values.mean()) - truth) < 4 * error


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_sharpness_in_l2_is_the_largest_eigenvalue(stationary, adaptive):
    """(ρ²/2) λ_max(H ⊙ c cᵀ): a step that is steepest in u instead of u/c would find less.

    Third order is of relative order ρ = 1e-3; 40 steps of a shifted power iteration leave less.
    """
    model, x, y, H = stationary
    c = model.weight.detach().flatten().abs() if adaptive else torch.ones(12).double()
    truth = 1e-6 / 2 * float(torch.linalg.eigvalsh(H * c[:, None] * c)[-1])
    found = worst_sharpness(model, [(x, y)], None, rho=1e-3, adaptive=adaptive, ascent_steps=40).value
    assert found == pytest.approx(truth, rel=5e-3)


def test_worst_sharpness_in_linf_finds_the_best_corner(stationary):
    """max over ||u||_∞ <= ρ of ½ uᵀHu is at one of 4096 corners, all of which are tried here."""
    model, x, y, H = stationary
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12)), dtype=torch.float64)
    truth = 1e-6 / 2 * float((corners @ H * corners).sum(1).max())
    found = worst_sharpness(model, [(x, y)], None, rho=1e-3, norm="linf", ascent_steps=40).value
    assert 0.9 * truth < found < 1.005 * truth  # an ascent may end in another corner; above, third order only


def test_worst_sharpness_attacks_anew_and_more_steps_find_more(stationary):
    """Holding the images underestimates the loss at W + u; a search that forgets its best would fall back."""
    model, x, y, _ = stationary
    values = [
        worst_sharpness(model, [(x, y)], EPS, rho=0.5, ascent_steps=steps, reattack=reattack).value
        for steps, reattack in [(1, True), (4, True), (12, True), (12, False)]
    ]
    assert 0 <= values[0] <= values[1] <= values[2]
    assert values[2] > values[3]
    average = [
        average_sharpness(model, [(x, y)], EPS, rho=0.5, reattack=reattack).value
        for reattack in (True, False)
    ]
    assert average[0] > average[1]


def test_the_search_over_weights_settles_inside_the_ball():
    """Steps that never shorten jump from border to border (-1 to 1); the maximum lies at 0.3 ± 1/2^30."""

    def rise_at(e: torch.Tensor) -> tuple[float, torch.Tensor]:
        return float(1 - (e - 0.3).square().sum()), -2 * (e - 0.3)

    for norm in ("l2", "linf"):
        assert _ascent(rise_at, torch.ones(1).double(), 1.0, norm, 60) == pytest.approx(1, abs=1e-6)


def test_small_batches_are_sharper_and_ragged_ones_count_by_size():
    """m is part of the definition: the worst case adapts to a batch; the last of 16 + 16 + 8 counts half."""
    model, x, y = binary_model()
    whole, small = (worst_sharpness(model, [(x, y)], None, rho=0.1, m=m) for m in (40, 5))
    assert small.value > whole.value
    assert math.isnan(whole.stderr)
    assert small.stderr > 0
    samples, weights = torch.tensor([1.0, 4.0, 10.0]).double(), torch.tensor([16.0, 16.0, 8.0]).double()
    peer = TraceEstimate.from_samples(samples[:, None], weights)
    assert chunk_mean_and_error(samples, weights) == pytest.approx(
        (float(peer.mean), float(peer.stderr)), rel=1e-12
    )
    assert chunk_mean_and_error(samples, weights)[0] == pytest.approx(4.0)
    loss = average_sharpness(model, [(x, y)], None, m=16).parts["loss"]
    assert loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-12)


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (sam_sharpness, {"rho": 0.0}, "rho: got 0.0"),
        (asam_sharpness, {"eta": -1.0}, "eta: got -1.0"),
        (awp_sharpness, {"gamma": -0.1}, "gamma: got -0.1"),
        (average_sharpness, {"rho": math.nan}, "rho: got nan"),
        (average_sharpness, {"m": 0}, "m: got 0"),
        (average_sharpness, {"num_draws": 0}, "num_draws: got 0"),
        (worst_sharpness, {"norm": "l1"}, "norm: got 'l1'"),
        (worst_sharpness, {"ascent_steps": 0}, "ascent_steps: got 0"),
    ],
)
def test_wrong_settings_are_refused(measure, options, message):
    """A sharpness of radius zero is zero, and would be believed."""
    model, x, y = binary_model()
    with pytest.raises(ValueError, match=message):
        measure(model, [(x, y)], EPS, **options)
