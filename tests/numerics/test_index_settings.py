"""The index with its prior, its groups and the attack's answer: against closed forms and brute force."""

import math
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from oracles import exact_gauss_newton_trace
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.curvature import cross_entropy
from wcitrain.measures import HessianTrace, Problem, WeightCurvatureIndex
from wcitrain.measures import response as response_module
from wcitrain.params import Layers, select_layers
from wcitrain.report.figures import layer_bars
from wcitrain.seeding import generator_from

GROUPS = ("filter", "layer", "stage")


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small convolutional network of two stages, and images."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3)
    body = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    layers = OrderedDict(layer1=body, flat=nn.Flatten(), head=nn.Linear(6, 3))
    x, y = image_batch(40)
    return nn.Sequential(layers).double(), x.double(), y


def index(model: nn.Module, x: torch.Tensor, y: torch.Tensor, attack=None, initial=None, **settings):
    """The index layer by layer."""
    return WeightCurvatureIndex(**settings).by_layer(Problem(model, [(x, y)], attack, initial=initial))


def hadamard(size: int) -> torch.Tensor:
    """Rows of signs, each orthogonal to the others: a quadratic form's mean over them is its trace."""
    rows = torch.ones(1, 1, dtype=torch.float64)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


@pytest.mark.parametrize("center", ["origin", "initial"])
def test_finer_groups_have_a_lower_index_of_the_same_traces(center):
    """Σ_j sqrt(a_j t_j) <= sqrt(Σ a_j Σ t_j); a group that loses a weight, or has it twice, breaks sums."""
    model, x, y = network()
    start = {name: value + 0.1 * torch.rand_like(value) for name, value in model.state_dict().items()}
    results = [index(model, x, y, initial=start, center=center, groups=groups) for groups in GROUPS]
    assert [len(result.layers) for result in results] == [13, 3, 2]
    sums = [float(result.per_layer.sum()) for result in results]
    assert sums[0] < sums[1] < sums[2]
    for key in ("squared_norm", "trace", "size"):
        totals = [float(result.columns()[key].sum()) for result in results]
        assert totals == pytest.approx([totals[0]] * 3, rel=1e-12)
    filters, whole = results[0].shown()[1], results[1].columns()
    torch.testing.assert_close(filters["trace"], whole["trace"], rtol=1e-12, atol=0)
    assert bool((filters["wci"] <= whole["wci"]).all())


@pytest.mark.parametrize("groups", ["filter", "stage"])
def test_group_traces_are_those_of_the_dense_matrix(groups):
    """Rows of a convolution taken along the wrong dimension have the right sum and wrong terms."""
    model, x, y = network()
    result = index(model, x, y, groups=groups, num_probes=200)
    loss, layers = cross_entropy(model(x), y), select_layers(model)
    if groups == "filter":
        layers = Layers(layers, {name: [*map(str, range(len(layers[name])))] for name in layers})
    exact = exact_gauss_newton_trace(loss, layers)
    exact = torch.stack([exact[:2].sum(), exact[2]]) if groups == "stage" else exact
    assert bool(((result.trace.mean - exact).abs() < 4.5 * result.trace.stderr + 1e-12).all())
    assert float(result.trace.stderr.sum()) < 0.2 * float(exact.sum())  # else the line above says little


def test_a_prior_at_the_start_measures_the_distance_from_it():
    """At the start itself the index is zero; at the origin the distance is the norm; an unknown one stops."""
    model, x, y = network()
    zero = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    plain = index(model, x, y)
    assert index(model, x, y, initial=model.state_dict(), center="initial").total == 0
    moved = index(model, x, y, initial=zero, center="initial")
    assert (moved.total, moved.total_stderr) == (plain.total, plain.total_stderr)
    assert "prior at the weights before training" in moved.headline()
    assert "||W−W⁰||_F²" in moved.table()
    half = {name: value / 2 for name, value in model.state_dict().items()}
    assert index(model, x, y, initial=half, center="initial").total == pytest.approx(
        plain.total / 2, rel=1e-12
    )
    with pytest.raises(ValueError, match=r"wci.center: got initial weights of the right shape for 0 of 3"):
        index(model, x, y, center="initial")


def linear(norm: str) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, Attack]:
    """Two classes, one layer, images that the attack does not push out of the box."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False).double()
    x, y = 0.4 + 0.2 * torch.rand(32, 4).double(), torch.randint(0, 2, (32,))
    eps = 0.1 if norm == "linf" else 0.3
    return model, x, y, Attack(ThreatModel(norm, eps), 4, 3 * eps, start="none")


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_answer_of_the_worst_case_of_a_linear_model_is_the_closed_form(norm, monkeypatch):
    """φ = ln(1 + exp(−margin + eps ‖w − w'‖)), dual norm: its Hessian has a part that Danskin's lacks.

    In l2 the images turn with the weights; in linf they are corners, which do not move, and nothing is added.
    Hadamard's eight directions make the mean over v exact but for h² terms.
    """
    model, x, y, attack = linear(norm)
    rows = iter(hadamard(8).repeat(40, 1))
    monkeypatch.setattr(response_module, "signs", lambda tensors, generator: [next(rows).reshape(2, 4)])
    found = index(model, x, y, attack, response=1e-3, num_probes=8, chunk_size=8)
    added = float((found.trace.mean - found.held.trace.mean).sum())
    order, eps, w = 1 if norm == "linf" else 2, attack.threat.eps, model.weight.detach()
    away = w[1 - y] - w[y]
    x_adv = x + eps * (away.sign() if norm == "linf" else F.normalize(away))

    def worst(w: torch.Tensor) -> torch.Tensor:
        apart = w[y] - w[1 - y]
        return F.softplus(eps * apart.norm(order, dim=1) - (apart * x).sum(1)).mean()

    def held(w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x_adv @ w.T, y)

    hessian = torch.autograd.functional.hessian
    exact, danskin = (float(hessian(f, w).reshape(8, 8).trace()) for f in (worst, held))
    assert (exact > 1.2 * danskin) == (norm == "l2")
    assert added == pytest.approx(exact - danskin, rel=1e-4, abs=1e-9)
    assert found.mean_loss == pytest.approx(float(worst(w)), rel=1e-12)
    held = found.held.trace
    assert abs(float(held.mean) - danskin) < 4 * float(held.stderr) < 0.7 * danskin
    assert found.quotient[0] == pytest.approx(math.sqrt(exact / danskin), abs=4 * found.quotient[1] + 1e-4)


@pytest.mark.filterwarnings("ignore:wci. a single chunk")
def test_the_answer_of_a_network_is_that_of_brute_force(monkeypatch):
    """Every weight moved by itself, the attack called anew from the same start, as anybody would do it.

    A smooth network and an l2 attack in float64; Hadamard's directions make the mean over v exact up to h².
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[2].weight.mul_(3)
    x, y = torch.rand(6, 4).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    attack = Attack(ThreatModel("l2", 0.2), 5, 0.1)
    calls = iter(range(10**6))

    def signs(tensors, generator):
        rows = hadamard(tensors[0].numel())
        return [rows[(next(calls) // 2) % len(rows)].reshape(tensors[0].shape)]  # two layers a draw

    monkeypatch.setattr(response_module, "signs", signs)
    found = index(model, x, y, attack, response=1e-3, num_probes=16, chunk_size=6)

    def value(images) -> float:
        return float(F.cross_entropy(model(images()), y).detach())

    phi = partial(value, lambda: attack(model, x, y, generator_from("cpu", 0, "measure_wci", 0, 0)))

    def moved(f, place: torch.Tensor, h: float) -> float:
        with torch.no_grad():
            place += h
            result = f()
            place -= h
        return result

    h, x_adv = 1e-3, attack(model, x, y, generator_from("cpu", 0, "measure_wci", 0, 0))
    held = partial(value, lambda: x_adv)
    places = [[*p.detach().view(-1).split(1)] for p in model.parameters()]
    both = [
        [sum((moved(f, e, h) - 2 * f() + moved(f, e, -h)) / h**2 for e in entries) for entries in places]
        for f in (phi, held)
    ]
    assert (found.trace.mean - found.held.trace.mean).tolist() == pytest.approx(
        [with_answer - without for with_answer, without in zip(*both, strict=True)], rel=2e-3
    )
    assert sum(both[0]) > 1.05 * sum(both[1])  # else nothing is told apart


@pytest.mark.filterwarnings("ignore:wci. a single chunk")
def test_the_answer_is_shown_and_written_with_what_it_is_compared_to():
    """An index with the attack's answer under the name of one without is the worst of both."""
    model, x, y, attack = linear("l2")
    result = index(model, x, y, attack, response=0.01)
    assert result.loss == "robust loss l2 0.3 PGD-4 answering at W ± 0.01 ‖W‖"
    assert "The same with images held fixed: " in result.headline()
    document = result.as_dict()
    assert document["quotient"] == result.quotient[0] > 1
    assert document["held"] == result.held.total < result.total
    assert document["added"] == pytest.approx(float((result.trace.mean - result.held.trace.mean).sum()))
    assert 0 < document["added_stderr"] < document["added"]
    assert "; the answer adds " in result.headline()
    measured = WeightCurvatureIndex(response=0.01).measure(Problem(model, [(x, y)], attack))
    assert measured.parts["quotient"] == result.quotient[0]
    single = index(model, x, y, attack, response=0.01, chunk_size=32)
    assert (single.quotient[0] > 1, single.quotient[1]) == (True, math.inf)


def test_filters_are_added_up_where_people_look():
    """A table of five thousand rows and a figure of a hundred metres help nobody; the JSON has them all."""
    model, x, y = network()
    result = index(model, x, y, groups="filter")
    lines = result.table().splitlines()
    assert [line.split()[0] for line in lines] == [
        "layer,",
        "layer1.0.weight",
        "layer1.2.weight",
        "head.weight",
    ]
    assert len(layer_bars(result, "title").axes[0].get_yticks()) == 3
    assert len(result.as_dict()["layers"]) == 13
    assert ", by filter)" in result.headline()


@pytest.mark.parametrize(
    ("measure", "settings", "message"),
    [
        (WeightCurvatureIndex, {"groups": "filter", "split_qkv": True}, "groups: got filter with split_qkv"),
        (WeightCurvatureIndex, {"groups": "filter", "estimator": "top_layer"}, "with estimator top_layer"),
        (HessianTrace, {"center": "initial"}, "center: got initial; expected origin"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(measure, settings, message):
    """A setting that is dropped in silence measures something else under its name."""
    with pytest.raises(ValueError, match=message):
        measure(**settings)


def test_a_response_needs_an_attack():
    """The clean loss has nobody to answer: both indices would be the same, and read as a finding."""
    model, x, y = network()
    with pytest.raises(ValueError, match=r"wci.response: got the clean loss; expected an attack"):
        index(model, x, y, response=0.01)


def test_the_answer_leaves_the_model_alone_and_takes_a_frozen_one():
    """It moves weights: of a copy, in float64, whatever the mode, with the model's own untouched."""
    torch.manual_seed(0)
    model = BatchNormNet().train().requires_grad_(False)
    before, (x, y) = everything(model), image_batch(24)
    settings = {"attack": Attack(ThreatModel("linf", 0.1), 2, 0.05), "response": 0.1, "num_probes": 1}
    first = index(model, x, y, **settings)
    with torch.inference_mode():
        again = index(model, x, y, **settings)
    assert_same(before, everything(model))
    assert again.total == first.total
    assert (model.training, model.conv.weight.dtype) == (True, torch.float32)
    assert not any(p.requires_grad for p in model.parameters())
