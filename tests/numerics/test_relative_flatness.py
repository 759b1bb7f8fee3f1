"""Relative flatness against a known point, the dense Hessian, and the symmetry it was made for."""

import math

import pytest
import torch
from cases import image_batch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.curvature import cross_entropy, dense_hessian
from wcitrain.measures.problem import Problem
from wcitrain.measures.relative_flatness import RelativeFlatness

THREAT = ThreatModel("linf", 0.1)


def network(activation: type[nn.Module] = nn.ReLU) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False),
        activation(),
        nn.Flatten(),
        nn.Linear(8, 6),
        activation(),
        nn.Linear(6, 3),
    ).double()
    x, y = image_batch(30)
    return model, x.double(), y


def definition(W: torch.Tensor, H: torch.Tensor) -> float:
    """Σ_{s,s'} ⟨w_s, w_s'⟩ Tr(H_ss'), block by block."""
    W = W.detach().flatten(1)
    rows, columns = W.shape
    H = H.reshape(rows, columns, rows, columns)
    return sum(float(W[s] @ W[r] * H[s, :, r].diagonal().sum()) for s in range(rows) for r in range(rows))


def test_the_known_point_of_softmax_regression():
    """Worked out by hand; ||W|| Tr(H) and ||W||² Tr(H), both in use under this name, are other numbers."""
    model = nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 2))
    data = [(torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double(), torch.tensor([0, 2]))]
    result = RelativeFlatness().measure(Problem(model, data))
    assert result.value == pytest.approx(1.4015738376273366, rel=1e-12)
    assert result.parts == {"weight": result.value}


def test_the_head_is_the_definition_at_the_adversarial_images():
    """The closed form must be that of the robust loss, whatever the chunks (30 = 4 · 7 + 2)."""
    model, x, y = network()
    problem = Problem(model, [(x, y)], THREAT)
    x_adv = torch.cat([images for images, _ in problem.adversarial(7)])
    assert not torch.equal(x_adv, x)
    H = dense_hessian(cross_entropy(model(x_adv), y), {"w": model[5].weight})["w"]
    value = RelativeFlatness(chunk_size=7).measure(problem).value
    assert value == pytest.approx(definition(model[5].weight, H), rel=1e-10)


@pytest.mark.parametrize("index", [0, 3, 5])
def test_probes_estimate_the_definition_in_every_layer(index):
    """A wrong factor L, or signs of the wrong shape, biases κ: a convolution, a tall and a flat matrix.

    10 seeds of 60 probes in one chunk: the examples are fixed, the spread over seeds is the error.
    """
    model, x, y = network(nn.Tanh)
    weight = model[index].weight
    truth = definition(weight, dense_hessian(cross_entropy(model(x), y), {"w": weight})["w"])
    measure = RelativeFlatness(f"{index}.weight", num_probes=60, chunk_size=30)
    results = [measure.measure(Problem(model, [(x, y)], seed=seed)) for seed in range(10)]
    values = torch.tensor([r.value for r in results])
    error = float(values.std()) / math.sqrt(10)
    assert error < 0.15 * abs(truth)
    assert abs(float(values.mean()) - truth) < 4 * error
    assert math.isnan(results[0].stderr)  # one chunk


def test_errors_cover_the_probes_and_the_examples():
    """The head has both ways: they must agree within the error of the probes' way, and layers must add up."""
    model, x, y = network()
    problem = Problem(model, [(x, y)], THREAT)
    exact = RelativeFlatness(chunk_size=5).measure(problem)
    probed = RelativeFlatness("5.weight", num_probes=40, chunk_size=5).measure(problem)
    assert 0 < probed.stderr < 0.5 * exact.value
    assert abs(probed.value - exact.value) < 4 * probed.stderr
    every = RelativeFlatness("weights", chunk_size=5).measure(problem)
    assert list(every.parts) == ["0.weight", "3.weight", "5.weight"]
    assert every.value == pytest.approx(sum(every.parts.values()), rel=1e-12)
    # piecewise linear: blocks are positive semidefinite, and so is every draw
    assert min(every.parts.values()) >= 0


def test_relative_flatness_ignores_scale_between_layers():
    """Made for this. Scaling by 4 is exact in binary; attack and probes are the same, so is κ to rounding."""
    model, x, y = network()
    problem = Problem(model, [(x, y)], THREAT)
    measures = RelativeFlatness(), RelativeFlatness("3.weight")
    before = [measure.measure(problem).value for measure in measures]
    with torch.no_grad():
        model[3].weight.mul_(4)
        model[3].bias.mul_(4)
        model[5].weight.div_(4)
    assert [measure.measure(problem).value for measure in measures] == pytest.approx(before, rel=1e-9)


def test_a_layer_without_rows_is_refused():
    """A bias would count as a matrix of one column."""
    model, x, y = network()
    with pytest.raises(ValueError, match=r"layers: got 3\.bias"):
        RelativeFlatness("*bias").measure(Problem(model, [(x, y)]))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(1, 3, 4), nn.Flatten()], r"no nn\.Linear"),
        ([nn.Flatten(), nn.Linear(16, 3), nn.Softplus()], "none of 1 recorded passes"),
    ],
)
def test_a_model_without_linear_head_is_refused(layers, message):
    """The closed form of some other layer would be believed."""
    with pytest.raises(ValueError, match=message):
        RelativeFlatness().measure(Problem(nn.Sequential(*layers), [image_batch(10)]))
