"""Landscapes: their directions, what they say to second order, and that the attack follows the weights."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, SmoothNet, assert_same, everything, image_batch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.curvature import exact_trace
from wcitrain.measures.landscape import DIRECTIONS, Landscape, landscape_1d, landscape_2d, scaled_like
from wcitrain.measures.landscape_drawing import draw, draw_curves
from wcitrain.params import select_layers

THREAT = ThreatModel("linf", 0.1)
QUICK = {"num_points": 5, "num_steps": 2}


def softmax_regression() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """One linear layer of float64 weights and 60 points well inside the box."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    with torch.no_grad():
        model.weight *= 3
    return model, 0.2 + 0.6 * torch.rand(60, 6).double(), torch.randint(0, 4, (60,))


def test_rise_is_half_the_squared_index_over_the_dimension():
    """Ties the picture to the index: α² F Tr / (2 d) for one layer; a wrong normalisation is off by d.

    Truncation: next term of order α² relative, 1e-4. uᵀHu over directions: relative deviation at most sqrt(2
    (d − 1)/(d + 2)) = 1.33 (d = 24); 400 directions, 4 standard errors 27 %; seen far less, since Tr is
    spread over many eigenvalues.
    """
    model, x, y = softmax_regression()
    trace = float(exact_trace(F.cross_entropy(model(x), y), {"w": model.weight}).mean)
    alpha = 0.01
    expected = alpha**2 * float(model.weight.detach().square().sum()) * trace / (2 * 24)
    found = landscape_1d(
        model, [(x, y)], directions="layer", radius=alpha, num_points=3, num_directions=400, progress=False
    )
    alphas, rise = found.rise("clean")
    assert alphas.tolist() == [alpha]
    error = rise.std() / math.sqrt(400)
    assert 4 * error < 0.27 * expected
    assert abs(float(rise.mean()) - expected) < 4 * error
    assert np.array_equal(found.clean, found.robust)


def test_the_rise_of_several_layers_adds_up():
    """Σ F_l T_l / d_l: with one scale for all layers the largest would decide alone (float64, tanh)."""
    torch.manual_seed(0)
    model = SmoothNet().double()
    x, y = torch.rand(40, 4).double(), torch.randint(0, 3, (40,))
    layers = select_layers(model, "weights+biases")
    traces = exact_trace(F.cross_entropy(model(x), y), layers).mean
    alpha = 0.02
    expected = alpha**2 / 2 * float((layers.squared_norms() * traces / layers.sizes()).sum())
    found = landscape_1d(
        model, [(x, y)], directions="layer", radius=alpha, num_points=3, num_directions=300, progress=False
    )
    rise = found.rise("clean")[1]
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


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_only_the_weights_of_the_kind_move(kind, monkeypatch):
    """Moving BatchNorm's scale by half of itself changes the network more than all else."""
    model = BatchNormNet().eval()
    moved = set()

    def watch(module, args):
        now = dict(module.named_parameters())
        moved.update(name for name in now if not torch.equal(now[name].detach(), start[name]))

    start = everything(model)
    with model.register_forward_pre_hook(watch):
        landscape_1d(
            model, [image_batch(6)], THREAT, directions=kind, num_directions=1, progress=False, **QUICK
        )
    expected = {"conv.weight", "fc.weight"}
    assert moved == (expected if kind == "random" else expected | {"fc.bias"})


def test_the_attack_is_run_anew_at_every_point():
    """Old adversarial examples fit old weights: the robust loss would look flat. Here the worst is known.

    Two linear classes: x_adv = x + eps sign(w_other − w_y) at the *perturbed* weights; 2.5 eps of steps do.
    """
    model = nn.Linear(6, 2, bias=False).double()
    _, x, _ = softmax_regression()
    y = torch.arange(60) % 2
    found = landscape_1d(
        model, [(x, y)], THREAT, radius=2.0, num_points=5, num_directions=2, seed=3, progress=False
    )
    assert found.attack == "PGD-10 linf 0.1"
    clean, robust = torch.tensor(found.clean), torch.tensor(found.robust)
    from wcitrain.seeding import generator_from

    layers = select_layers(model)
    for number in range(2):
        noise = torch.randn(
            2, 6, generator=generator_from("cpu", 3, "direction", number, "weight"), dtype=torch.float64
        )
        d = scaled_like([noise], layers, by_filter=True)[0]
        for i, alpha in enumerate(found.alphas):
            W = model.weight.detach() + alpha * d
            x_adv = x + 0.1 * (W[1 - y] - W[y]).sign()
            assert float(robust[number, i]) == pytest.approx(float(F.cross_entropy(x_adv @ W.T, y)), rel=1e-9)
            assert float(clean[number, i]) == pytest.approx(float(F.cross_entropy(x @ W.T, y)), rel=1e-9)


def test_adversarial_directions_rise_more_than_random_ones():
    """A worst case that is no worse than chance is none; at equal radius, and from a random start each."""
    torch.manual_seed(0)
    model = SmoothNet().double()
    data = [(torch.rand(40, 4).double(), torch.randint(0, 3, (40,)))]
    options = {"radius": 0.05, "num_directions": 3, "progress": False, **QUICK}
    worst = landscape_1d(model, data, THREAT, directions="adversarial", **options)
    chance = landscape_1d(model, data, THREAT, directions="layer", **options)
    up = worst.robust[:, -1] - worst.robust[:, 2]
    assert (up > 3 * np.abs(chance.robust[:, -1] - chance.robust[:, 2]).max()).all()
    assert len(np.unique(up)) == 3


def test_a_plane_holds_the_sections_along_its_axes():
    """Axes exchanged or a wrong origin would go unnoticed in a picture."""
    model, x, y = softmax_regression()
    options = {"radius": 0.5, "num_points": 5, "num_steps": 2, "progress": False}
    plane = landscape_2d(model, [(x, y)], THREAT, **options)
    lines = landscape_1d(model, [(x, y)], THREAT, num_directions=2, **options)
    assert plane.clean.shape == (5, 5)
    np.testing.assert_allclose(plane.clean[:, 2], lines.clean[0], rtol=1e-12)
    np.testing.assert_allclose(plane.robust[2], lines.robust[1], rtol=1e-12)
    with pytest.raises(ValueError, match="got a plane"):
        plane.rise()


def test_zero_is_a_point_and_gives_the_loss_of_the_model_itself():
    """Every rise is measured from there: it must be the model bit for bit."""
    model, x, y = softmax_regression()
    found = landscape_1d(model, [(x, y)], num_points=7, num_directions=2, progress=False)
    assert found.alphas[3] == 0
    assert np.array_equal(found.alphas, -found.alphas[::-1])
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), y, reduction="none").mean())
    assert found.clean[:, 3].tolist() == [loss, loss]


def test_a_landscape_is_stored_and_drawn(tmp_path):
    """Computed once, drawn many times: what comes back must be the same, and unreadable files must say so."""
    model, data = BatchNormNet(), [image_batch(8)]
    for found in (
        landscape_1d(model, data, THREAT, num_directions=2, progress=False, **QUICK),
        landscape_2d(model, data, None, num_points=3, progress=False),
    ):
        found.save(tmp_path / "l.npz")
        again = Landscape.load(tmp_path / "l.npz")
        assert str(again) == str(found)
        assert all(
            np.array_equal(getattr(again, name), getattr(found, name))
            for name in ("alphas", "clean", "robust")
        )
        draw(found, "title").savefig(tmp_path / "l.png")
        assert (tmp_path / "l.png").stat().st_size > 10_000
    assert "rises by" in str(landscape_1d(model, data, num_points=3, progress=False))
    ax = draw_curves(landscape_1d(model, data, THREAT, progress=False, **QUICK)).axes[0]
    assert [line.get_label() for line in ax.lines] == ["clean loss", "robust loss"]
    np.savez(tmp_path / "other.npz", alphas=np.zeros(3))
    with pytest.raises(ValueError, match="expected a file that Landscape"):
        Landscape.load(tmp_path / "other.npz")


def test_a_file_without_a_seed_is_still_read(tmp_path):
    """Files of before the seed was stored must not become useless, nor claim seed 0."""
    drawn = landscape_1d(BatchNormNet(), [image_batch(4)], seed=5, num_directions=1, progress=False, **QUICK)
    drawn.save(tmp_path / "new.npz")
    assert Landscape.load(tmp_path / "new.npz").seed == 5
    with np.load(tmp_path / "new.npz") as arrays:
        content = dict(arrays)
    header = json.loads(str(content["header"]))
    del header["seed"]
    np.savez(tmp_path / "old.npz", **(content | {"header": np.array(json.dumps(header))}))
    assert Landscape.load(tmp_path / "old.npz").seed is None


def test_nothing_is_left_behind_and_the_seed_decides():
    """Weights move at every point: they must come back bit for bit, also when the model breaks midway."""
    model, data = BatchNormNet().train(), [image_batch(8)]
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before, random = everything(model), torch.get_rng_state()
    for kind in DIRECTIONS:
        options = {"directions": kind, "num_directions": 1, "progress": False, **QUICK}
        first = landscape_1d(model, data, THREAT, **options)
        assert np.array_equal(first.robust, landscape_1d(model, data, THREAT, **options).robust)
        assert not np.array_equal(first.robust, landscape_1d(model, data, THREAT, seed=1, **options).robust)
    calls = []

    def fail(module, args):
        calls.append(0)
        if len(calls) == 5:
            raise RuntimeError("stop")

    with model.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="stop"):
        landscape_1d(model, data, THREAT, progress=False, **QUICK)
    assert_same(before, everything(model))
    assert model.training
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": "worst"}, "directions='worst'; expected random, layer, adversarial"),
        ({"num_points": 4}, "num_points=4"),
        ({"radius": 0.0}, "radius=0.0"),
        ({"num_directions": 0}, "num_directions=0"),
    ],
)
def test_wrong_arguments_are_explained(change, message):
    """Before the first of hundreds of attacks."""
    with pytest.raises(ValueError, match=message):
        landscape_1d(BatchNormNet(), [image_batch(4)], progress=False, **change)
