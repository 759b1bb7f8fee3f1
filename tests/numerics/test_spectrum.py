"""Eigenvalues of the Hessian against closed forms and the dense matrix; their errors and scaling."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, image_batch
from scipy.linalg import eigh
from torch import nn
from torch.func import functional_call

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import attacked, measuring
from wcitrain.measures.spectrum import hessian_spectrum, lambda_max

THREAT = ThreatModel("linf", 0.1)


def tanh_net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A smooth network of 115 parameters, with an indefinite Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)
    ).double()
    x, y = image_batch(30)
    return model, x.double(), y


def dense(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """The Hessian [P, P] of the mean loss by torch.autograd.functional, independent of our products."""
    names, tensors = zip(*model.named_parameters(), strict=True)
    sizes = [t.numel() for t in tensors]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {n: p.view(t.shape) for n, p, t in zip(names, flat.split(sizes), tensors, strict=True)}
        return F.cross_entropy(functional_call(model, parts, (x,)), y)

    flat = torch.cat([t.detach().flatten() for t in tensors])
    return torch.autograd.functional.hessian(loss, flat).numpy()


def numbers(result) -> list[float]:
    return [v for k, v in result.parts.items() if k.startswith("eigenvalue")]


def residuals(result) -> list[float]:
    return [v for k, v in result.parts.items() if k.startswith("residual")]


def test_the_known_point_of_softmax_regression():
    """Worked out by hand: a mean that is a sum, or a bias that is counted, shows. The dense way."""
    model = nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 2))
    data = [(torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double(), torch.tensor([0, 2]))]
    full = hessian_spectrum(model, data, None, k=6)
    assert len(numbers(full)) == 6
    assert sum(numbers(full)) == pytest.approx(1.8285859402617057, rel=1e-12)  # the trace
    assert full.value == pytest.approx(0.9351099610702933, rel=1e-12)
    found = lambda_max(model, data, None, tolerance=1e-12)
    assert (found.name, list(found.parts)) == ("lambda_max", ["residual"])
    assert found.value == pytest.approx(0.9351099610702933, rel=1e-12)
    assert len(numbers(hessian_spectrum(model, data, None, k=50))) == 6


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_the_ends_of_the_spectrum_are_those_of_the_dense_hessian(which):
    """At adversarial images, blocks between layers included: leaving them out changes every eigenvalue."""
    model, x, y = tanh_net()
    with measuring(model):
        ((x_adv, _),) = attacked(model, [(x, y)], THREAT, num_steps=5)
    λ = eigh(dense(model, x_adv, y), eigvals_only=True)
    truth = {"LA": λ[::-1], "SA": λ, "LM": λ[np.argsort(-np.abs(λ))]}[which][:4]
    assert λ[0] < -1e-3  # indefinite: LA and LM and SA differ
    result = hessian_spectrum(model, [(x, y)], THREAT, k=4, which=which, num_steps=5, tolerance=1e-10)
    np.testing.assert_allclose(numbers(result), truth, rtol=1e-7, atol=1e-9)
    assert result.value == numbers(result)[0]


def test_the_residual_bounds_the_distance_to_an_eigenvalue():
    """Stopped early, Lanczos is wrong; its residual must say by how much, or the number cannot be trusted."""
    model, x, y = tanh_net()
    λ = eigh(dense(model, x, y), eigvals_only=True)
    loose, tight = (hessian_spectrum(model, [(x, y)], None, k=3, tolerance=t) for t in (0.3, 1e-12))
    for result in (loose, tight):
        for value, r in zip(numbers(result), residuals(result), strict=True):
            assert np.abs(λ - value).min() <= r + 1e-12
    assert max(residuals(tight)) < 1e-9
    assert max(residuals(loose)) > 1e-7


def test_ragged_chunks_give_the_hessian_of_all_examples():
    """Averaging batch means without their sizes, or summing them, is a common mistake (30 = 4 · 7 + 2)."""
    model, x, y = tanh_net()
    values = [lambda_max(model, [(x, y)], None, chunk_size=size, tolerance=1e-10).value for size in (7, 30)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    batches = [(x[:11], y[:11]), (x[11:], y[11:])]
    assert lambda_max(model, batches, None, chunk_size=30, tolerance=1e-10).value == pytest.approx(
        values[1], rel=1e-12
    )


def test_the_error_is_the_spread_over_samples_of_examples():
    """Models are compared by their errors: those must be of the size of what another sample would change.

    25 samples: their deviation is known to 14 %; the eigenvector moves too, which (2) leaves out.
    """
    torch.manual_seed(0)
    model = nn.Linear(2, 3, bias=False).double()
    x, y = torch.rand(2000, 2).double(), torch.randint(0, 3, (2000,))
    results = []
    for seed in range(25):
        rows = torch.randint(0, 2000, (80,), generator=torch.Generator().manual_seed(seed))
        results.append(lambda_max(model, [(x[rows], y[rows])], None, chunk_size=16))
    spread = torch.tensor([r.value for r in results]).std()
    assert 0.5 < spread / torch.tensor([r.stderr for r in results]).mean() < 1.8
    assert math.isnan(lambda_max(model, [(x[:50], y[:50])], None).stderr)  # one chunk


def test_weights_before_a_normalisation_scale_the_eigenvalue():
    """λ_max alone is no measure of flatness: the same function has any value one likes (c = 1/2 and 2)."""
    torch.manual_seed(0)
    model = BatchNormNet().double().eval()
    model.bn.eps = 0.0
    x, y = image_batch(20)
    data = [(x.double(), y)]
    before = lambda_max(model, data, THREAT, layers="conv.weight", tolerance=1e-10).value
    for c in (0.5, 2.0):
        with torch.no_grad():
            model.conv.weight.mul_(c)
            model.bn.running_mean.mul_(c)
            model.bn.running_var.mul_(c**2)
        scaled = lambda_max(model, data, THREAT, layers="conv.weight", tolerance=1e-10).value
        assert scaled == pytest.approx(before / c**2, rel=1e-8)
        with torch.no_grad():
            model.conv.weight.div_(c)
            model.bn.running_mean.div_(c)
            model.bn.running_var.div_(c**2)


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
    model = Attention()
    assert lambda_max(model, [image_batch(20)], THREAT, num_steps=2).value > 0


def test_a_flat_loss_has_eigenvalue_zero_and_a_diverged_one_is_refused():
    """ARPACK dies on a zero matrix and returns garbage on NaN."""
    model, x, y = tanh_net()
    with torch.no_grad():
        model[4].weight.zero_()
        model[3].weight.zero_()
        model[4].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))  # probabilities of exactly one and zero
    flat = hessian_spectrum(model, [(x, 0 * y)], None, k=2)
    assert numbers(flat) == [0.0, 0.0]
    assert residuals(flat) == [0.0, 0.0]
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        lambda_max(model, [(x, y)], None)


def test_what_cannot_converge_stops():
    """An eigenvalue that has not converged would be reported like one that has."""
    model, x, y = tanh_net()
    with pytest.raises(RuntimeError, match="of 5 eigenvalues to 1e-15 after 1 iterations"):
        hessian_spectrum(model, [(x, y)], None, tolerance=1e-15, max_iterations=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "BE"}, "which: got 'BE'"),
        ({"k": 0}, "got k=0"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"layers": "nothing*"}, "layers: got 'nothing"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    """Before the attack, not after it."""
    model, x, y = tanh_net()
    with pytest.raises(ValueError, match=message):
        hessian_spectrum(model, [(x, y)], THREAT, **options)
