"""Landscapes: their directions, what they say to second order, and that the attack follows the weights."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, SmoothNet, assert_same, everything, image_batch
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.curvature import exact_trace
from wcitrain.measures.landscape import RADII, Landscape, landscape_1d, landscape_2d, scaled_like
from wcitrain.measures.problem import Problem
from wcitrain.params import select_layers
from wcitrain.report.figures import landscape as draw
from wcitrain.seeding import generator_from

THREAT = ThreatModel("linf", 0.1)
WEAK = Attack(THREAT, 2, THREAT.step_for(2))
QUICK = {"num_points": 5, "progress": False}


def softmax_regression() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """One linear layer of float64 weights and 60 points well inside the box."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    with torch.no_grad():
        model.weight *= 3
    return model, 0.2 + 0.6 * torch.rand(60, 6).double(), torch.randint(0, 4, (60,))


def test_the_rise_of_several_layers_adds_up():
    """(α²/2) Σ F_l T_l / d_l: with one scale for all layers the largest would decide alone (float64, tanh).

    For one layer it is α² WCI² / (2 d), which ties the picture to the index. Four standard errors over the
    directions; the next term is of order α² = 4e-4 relative.
    """
    torch.manual_seed(0)
    model = SmoothNet().double()
    x, y = torch.rand(40, 4).double(), torch.randint(0, 3, (40,))
    layers = select_layers(model, "weights+biases")
    traces = exact_trace(F.cross_entropy(model(x), y), layers).mean
    alpha = 0.02
    expected = alpha**2 / 2 * float((layers.squared_norms() * traces / layers.sizes()).sum())
    many = {"directions": "layer", "radius": alpha, "num_points": 3, "num_directions": 300}
    landscape = landscape_1d(Problem(model, [(x, y)]), **many, progress=False)
    alphas, rise = landscape.rise("clean")
    assert alphas.tolist() == [alpha]
    assert np.array_equal(landscape.clean, landscape.robust)
    assert rise.std() / math.sqrt(300) < 0.1 * expected
    assert abs(float(rise.mean()) - expected) < 4 * rise.std() / math.sqrt(300)


def test_directions_are_scaled_filter_by_filter_or_layer_by_layer():
    """The published normalisations differ here; norm layers' tensors and, filter-wise, biases stay."""
    torch.manual_seed(0)
    model = BatchNormNet()
    layers = select_layers(model, "weights+biases")
    noise = [torch.randn_like(t) for t in layers.tensors]
    for d, tensor in zip(scaled_like(noise, layers), layers.tensors, strict=True):
        torch.testing.assert_close(d.norm(), tensor.detach().norm())
    weights = select_layers(model, "weights")
    noise = [torch.randn_like(t) for t in weights.tensors]
    for d, tensor in zip(scaled_like(noise, weights, by_filter=True), weights.tensors, strict=True):
        torch.testing.assert_close(d.flatten(1).norm(dim=1), tensor.detach().flatten(1).norm(dim=1))
    with torch.no_grad():
        model.conv.weight[0] = 0  # a dead filter
    assert torch.isfinite(scaled_like(noise, weights, by_filter=True)[0]).all()


@pytest.mark.parametrize("kind", RADII)
def test_only_the_weights_of_the_kind_move(kind):
    """Moving BatchNorm's scale by half of itself changes the network more than all else."""
    model = BatchNormNet().eval()
    moved = set()

    def watch(module, args):
        now = dict(module.named_parameters())
        moved.update(name for name in now if not torch.equal(now[name].detach(), start[name]))

    start = everything(model)
    with model.register_forward_pre_hook(watch):
        landscape_1d(Problem(model, [image_batch(6)], WEAK), directions=kind, num_directions=1, **QUICK)
    expected = {"conv.weight", "fc.weight"}
    assert moved == (expected if kind == "random" else expected | {"fc.bias"})


def test_the_attack_is_run_anew_at_every_point():
    """Old adversarial examples fit old weights: the robust loss would look flat. Here the worst is known.

    Two linear classes: x_adv = x + eps sign(w_other − w_y) at the *perturbed* weights; 2.5 eps of steps do.
    """
    model = nn.Linear(6, 2, bias=False).double()
    _, x, _ = softmax_regression()
    y = torch.arange(60) % 2
    landscape = landscape_1d(Problem(model, [(x, y)], THREAT, seed=3), radius=2.0, num_directions=2, **QUICK)
    assert landscape.attack == "PGD-10 linf 0.1"
    layers = select_layers(model)
    for number in range(2):
        generator = generator_from("cpu", 3, "direction", number, "weight")
        noise = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        d = scaled_like([noise], layers, by_filter=True)[0]
        for i, alpha in enumerate(landscape.alphas):
            W = model.weight.detach() + alpha * d
            x_adv = x + 0.1 * (W[1 - y] - W[y]).sign()
            for images, losses in ((x_adv, landscape.robust), (x, landscape.clean)):
                loss = float(F.cross_entropy(images @ W.T, y))
                assert losses[number, i] == pytest.approx(loss, rel=1e-9)


def test_adversarial_directions_rise_more_than_random_ones():
    """A worst case that is no worse than chance is none; at equal radius, and from a random start each."""
    torch.manual_seed(0)
    model = SmoothNet().double()
    problem = Problem(model, [(torch.rand(40, 4).double(), torch.randint(0, 3, (40,)))], WEAK)
    kinds = ("adversarial", "layer")
    worst, chance = (landscape_1d(problem, directions=kind, radius=0.05, **QUICK) for kind in kinds)
    up = worst.robust[:, -1] - worst.robust[:, 2]
    assert (up > 3 * np.abs(chance.robust[:, -1] - chance.robust[:, 2]).max()).all()
    assert len(np.unique(up)) == 3


def test_a_plane_holds_the_sections_along_its_axes():
    """Axes exchanged or a wrong origin would go unnoticed in a picture."""
    model, x, y = softmax_regression()
    problem = Problem(model, [(x, y)], WEAK)
    plane, lines = (draw(problem, radius=0.5, **QUICK) for draw in (landscape_2d, landscape_1d))
    assert plane.clean.shape == (5, 5)
    np.testing.assert_allclose(plane.clean[:, 2], lines.clean[0], rtol=1e-12)
    np.testing.assert_allclose(plane.robust[2], lines.robust[1], rtol=1e-12)
    with pytest.raises(ValueError, match="got a plane"):
        plane.rise()


def test_zero_is_a_point_and_gives_the_loss_of_the_model_itself():
    """Every rise is measured from there: it must be the model bit for bit."""
    model, x, y = softmax_regression()
    landscape = landscape_1d(Problem(model, [(x, y)]), num_directions=2, **QUICK)
    assert landscape.alphas[2] == 0
    assert np.array_equal(landscape.alphas, -landscape.alphas[::-1])
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), y, reduction="none").mean())
    assert landscape.clean[:, 2].tolist() == [loss, loss]


def test_a_landscape_is_stored_and_drawn(tmp_path):
    """Computed once, drawn many times: what comes back must be the same, and unreadable files must say so."""
    clean, robust = (Problem(BatchNormNet(), [image_batch(8)], attack) for attack in (None, WEAK))
    lines, plane = landscape_1d(robust, **QUICK), landscape_2d(clean, **QUICK)
    for landscape in (lines, plane):
        landscape.save(tmp_path / "l.npz")
        again = Landscape.load(tmp_path / "l.npz")
        assert str(again) == str(landscape)
        for name in ("alphas", "clean", "robust"):
            assert np.array_equal(getattr(again, name), getattr(landscape, name))
        draw(landscape, "title").savefig(tmp_path / "l.png")
        assert (tmp_path / "l.png").stat().st_size > 10_000
    ax = draw(lines).axes[0]
    assert [line.get_label() for line in ax.lines] == ["clean loss", "robust loss"]
    np.savez(tmp_path / "other.npz", alphas=np.zeros(3))
    with pytest.raises(ValueError, match="expected a file that Landscape"):
        Landscape.load(tmp_path / "other.npz")


def test_nothing_is_left_behind_and_the_seed_decides():
    """Weights move at every point: they must come back bit for bit, also when the model breaks midway."""
    model, data = BatchNormNet().train(), [image_batch(8)]
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before, random = everything(model), torch.get_rng_state()
    for kind in RADII:
        one, again, other = (
            landscape_1d(Problem(model, data, WEAK, seed), directions=kind, num_directions=1, **QUICK).robust
            for seed in (0, 0, 1)
        )
        assert np.array_equal(one, again)
        assert not np.array_equal(one, other)
    calls = []

    def fail(module, args):
        calls.append(0)
        if len(calls) == 5:
            raise RuntimeError("stop")

    with model.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="stop"):
        landscape_1d(Problem(model, data, WEAK), **QUICK)
    assert_same(before, everything(model))
    assert model.training
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": "worst"}, "directions='worst'; expected one of random, layer, adversarial"),
        ({"num_points": 4}, "num_points=4"),
        ({"radius": 0.0}, "radius=0.0"),
        ({"num_directions": 0}, "num_directions=0"),
    ],
)
def test_wrong_arguments_are_explained(change, message):
    """Before the first of hundreds of attacks."""
    with pytest.raises(ValueError, match=message):
        landscape_1d(Problem(BatchNormNet(), [image_batch(4)]), **change)
