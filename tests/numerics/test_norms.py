"""Norms against written-out matrices, paths counted one by one; margins by hand; symmetries they claim."""

import itertools
import math

import pytest
import torch
from cases import BatchNormNet, everything
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.losses import Margins, NormalisedMargin
from wcitrain.measures.norms import DistanceFromInitialisation, FrobeniusNorms, PathNorm, SpectralNorms
from wcitrain.measures.problem import Measure, Measurement, Problem

SHAPE = (1, 4, 4)


def take(measure: Measure, model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Measurement:
    """Measure the model, of which images of this shape are known."""
    return measure.measure(Problem(model, [(torch.zeros(1, *shape), torch.zeros(1))]))


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
    result = take(SpectralNorms(), nn.Sequential(module), (2, side, side))
    assert result.parts["0.weight"] == pytest.approx(truth, rel=1e-4)
    assert result.value == pytest.approx(2 * math.log(truth), abs=2e-4)
    kernel = module.weight.detach().flatten(1)
    assert abs(float(torch.linalg.matrix_norm(kernel, 2)) / truth - 1) > 1e-3  # else this test says nothing


def test_spectral_product_bounds_the_network_and_ignores_scale_before_batchnorm():
    """Without BatchNorm in it, halving a convolution, which changes no output, halves the "capacity"."""
    torch.manual_seed(0)
    model = BatchNormNet().double().eval()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        model.bn.weight.normal_()
    before = take(SpectralNorms(), model)
    diagonal = model.bn.weight.detach().abs() / (model.bn.running_var + 1e-5).sqrt()
    assert before.parts["bn"] == pytest.approx(float(diagonal.max()), rel=1e-12)
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
    assert take(SpectralNorms(), model).value == pytest.approx(before.value, abs=2e-4)


def test_frobenius_norms_are_sums_and_products():
    """Values by hand (norms in float32); a product of many layers overflows, its logarithm does not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[1].weight.fill_(1e15)
    result = take(FrobeniusNorms(), model)
    assert result.parts["0.weight"] == pytest.approx(30, rel=1e-6)
    assert result.parts["log_product"] == pytest.approx(math.log(30) + math.log(2e30), rel=1e-6)
    assert result.value == pytest.approx(2e30, rel=1e-6)
    assert "0.bias" not in result.parts
    assert "0.bias" in take(FrobeniusNorms("weights+biases"), model).parts
    zero = nn.Linear(2, 1).apply(lambda m: nn.init.zeros_(m.weight))
    assert take(FrobeniusNorms(), zero).parts["log_product"] == -math.inf


def test_path_norm_counts_every_path():
    """Σ over paths of the product of squared weights, counted one by one; biases start paths too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    W, b, V, c = (p.detach() for p in model.parameters())
    places = itertools.product(range(2), range(4), range(3))
    paths = sum(float((V[k, j] * W[j, i]) ** 2) for k, j, i in places)
    paths += sum(float((V[k, j] * b[j]) ** 2) for k, j in itertools.product(range(2), range(4)))
    paths += float(c.square().sum())
    result = take(PathNorm(), model, (3,))
    assert result.parts["sum"] == pytest.approx(paths, rel=1e-12)
    assert result.value == pytest.approx(math.log(paths), rel=1e-12)


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
    assert take(PathNorm(), model).value == pytest.approx(take(PathNorm(), folded).value, rel=1e-12)


def test_distance_is_that_of_the_layers():
    """By hand, also from the weights of the backbone alone and of a wrapped model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    initial = everything(model)
    with torch.no_grad():
        model[0].weight += 1
        model[1].weight += torch.tensor([[3.0, 4.0]])
        model[1].bias += 100
    wrapped = {f"module.{k}": v for k, v in initial.items()}
    result = DistanceFromInitialisation().measure(Problem(model, [], initial=wrapped))
    assert result.value == pytest.approx(math.sqrt(4 + 25), rel=1e-6)
    assert result.parts["1.weight"] == pytest.approx(25, rel=1e-6)
    start = math.sqrt(float(initial["0.weight"].square().sum() + initial["1.weight"].square().sum()))
    assert result.parts["relative"] == pytest.approx(math.sqrt(29) / start, rel=1e-6)
    whole = nn.Module()
    whole.backbone = model
    assert DistanceFromInitialisation().measure(Problem(whole, [], initial=initial)).value == result.value


def test_a_model_without_such_a_norm_is_refused():
    """Each of these would otherwise be a number that means something else."""
    with pytest.raises(ValueError, match="got a model with LayerNorm"):
        take(PathNorm(), nn.Sequential(BatchNormNet(), nn.LayerNorm(3)))
    model = BatchNormNet()
    model.unused = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match=r"unused\.weight, which no image reaches"):
        take(SpectralNorms(), model)


@pytest.mark.parametrize("initial", [None, {}])
def test_a_distance_from_nowhere_is_refused(initial):
    """The distance from zero would be believed."""
    with pytest.raises(ValueError, match="got initial weights of the right shape for 0 of 2 tensors"):
        DistanceFromInitialisation().measure(Problem(BatchNormNet(), [], initial=initial))


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
    margins = [z[i, c] - max(z[i, j] for j in range(3) if j != c) for i, c in enumerate(y.tolist())]
    expected = torch.tensor(margins)
    result = Margins().measure(Problem(model, [(x[:40], y[:40]), (x[40:], y[40:])]))
    assert result.value == pytest.approx(float(expected.sort().values[10]), rel=1e-12)
    known = {"mean": expected.mean(), "min": expected.min(), "median": expected.median()}
    known |= {"mean_stderr": expected.std() / math.sqrt(101), "accuracy": (z.argmax(1) == y).double().mean()}
    assert result.parts == pytest.approx({key: float(value) for key, value in known.items()}, rel=1e-9)
    assert result.num_examples == 101


def test_robust_margins_are_lower_by_eps_times_the_dual_norm():
    """Two classes, linf: γ_adv = γ − eps ‖w_y − w_j‖_1 exactly; attacking towards the label raises it."""
    model, x, y = linear(classes=2)
    threats = None, ThreatModel("linf", 0.05)
    clean, robust = (Margins().measure(Problem(model, [(x, y)], t)) for t in threats)
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
    assert before.parts["margin"] < 0  # which has no logarithm: NaN says so
    assert math.isnan(before.parts["log_complexity"])
    right = NormalisedMargin().measure(Problem(model, [(x, model(x).argmax(1))])).parts
    complexity = 2 * (log_product - math.log(right["margin"]))
    assert right["log_complexity"] == pytest.approx(complexity, rel=1e-12)
    with torch.no_grad():
        model.weight *= 3
    assert NormalisedMargin().measure(problem).value == pytest.approx(before.value, rel=1e-9)
    assert Margins().measure(problem).value == pytest.approx(3 * plain.value, rel=1e-9)


def test_a_single_output_is_refused():
    """It has no other class: its margin would be infinite."""
    data = [(torch.rand(2, 5), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match="margins: got a single output"):
        Margins().measure(Problem(nn.Linear(5, 1), data))
