"""Margins by hand, under an attack whose answer is known, and their normalisation."""

import math

import pytest
import torch
from cases import BatchNormNet, assert_same, everything, image_batch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.margins import margins, normalised_margin
from wcitrain.measures.norms import spectral_norms


def linear(seed: int = 0) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A linear map to three classes and 101 points well inside the box."""
    torch.manual_seed(seed)
    model = nn.Linear(5, 3).double()
    return model, 0.3 + 0.4 * torch.rand(101, 5).double(), torch.randint(0, 3, (101,))


def test_margins_are_right_class_minus_best_other():
    """max over all classes, not the others, is never positive; at N = 101 the percentile is an example."""
    model, x, y = linear()
    with torch.no_grad():
        z = model(x)
    expected = torch.tensor(
        [z[i, c] - max(z[i, j] for j in range(3) if j != c) for i, c in enumerate(y.tolist())]
    )
    found = margins(model, [(x[:40], y[:40]), (x[40:], y[40:])])
    assert found.value == pytest.approx(float(expected.sort().values[10]), rel=1e-12)
    assert found.parts["mean"] == pytest.approx(float(expected.mean()), rel=1e-12)
    assert found.parts["min"] == pytest.approx(float(expected.min()), rel=1e-12)
    assert found.parts["median"] == pytest.approx(float(expected.median()), rel=1e-12)
    assert found.parts["accuracy"] == float((z.argmax(1) == y).double().mean())
    assert found.parts["mean_stderr"] == pytest.approx(float(expected.std() / math.sqrt(101)), rel=1e-9)
    assert found.num_examples == 101


def test_robust_margins_are_lower_by_eps_times_the_dual_norm():
    """Two classes, linf: γ_adv = γ − eps ‖w_y − w_j‖_1 exactly; attacking towards the label raises it."""
    model = nn.Linear(5, 2).double()
    _, x, _ = linear()
    y = torch.arange(101) % 2
    clean = margins(model, [(x, y)])
    robust = margins(model, [(x, y)], ThreatModel("linf", 0.05), num_steps=5)
    drop = 0.05 * float((model.weight[0] - model.weight[1]).detach().abs().sum())
    for name in ("mean", "min", "median"):
        assert clean.parts[name] - robust.parts[name] == pytest.approx(drop, rel=1e-9)
    assert clean.value - robust.value == pytest.approx(drop, rel=1e-9)
    assert "PGD-5 linf 0.05" in robust.settings


def test_error_of_the_quantile_is_that_of_repetition():
    """sqrt(q (1 − q) / N), not sqrt(q / N): 0.71 at the median; 300 repetitions: spread within 4 · 4 %."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    y = torch.zeros(100, dtype=torch.long)  # so γ = x_0, normal
    found = [margins(model, [(torch.randn(100, 2).double(), y)], quantile=0.5) for _ in range(300)]
    spread = torch.tensor([f.value for f in found]).std()
    claimed = torch.tensor([f.stderr for f in found]).mean()
    # 0.05: curvature of the quantile function
    assert float(claimed / spread) == pytest.approx(1, abs=0.16 + 0.05)


def test_normalised_margin_does_not_change_with_the_scale_of_the_weights():
    """Margins alone are gamed by scale: three times the weights, three times the margin, one classifier."""
    model, x, y = linear()
    nn.init.zeros_(model.bias)
    before, plain = normalised_margin(model, [(x, y)]), margins(model, [(x, y)])
    sigma = float(torch.linalg.matrix_norm(model.weight.detach(), 2))
    assert before.value == pytest.approx(plain.value / sigma, rel=1e-9)
    assert before.stderr == pytest.approx(plain.stderr / sigma, rel=1e-9)
    assert before.parts["log_spectral_product"] == pytest.approx(spectral_norms(model).value / 2, rel=1e-12)
    with torch.no_grad():
        model.weight *= 3
    assert normalised_margin(model, [(x, y)]).value == pytest.approx(before.value, rel=1e-9)
    assert margins(model, [(x, y)]).value == pytest.approx(3 * plain.value, rel=1e-9)


def test_complexity_is_defined_for_positive_margins_only():
    """2 ln of a negative margin would end the measurement in an error; NaN says there is none."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    x = torch.tensor([[0.9, 0.1]] * 5, dtype=torch.float64)
    right = normalised_margin(model, [(x, torch.zeros(5, dtype=torch.long))])
    assert right.parts["log_complexity"] == pytest.approx(-2 * math.log(0.8), rel=1e-9)
    wrong = normalised_margin(model, [(x, torch.ones(5, dtype=torch.long))])
    assert wrong.value == pytest.approx(-0.8)
    assert math.isnan(wrong.parts["log_complexity"])


def test_a_generator_of_batches_is_read_once_and_no_further_than_needed():
    """A loader may be endless, or gone after one pass."""
    model, x, y = linear()

    def endless():
        while True:
            yield x, y

    assert normalised_margin(model, endless(), num_examples=50).num_examples == 50
    assert normalised_margin(model, iter([(x, y)])).num_examples == 101


def test_nothing_is_left_behind_and_the_seed_decides():
    """Statistics and random state must be untouched; the same seed gives the same number."""
    model = BatchNormNet().train()
    data, threat = [image_batch(20)], ThreatModel("linf", 0.1)
    before, random = everything(model), torch.get_rng_state()
    for measure in (margins, normalised_margin):
        assert measure(model, data, threat) == measure(model, data, threat)
    assert margins(model, data, threat, num_steps=0) != margins(model, data, threat, num_steps=0, seed=1)
    assert_same(before, everything(model))
    assert model.training
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantile": 0.0}, "quantile=0.0; expected a number in"),
        ({"data": []}, "got no images"),
        ({"data": [(torch.rand(2, 5).double(), torch.tensor([0, 3]))]}, "labels \\(2,\\) up to 3"),
        ({"model": nn.Linear(5, 1).double()}, "outputs \\(2, 1\\)"),
    ],
)
def test_wrong_input_is_explained(change, message):
    """A label beyond the classes would otherwise fail deep inside, or on a GPU not at all."""
    arguments = {"model": linear()[0], "data": [(torch.rand(2, 5).double(), torch.tensor([0, 0]))]} | change
    with pytest.raises(ValueError, match=message):
        margins(arguments.pop("model"), arguments.pop("data"), **arguments)
