"""Gradients in weights and images against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_flatness import EPS, binary_model
from torch import nn

from wcitrain.measures.gradients import InputCurvature, InputGradientNorm, LossGradientNorm
from wcitrain.measures.problem import Problem


def worst_images(model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The adversarial images of a binary linear model under linf."""
    W = model.weight.detach()
    return x + EPS.eps * (W[1 - y] - W[y]).sign()


def softmax_errors(model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """p − e_y [N, C]: the gradient of the cross-entropy in the outputs."""
    with torch.no_grad():
        return model(x).softmax(1) - F.one_hot(y, model.out_features)


def test_gradient_norm_is_the_closed_form_at_the_worst_images():
    """mean (p − e_y) hᵀ over all examples before the norm: the mean of chunks' norms is larger."""
    model, x, y = binary_model()
    z = worst_images(model, x, y)
    errors = softmax_errors(model, z, y)
    weight, bias = (errors.T @ z / 40).norm(), errors.mean(0).norm()
    result = LossGradientNorm().measure(Problem(model, [(x, y)], EPS, chunk_size=7))
    assert result.parts == pytest.approx({"weight": float(weight), "bias": float(bias)}, rel=1e-10)
    assert result.value == pytest.approx(float((weight**2 + bias**2).sqrt()), rel=1e-10)
    assert result.stderr > 0
    assert math.isnan(LossGradientNorm().measure(Problem(model, [(x, y)])).stderr)  # one chunk has no spread


def test_the_error_of_the_gradient_norm_is_its_spread_over_samples():
    """The delta method along the gradient: 40 samples, whose deviation is known to 11 %."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.rand(2000, 4).double(), (torch.rand(2000) < 0.3).long()
    results = []
    for seed in range(40):
        rows = torch.randint(0, 2000, (100,), generator=torch.Generator().manual_seed(seed))
        results.append(LossGradientNorm().measure(Problem(model, [(x[rows], y[rows])], chunk_size=5)))
    spread = torch.tensor([r.value for r in results]).std()
    assert 0.6 < spread / torch.tensor([r.stderr for r in results]).mean() < 1.6


def test_input_gradient_norms_are_the_closed_form():
    """||Wᵀ(p − e_y)|| by example, in the dual of the threat's norm; a mean's gradient is N times less."""
    model, x, y = binary_model()
    g = softmax_errors(model, worst_images(model, x, y), y) @ model.weight.detach()
    lengths = {"l1": g.abs().sum(1), "l2": g.norm(dim=1), "linf": g.abs().amax(1)}
    attacked = Problem(model, [(x, y)], EPS, chunk_size=7)
    result = InputGradientNorm().measure(attacked)
    assert result.parts == pytest.approx({k: float(v.mean()) for k, v in lengths.items()}, rel=1e-10)
    assert result.value == result.parts["l1"]
    assert result.stderr == pytest.approx(float(lengths["l1"].std()) / math.sqrt(40), rel=1e-10)
    assert InputGradientNorm("linf").measure(attacked).value == result.parts["linf"]
    clean = InputGradientNorm().measure(Problem(model, [(x, y)]))
    assert clean.value == clean.parts["l2"]


@pytest.mark.parametrize("threat", [None, EPS], ids=["clean", "linf"])
def test_input_curvature_is_the_closed_form(threat):
    """∇²ℓ = Wᵀ(diag p − p pᵀ)W in the limit; for h = 1.5 the difference of closed gradients over h."""
    model, x, y = binary_model()
    W, z = model.weight.detach(), x if threat is None else worst_images(model, x, y)
    g = softmax_errors(model, z, y) @ W
    d = g.sign() / g.sign().norm(dim=1, keepdim=True)
    with torch.no_grad():
        p = model(z).softmax(1)
        H = torch.einsum("ci,ncd,dj->nij", W, p.diag_embed() - p[:, :, None] * p[:, None], W)
    limit = (H @ d[:, :, None]).squeeze(2).norm(dim=1)
    far = (softmax_errors(model, z + 1.5 * d, y) @ W - g).norm(dim=1) / 1.5
    problem = Problem(model, [(x, y)], threat, chunk_size=7)
    exact = InputCurvature(None).measure(problem)
    assert exact.value == pytest.approx(float(limit.mean()), rel=1e-9)
    assert exact.stderr == pytest.approx(float(limit.std()) / math.sqrt(40), rel=1e-9)
    cure = InputCurvature().measure(problem)
    assert cure.value == pytest.approx(float(far.mean()), rel=1e-9)
    # Truncation: one third derivative times h/2, 1e-5 of the value here at most; rounding 1e-16/h.
    near = InputCurvature(1e-5).measure(problem)
    assert near.value == pytest.approx(exact.value, rel=1e-4)


def test_a_constant_model_has_no_slope_and_no_curvature():
    """Zero over zero: one example without gradient would turn the mean into NaN."""
    model, x, y = binary_model()
    with torch.no_grad():
        model.weight.zero_()
    problem = Problem(model, [(x, y)], EPS)
    for measure in (InputCurvature(), InputCurvature(None), InputGradientNorm()):
        assert measure.measure(problem).value == 0
    with torch.no_grad():
        model.bias.copy_(torch.tensor([2000.0, 0.0]))
    zero = LossGradientNorm().measure(Problem(model, [(x, torch.zeros_like(y))], EPS, chunk_size=7))
    assert (zero.value, zero.stderr) == (0, 0)
