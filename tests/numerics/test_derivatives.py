"""Gradients, eigenvalues, relative flatness: against closed forms and dense matrices; errors and scaling."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import image_batch
from oracles import dense_hessian
from scipy.linalg import eigh
from test_flatness import EPS, binary_model
from torch import nn

from wcitrain.curvature import cross_entropy
from wcitrain.measures import Problem
from wcitrain.measures.derivatives import (
    InputCurvature,
    InputGradientNorm,
    LambdaMax,
    LossGradientNorm,
    RelativeFlatness,
)
from wcitrain.measures.problem import measuring


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


@pytest.mark.parametrize(("measure", "low", "high"), [(LossGradientNorm, 0.6, 1.6), (LambdaMax, 0.5, 1.8)])
def test_the_error_is_the_spread_over_samples_of_examples(measure, low, high):
    """Models are compared by their errors: those must be of the size of what another sample would change.

    30 samples: their deviation is known to 13 %; the eigenvector moves too, which its error leaves out.
    """
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.rand(2000, 4).double(), (torch.rand(2000) < 0.3).long()
    results = []
    for seed in range(30):
        rows = torch.randint(0, 2000, (100,), generator=torch.Generator().manual_seed(seed))
        results.append(measure().measure(Problem(model, [(x[rows], y[rows])], chunk_size=10)))
    spread = torch.tensor([r.value for r in results]).std()
    assert low < spread / torch.tensor([r.stderr for r in results]).mean() < high
    assert math.isnan(measure().measure(Problem(model, [(x[:50], y[:50])])).stderr)  # one chunk has no spread


def test_input_gradient_norms_are_the_closed_form():
    """||Wᵀ(p − e_y)|| by example, in the dual of the threat's norm; a mean's gradient is N times less."""
    model, x, y = binary_model()
    g = softmax_errors(model, worst_images(model, x, y), y) @ model.weight.detach()
    lengths = {"l1": g.abs().sum(1), "l2": g.norm(dim=1), "linf": g.abs().amax(1)}
    result = InputGradientNorm().measure(Problem(model, [(x, y)], EPS, chunk_size=7))
    assert result.parts == pytest.approx({k: float(v.mean()) for k, v in lengths.items()}, rel=1e-10)
    assert result.value == result.parts["l1"]
    assert result.stderr == pytest.approx(float(lengths["l1"].std()) / math.sqrt(40), rel=1e-10)
    clean = InputGradientNorm().measure(Problem(model, [(x, y)]))
    assert clean.value == clean.parts["l2"]


@pytest.mark.parametrize("threat", [None, EPS], ids=["clean", "linf"])
def test_input_curvature_is_the_closed_form(threat):
    """The difference of closed gradients over h = 1.5; near, ∇²ℓ = Wᵀ(diag p − p pᵀ)W along the sign."""
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
    result = InputCurvature().measure(problem)
    assert result.value == pytest.approx(float(far.mean()), rel=1e-9)
    assert result.stderr == pytest.approx(float(far.std()) / math.sqrt(40), rel=1e-9)
    # Truncation: one third derivative times h/2, 1e-5 of the value here at most; rounding 1e-16/h.
    assert InputCurvature(1e-5).measure(problem).value == pytest.approx(float(limit.mean()), rel=1e-4)


def test_a_constant_model_has_no_slope_and_no_curvature():
    """Zero over zero: one example without gradient would turn the mean into NaN; ARPACK dies on zeros."""
    model, x, y = binary_model()
    with torch.no_grad():
        model.weight.zero_()
    for measure in (InputCurvature(), InputGradientNorm()):
        assert measure.measure(Problem(model, [(x, y)], EPS)).value == 0
    with torch.no_grad():
        model.bias.copy_(torch.tensor([2000.0, 0.0]))  # probabilities of exactly one and zero
    flat = Problem(model, [(x, torch.zeros_like(y))], EPS, chunk_size=7)
    for measure in (LossGradientNorm(), LambdaMax()):
        result = measure.measure(flat)
        assert (result.value, result.stderr) == (0, 0)


def tanh_net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A smooth network of 133 parameters, with an indefinite Hessian."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)
    model = nn.Sequential(*layers).double()
    x, y = image_batch(30)
    return model, x.double(), y


@pytest.mark.parametrize(
    ("measure", "value"),
    [(LambdaMax(tolerance=1e-12), 0.9351099610702933), (RelativeFlatness(), 1.4015738376273366)],
)
def test_the_known_point_of_softmax_regression(measure, value):
    """Worked out by hand: a mean that is a sum shows, and ||W|| Tr(H), also called relative flatness."""
    model = nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 2))
    data = [(torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double(), torch.tensor([0, 2]))]
    result = measure.measure(Problem(model, data))
    assert result.value == pytest.approx(value, rel=1e-12)
    assert list(result.parts) == [{"lambda_max": "residual"}.get(measure.name, "weight")]


def test_the_largest_eigenvalue_is_that_of_the_dense_hessian():
    """At adversarial images, blocks between layers included: leaving them out changes every eigenvalue.

    Averaging batch means without their sizes, or summing them, is a common mistake (30 = 4 · 7 + 2). The
    residual must say by how much Lanczos is wrong, or the number cannot be trusted.
    """
    model, x, y = tanh_net()
    problem = Problem(model, [(x[:11], y[:11]), (x[11:], y[11:])], EPS, chunk_size=7)
    with measuring(model):
        x_adv = torch.cat([images for images, _ in problem.adversarial()])
    names, tensors = zip(*model.named_parameters(), strict=True)
    sizes = [t.numel() for t in tensors]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {n: p.view(t.shape) for n, p, t in zip(names, flat.split(sizes), tensors, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (x_adv,)), y)

    flat = torch.cat([t.detach().flatten() for t in tensors])
    λ = eigh(torch.autograd.functional.hessian(loss, flat).numpy(), eigvals_only=True)
    assert λ[0] < -1e-3  # indefinite
    result = LambdaMax(tolerance=1e-12).measure(problem)
    assert result.value == pytest.approx(λ[-1], rel=1e-7)
    assert np.abs(λ - result.value).min() <= result.parts["residual"] + 1e-12
    assert result.parts["residual"] < 1e-9


def test_fused_attention_is_computed_by_its_formula():
    """The fused kernels have no second derivative: every ViT would fail."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x.reshape(-1, 1, 4, 4)).chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1))

    torch.manual_seed(0)
    assert LambdaMax().measure(Problem(Attention(), [image_batch(20)], EPS)).value > 0


def test_what_cannot_converge_stops(monkeypatch):
    """An eigenvalue that has not converged would be reported like one that has."""
    monkeypatch.setattr("wcitrain.measures.derivatives.MAX_RESTARTS", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 8))
    with pytest.raises(RuntimeError, match="no eigenvalue to 1e-15; expected one after 1 restarts"):
        LambdaMax(tolerance=1e-15).measure(Problem(model, [image_batch(60)]))


def test_relative_flatness_is_the_definition():
    """Σ ⟨w_s, w_r⟩ Tr(H_sr), block by block, at the adversarial images, whatever the chunks."""
    model, x, y = tanh_net()
    problem = Problem(model, [(x, y)], EPS)
    x_adv = torch.cat([images for images, _ in problem.adversarial(7)])
    W = model[4].weight.detach()
    H = dense_hessian(cross_entropy(model(x_adv), y), {"w": model[4].weight})["w"].reshape(3, 5, 3, 5)
    traces = H.diagonal(dim1=1, dim2=3).sum(-1)
    value = RelativeFlatness(chunk_size=7).measure(problem).value
    assert value == pytest.approx(float((W @ W.T * traces).sum()), rel=1e-10)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(1, 3, 4), nn.Flatten()], "a head of type NoneType"),
        ([nn.Flatten(), nn.Linear(16, 3), nn.Softplus()], "the head did not return"),
    ],
)
def test_a_model_without_linear_head_is_refused(layers, message):
    """The closed form of some other layer would be believed."""
    with pytest.raises(ValueError, match=message):
        RelativeFlatness().measure(Problem(nn.Sequential(*layers), [image_batch(10)]))
