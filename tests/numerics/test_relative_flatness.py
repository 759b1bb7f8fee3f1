"""Relative flatness against a known point, the dense Hessian, and the symmetry it was made for."""

import math

import pytest
import torch
from cases import image_batch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.curvature import cross_entropy, dense_hessian
from wcitrain.measures.adversarial import attacked, measuring
from wcitrain.measures.relative_flatness import relative_flatness

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
    result = relative_flatness(model, data, None)
    assert result.value == pytest.approx(1.4015738376273366, rel=1e-12)
    assert result.parts == {"weight": result.value}


def test_the_head_is_the_definition_at_the_adversarial_images():
    """The closed form must be that of the robust loss, whatever the chunks (30 = 4 · 7 + 2)."""
    model, x, y = network()
    with measuring(model):
        adversarial = attacked(model, [(x[i : i + 7], y[i : i + 7]) for i in range(0, 30, 7)], THREAT)
    x_adv = torch.cat([images for images, _ in adversarial])
    H = dense_hessian(cross_entropy(model(x_adv), y), {"w": model[5].weight})["w"]
    result = relative_flatness(model, [(x, y)], THREAT, chunk_size=7)
    assert result.value == pytest.approx(definition(model[5].weight, H), rel=1e-10)
    assert result.value != pytest.approx(relative_flatness(model, [(x, y)], None).value, rel=1e-3)


@pytest.mark.parametrize("index", [0, 3, 5])
def test_probes_estimate_the_definition_in_every_layer(index):
    """A wrong factor L, or signs of the wrong shape, biases κ: a convolution, a tall and a flat matrix.

    10 seeds of 60 probes in one chunk: the examples are fixed, the spread over seeds is the error.
    """
    model, x, y = network(nn.Tanh)
    name = f"{index}.weight"
    truth = definition(
        model[index].weight, dense_hessian(cross_entropy(model(x), y), {"w": model[index].weight})["w"]
    )
    results = [
        relative_flatness(model, [(x, y)], None, layers=name, num_probes=60, chunk_size=30, seed=seed)
        for seed in range(10)
    ]
    values = torch.tensor([r.value for r in results])
    error = float(values.std()) / math.sqrt(10)
    assert error < 0.15 * abs(truth)
    assert abs(float(values.mean()) - truth) < 4 * error
    assert math.isnan(results[0].stderr)  # one chunk


def test_errors_cover_the_probes_and_the_examples():
    """The head has both ways: they must agree within the error of the probes' way, and layers must add up."""
    model, x, y = network()
    exact = relative_flatness(model, [(x, y)], THREAT, chunk_size=5)
    probed = relative_flatness(model, [(x, y)], THREAT, layers="5.weight", num_probes=40, chunk_size=5)
    assert 0 < probed.stderr < 0.5 * exact.value
    assert abs(probed.value - exact.value) < 4 * probed.stderr
    every = relative_flatness(model, [(x, y)], THREAT, layers="weights", chunk_size=5)
    assert list(every.parts) == ["0.weight", "3.weight", "5.weight"]
    assert every.value == pytest.approx(sum(every.parts.values()), rel=1e-12)
    # piecewise linear: blocks are positive semidefinite, and so is every draw
    assert min(every.parts.values()) >= 0


def test_relative_flatness_ignores_scale_between_layers():
    """Made for this. Scaling by 4 is exact in binary; attack and probes are the same, so is κ to rounding."""
    model, x, y = network()

    def values() -> list[float]:
        return [
            relative_flatness(model, [(x, y)], THREAT).value,
            relative_flatness(model, [(x, y)], THREAT, layers="3.weight").value,
        ]

    before = values()
    with torch.no_grad():
        model[3].weight.mul_(4)
        model[3].bias.mul_(4)
        model[5].weight.div_(4)
    assert values() == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "*bias"}, "layers: got 3.bias"),
        ({"num_probes": 0}, "num_probes: got 0"),
        ({"layers": "none*"}, "selects no trainable tensor"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    """A bias has no rows; it would count as a matrix of one column."""
    model, x, y = network()
    with pytest.raises(ValueError, match=message):
        relative_flatness(model, [(x, y)], None, **options)


def test_a_model_without_linear_head_is_refused():
    """The closed form of some other layer would be believed."""
    model = nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten())
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        relative_flatness(model, [image_batch(10)], None)
    with pytest.raises(ValueError, match="none of 1 recorded passes"):
        relative_flatness(
            nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Softplus()), [image_batch(10)], None
        )
