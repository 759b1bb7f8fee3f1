"""Landscapes: their directions, what they say to second order, and that the attack follows the weights."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, SmoothNet, everything, image_batch
from oracles import exact_trace
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.measures.landscape import RADII, Landscape, scaled_like, take_landscape
from wcitrain.measures.problem import Problem
from wcitrain.params import select_layers
from wcitrain.report.figures import landscape as draw
from wcitrain.seeding import generator_from

THREAT = ThreatModel("linf", 0.1)
WEAK = Attack(THREAT, 2, THREAT.step_for(2))
QUICK = {"num_points": 5}


def linear(classes: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """One linear layer of float64 weights and 60 points well inside the box."""
    torch.manual_seed(0)
    model = nn.Linear(6, classes, bias=False).double()
    return model, 0.2 + 0.6 * torch.rand(60, 6).double(), torch.randint(0, classes, (60,))


def test_the_rise_of_several_layers_adds_up():
    """(α²/2) Σ F_l T_l / d_l: with one scale for all layers the largest would decide alone (float64, tanh).

    For one layer it is α² WCI² / (2 d), which ties the picture to the index. Four standard errors over the
    directions; the next term is of order α² = 4e-4 relative.
    """
    torch.manual_seed(0)
    model = SmoothNet().double()
    x, y = torch.rand(40, 4).double(), torch.randint(0, 3, (40,))
    layers = select_layers(model, "weights+biases")
    traces = exact_trace(F.cross_entropy(model(x), y), layers)
    alpha = 0.02
    expected = alpha**2 / 2 * float((layers.squared_norms() * traces / layers.sizes()).sum())
    many = {"directions": "layer", "radius": alpha, "num_points": 3, "num_directions": 300}
    landscape = take_landscape(Problem(model, [(x, y)]), **many)
    assert landscape.alphas.tolist() == [-alpha, 0, alpha]
    assert np.array_equal(landscape.clean, landscape.robust)
    rise = (landscape.clean[:, 0] + landscape.clean[:, 2]) / 2 - landscape.clean[:, 1]
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
        take_landscape(Problem(model, [image_batch(6)], WEAK), directions=kind, num_directions=1, **QUICK)
    expected = {"conv.weight", "fc.weight"}
    assert moved == (expected if kind == "random" else expected | {"fc.bias"})


def test_the_attack_is_run_anew_at_every_point():
    """Old adversarial examples fit old weights: the robust loss would look flat. Here the worst is known.

    Two linear classes: x_adv = x + eps sign(w_other − w_y) at the *perturbed* weights; 2.5 eps of steps do.
    """
    model, x, y = linear(2)
    problem = Problem(model, [(x, y)], THREAT, seed=3)
    landscape = take_landscape(problem, radius=2.0, num_directions=2, **QUICK)
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
    worst, chance = (take_landscape(problem, directions=kind, radius=0.05, **QUICK) for kind in kinds)
    up = worst.robust[:, -1] - worst.robust[:, 2]
    assert (up > 3 * np.abs(chance.robust[:, -1] - chance.robust[:, 2]).max()).all()
    assert len(np.unique(up)) == 3


def test_a_plane_holds_the_sections_along_its_axes():
    """Axes exchanged or a wrong origin would go unnoticed in a picture."""
    model, x, y = linear(4)
    problem = Problem(model, [(x, y)], WEAK)
    plane, lines = (take_landscape(problem, radius=0.5, is_plane=flag, **QUICK) for flag in (True, False))
    assert plane.clean.shape == (5, 5)
    assert np.array_equal(plane.alphas, -plane.alphas[::-1])
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), y, reduction="none").mean())
    assert (plane.alphas[2], plane.clean[2, 2], lines.clean[0, 2]) == (0, loss, loss)  # bit for bit
    np.testing.assert_allclose(plane.clean[:, 2], lines.clean[0], rtol=1e-12)
    np.testing.assert_allclose(plane.robust[2], lines.robust[1], rtol=1e-12)


def test_a_landscape_is_stored_and_drawn(tmp_path):
    """Computed once, drawn many times: what comes back must be the same, and unreadable files must say so."""
    clean, robust = (Problem(BatchNormNet(), [image_batch(8)], attack) for attack in (None, WEAK))
    lines, plane = take_landscape(robust, **QUICK), take_landscape(clean, is_plane=True, **QUICK)
    for landscape in (lines, plane):
        landscape.save(tmp_path / "l.npz")
        again = Landscape.load(tmp_path / "l.npz")
        assert str(again) == str(landscape)
        for name in ("alphas", "clean", "robust"):
            assert np.array_equal(getattr(again, name), getattr(landscape, name))
    assert len(draw(plane).axes) == 2  # with the colour bar
    assert [line.get_label() for line in draw(lines).axes[0].lines] == ["clean loss", "robust loss"]
    np.savez(tmp_path / "other.npz", alphas=np.zeros(3))
    with pytest.raises(ValueError, match="expected a file that Landscape"):
        Landscape.load(tmp_path / "other.npz")


def test_wrong_arguments_are_explained():
    """Before the first of hundreds of attacks; another kind would be drawn as one of the three."""
    wrong = {"directions": "worst", "num_points": 4, "radius": 0.0, "num_directions": 0}
    for key, value in wrong.items():
        with pytest.raises(ValueError, match=f"{key}={value!r}"):
            take_landscape(Problem(BatchNormNet(), [image_batch(4)]), **{key: value})
