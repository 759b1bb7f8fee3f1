"""Norms of weights against written-out matrices, paths counted one by one, and the symmetries they claim."""

import itertools
import math

import pytest
import torch
from cases import BatchNormNet, assert_same, everything
from torch import nn

from wcitrain.measures.norms import distance_from_initialisation, frobenius_norms, path_norm, spectral_norms
from wcitrain.models import create_model

SHAPE = (1, 4, 4)


def written_out(module: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of the linear part of a module, column by column."""
    size = math.prod(shape)
    columns = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        return (module(columns) - module(torch.zeros(1, *shape).double())).flatten(1).T


CONVOLUTIONS = {
    "zero padding": lambda: nn.Conv2d(2, 3, 3, padding=1),
    "stride": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
    "circular": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    "groups and dilation": lambda: nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(2, 2, 3, stride=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("side", [5, 9])
def test_spectral_norm_of_a_convolution_is_that_of_its_matrix(kind, side):
    """The kernel's own matrix norm is off by a factor; stride and padding change it; dense and by Lanczos.

    Lanczos stops at a relative error of 1e-4 of the square.
    """
    module = CONVOLUTIONS[kind]().double()
    truth = float(torch.linalg.matrix_norm(written_out(module, (2, side, side)), 2))
    found = spectral_norms(nn.Sequential(module), image_shape=(2, side, side))
    assert found.parts["0.weight"] == pytest.approx(truth, rel=1e-4)
    assert found.value == pytest.approx(2 * math.log(truth), abs=2e-4)
    kernel = module.weight.detach().flatten(1)
    assert abs(float(torch.linalg.matrix_norm(kernel, 2)) / truth - 1) > 1e-3  # else this test says nothing


def test_circular_convolution_agrees_with_the_fourier_transform():
    """An answer that shares no code with ours: Sedghi, Gupta & Long (2018), exact for periodic images."""
    module = CONVOLUTIONS["circular"]().double()
    transfer = torch.fft.fft2(module.weight.detach(), s=(9, 9)).permute(2, 3, 0, 1)
    truth = float(torch.linalg.matrix_norm(transfer, 2).max())
    assert spectral_norms(module, image_shape=(2, 9, 9)).parts["weight"] == pytest.approx(truth, rel=1e-4)


def test_spectral_product_bounds_the_network_and_ignores_scale_before_batchnorm():
    """Without BatchNorm in it, halving a convolution, which changes no output, halves the "capacity"."""
    torch.manual_seed(0)
    model = BatchNormNet().double().eval()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        model.bn.weight.normal_()
    before = spectral_norms(model, image_shape=SHAPE)
    assert before.parts["bn"] == pytest.approx(
        float((model.bn.weight.detach().abs() / (model.bn.running_var + 1e-5).sqrt()).max()), rel=1e-12
    )
    x = torch.rand(200, *SHAPE, dtype=torch.float64)
    step = 1e-3 * torch.randn_like(x)
    with torch.no_grad():
        ratio = (model(x + step) - model(x)).norm(dim=1) / step.flatten(1).norm(dim=1)
        bound = math.exp(before.value / 2)
        assert 0.02 * bound < ratio.max() < bound
        model.conv.weight *= 0.5
        model.bn.running_mean *= 0.5
        # eps is part of the variance: the output stays exactly
        model.bn.running_var.add_(1e-5).mul_(0.25).sub_(1e-5)
    assert spectral_norms(model, image_shape=SHAPE).value == pytest.approx(before.value, abs=2e-4)
    assert frobenius_norms(model).value != pytest.approx(frobenius_norms(BatchNormNet()).value)


def test_frobenius_norms_are_sums_and_products():
    """Values by hand (norms in float32); a product of many layers overflows, its logarithm does not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[1].weight.fill_(1e15)
    found = frobenius_norms(model)
    assert found.parts["0.weight"] == pytest.approx(30, rel=1e-6)
    assert found.parts["log_product"] == pytest.approx(math.log(30) + math.log(2e30), rel=1e-6)
    assert found.value == pytest.approx(2e30, rel=1e-6)
    assert "0.bias" not in found.parts
    assert "0.bias" in frobenius_norms(model, layers="weights+biases").parts
    zero = nn.Linear(2, 1).apply(lambda m: nn.init.zeros_(m.weight))
    assert frobenius_norms(zero).parts["log_product"] == -math.inf


def test_path_norm_counts_every_path():
    """Σ over paths of the product of squared weights, counted one by one; biases start paths too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    W, b, V, c = (p.detach() for p in model.parameters())
    paths = sum(
        float((V[k, j] * W[j, i]) ** 2) for k, j, i in itertools.product(range(2), range(4), range(3))
    )
    paths += sum(float((V[k, j] * b[j]) ** 2) for k, j in itertools.product(range(2), range(4)))
    paths += float(c.square().sum())
    found = path_norm(model, image_shape=(3,))
    assert found.parts["sum"] == pytest.approx(paths, rel=1e-12)
    assert found.value == pytest.approx(math.log(paths), rel=1e-12)


def test_path_norm_takes_batchnorm_as_its_affine_map():
    """Squared scale and shift: the number of a network whose BatchNorm was folded in by hand."""
    torch.manual_seed(0)
    model = BatchNormNet().double()
    with torch.no_grad():
        for t in (model.bn.running_mean, model.bn.weight, model.bn.bias):
            t.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    conv = nn.Conv2d(1, 4, 3, padding=1).double()
    scale = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()
    with torch.no_grad():
        conv.weight.copy_(model.conv.weight * scale[:, None, None, None])
        conv.bias.copy_(model.bn.bias - model.bn.running_mean * scale)
    folded = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), model.fc)
    assert path_norm(model, image_shape=SHAPE).value == pytest.approx(
        path_norm(folded, image_shape=SHAPE).value, rel=1e-12
    )


def test_path_norm_of_a_classifier_leaves_its_input_normalisation_out():
    """(1 − mean)/std may be negative: such inputs are no sum over paths."""
    kwargs = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}
    model = create_model("resnet18", num_classes=3, in_chans=1, stem="cifar", **kwargs)
    found = path_norm(model, image_shape=(1, 8, 8))
    assert found.value == path_norm(model.backbone, image_shape=(1, 8, 8)).value
    assert math.isfinite(found.value)


def test_distance_is_that_of_the_layers():
    """By hand, also from the weights of the backbone alone and of a wrapped model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    initial = everything(model)
    with torch.no_grad():
        model[0].weight += 1
        model[1].weight += torch.tensor([[3.0, 4.0]])
        model[1].bias += 100
    found = distance_from_initialisation(model, initial={f"module.{k}": v for k, v in initial.items()})
    assert found.value == pytest.approx(math.sqrt(4 + 25), rel=1e-6)
    assert found.parts["1.weight"] == pytest.approx(25, rel=1e-6)
    start = math.sqrt(float(initial["0.weight"].square().sum() + initial["1.weight"].square().sum()))
    assert found.parts["relative"] == pytest.approx(math.sqrt(29) / start, rel=1e-6)
    wrapped = nn.Module()
    wrapped.backbone = model
    assert distance_from_initialisation(wrapped, initial=initial).value == found.value


def test_nothing_is_left_behind():
    """Hooks, modes, squared copies: the model must be bit for bit what it was, and the random state too."""
    model = BatchNormNet().train()
    model.fc.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before, random = everything(model), torch.get_rng_state()
    for measure in (frobenius_norms, lambda m: distance_from_initialisation(m, initial=before)):
        assert measure(model) == measure(model)
    for measure in (spectral_norms, path_norm):
        assert measure(model, image_shape=SHAPE) == measure(model, image_shape=SHAPE)
    assert_same(before, everything(model))
    assert model.training
    assert not model.fc.weight.requires_grad
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert torch.equal(random, torch.get_rng_state())
    assert not model.conv._forward_pre_hooks


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda m: spectral_norms(m), "got no image_shape for a model with 1 convolutions"),
        (
            lambda m: spectral_norms(nn.Sequential(m, _Unused()), image_shape=SHAPE),
            "1.conv.weight, which no image reaches",
        ),
        (lambda m: path_norm(m), "path_norm: got no image_shape"),
        (
            lambda m: path_norm(nn.Sequential(m, nn.LayerNorm(3)), image_shape=SHAPE),
            "got a model with LayerNorm",
        ),
        (lambda m: distance_from_initialisation(m, initial=None), "got no initial weights"),
        (
            lambda m: distance_from_initialisation(m, initial={}),
            "none of the right shape for conv.weight, fc.weight",
        ),
    ],
)
def test_wrong_input_is_explained(measure, message):
    """Each of these would otherwise be a number that means something else."""
    with pytest.raises(ValueError, match=message):
        measure(BatchNormNet())


class _Unused(nn.Module):
    """Holds a convolution that no image passes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
