"""Margins by hand, under an attack whose answer is known, and their normalisation."""

import math

import pytest
import torch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.losses import Margins, NormalisedMargin
from wcitrain.measures.norms import SpectralNorms
from wcitrain.measures.problem import Problem


def linear(classes: int = 3) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A linear map to three classes and 101 points well inside the box."""
    torch.manual_seed(0)
    model = nn.Linear(5, classes).double()
    return model, 0.3 + 0.4 * torch.rand(101, 5).double(), torch.randint(0, classes, (101,))


def test_margins_are_right_class_minus_best_other():
    """max over all classes, not the others, is never positive; at N = 101 the percentile is an example."""
    model, x, y = linear()
    with torch.no_grad():
        z = model(x)
    expected = torch.tensor(
        [z[i, c] - max(z[i, j] for j in range(3) if j != c) for i, c in enumerate(y.tolist())]
    )
    result = Margins().measure(Problem(model, [(x[:40], y[:40]), (x[40:], y[40:])]))
    assert result.value == pytest.approx(float(expected.sort().values[10]), rel=1e-12)
    known = {"mean": expected.mean(), "min": expected.min(), "median": expected.median()}
    known |= {"mean_stderr": expected.std() / math.sqrt(101), "accuracy": (z.argmax(1) == y).double().mean()}
    assert result.parts == pytest.approx({key: float(value) for key, value in known.items()}, rel=1e-9)
    assert result.num_examples == 101


def test_robust_margins_are_lower_by_eps_times_the_dual_norm():
    """Two classes, linf: γ_adv = γ − eps ‖w_y − w_j‖_1 exactly; attacking towards the label raises it."""
    model, x, y = linear(classes=2)
    clean, robust = (
        Margins().measure(Problem(model, [(x, y)], t)) for t in (None, ThreatModel("linf", 0.05))
    )
    drop = 0.05 * float((model.weight[0] - model.weight[1]).detach().abs().sum())
    for name in ("mean", "min", "median"):
        assert clean.parts[name] - robust.parts[name] == pytest.approx(drop, rel=1e-9)
    assert clean.value - robust.value == pytest.approx(drop, rel=1e-9)


def test_error_of_the_quantile_is_that_of_repetition():
    """sqrt(q (1 − q) / N), not sqrt(q / N): 0.71 at the median; 300 repetitions: spread within 4 · 4 %."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    y = torch.zeros(100, dtype=torch.long)  # so γ = x_0, normal
    problems = (Problem(model, [(torch.randn(100, 2).double(), y)]) for _ in range(300))
    results = [Margins(0.5).measure(problem) for problem in problems]
    spread = torch.tensor([r.value for r in results]).std()
    claimed = torch.tensor([r.stderr for r in results]).mean()
    # 0.05: curvature of the quantile function
    assert float(claimed / spread) == pytest.approx(1, abs=0.16 + 0.05)


def test_normalised_margin_does_not_change_with_the_scale_of_the_weights():
    """Margins alone are gamed by scale: three times the weights, three times the margin, one classifier."""
    model, x, y = linear()
    nn.init.zeros_(model.bias)
    problem = Problem(model, [(x, y)])
    before, plain = NormalisedMargin().measure(problem), Margins().measure(problem)
    sigma = float(torch.linalg.matrix_norm(model.weight.detach(), 2))
    assert before.value == pytest.approx(plain.value / sigma, rel=1e-9)
    assert before.stderr == pytest.approx(plain.stderr / sigma, rel=1e-9)
    log_product = SpectralNorms().measure(problem).value / 2
    assert before.parts["log_spectral_product"] == pytest.approx(log_product, rel=1e-12)
    with torch.no_grad():
        model.weight *= 3
    assert NormalisedMargin().measure(problem).value == pytest.approx(before.value, rel=1e-9)
    assert Margins().measure(problem).value == pytest.approx(3 * plain.value, rel=1e-9)


def test_complexity_is_defined_for_positive_margins_only():
    """2 ln of a negative margin would end the measurement in an error; NaN says there is none."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    x = torch.tensor([[0.9, 0.1]] * 5, dtype=torch.float64)
    right, wrong = (
        NormalisedMargin().measure(Problem(model, [(x, torch.full((5,), label))])) for label in (0, 1)
    )
    assert right.parts["log_complexity"] == pytest.approx(-2 * math.log(0.8), rel=1e-9)
    assert wrong.value == pytest.approx(-0.8)
    assert math.isnan(wrong.parts["log_complexity"])


@pytest.mark.parametrize(
    ("classes", "label", "message"), [(3, 3, "labels \\(2,\\) up to 3"), (1, 0, "outputs \\(2, 1\\)")]
)
def test_wrong_input_is_explained(classes, label, message):
    """A label beyond the classes would otherwise fail deep inside, or on a GPU not at all."""
    data = [(torch.rand(2, 5).double(), torch.tensor([0, label]))]
    with pytest.raises(ValueError, match=message):
        Margins().measure(Problem(nn.Linear(5, classes).double(), data))
