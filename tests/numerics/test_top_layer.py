"""The closed form of the last layer against the dense Hessian in float64, and the way to the features."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import SmoothNet
from oracles import exact_trace, gradients
from torch import Tensor, nn

from wcitrain.curvature import Loss, Output, TopLayer, cross_entropy, mean_squared_error, top_layer_trace
from wcitrain.curvature.passes import Passes
from wcitrain.curvature.top_layer import features_of, find_head, head_calls
from wcitrain.models import create_model
from wcitrain.params import Layers

N, C = 6, 3
# Sums of fewer than 100 products of order 1 to 10 in float64: rounding stays below 1e-13.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def net() -> nn.Module:
    net = SmoothNet().double()
    with torch.no_grad():
        net.second.weight *= 4  # p is far from uniform
    return net


def inputs(seed: int) -> Tensor:
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(seed)).double()


Y = torch.tensor([0, 1, 2, 2, 0, 1])
SOFT = torch.rand(N, C, generator=torch.Generator().manual_seed(5)).double().softmax(-1)
WEIGHT = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 3.0]).double()


def weighted(net: nn.Module) -> Loss:
    z = net(inputs(1))
    return Loss((WEIGHT * F.cross_entropy(z, Y, reduction="none")).mean(), {}, (Output(z, weight=WEIGHT),))


def two_outputs(net: nn.Module) -> Loss:
    """TRADES with the clean branch detached, of one head, after the passes of an attack."""
    net(inputs(7))
    z_adv, z = net(inputs(2)), net(inputs(1))
    soft = F.cross_entropy(z_adv, z.softmax(-1).detach())
    return Loss(F.cross_entropy(z, Y) + 6 * soft, {}, (Output(z), Output(z_adv, weight=6.0)))


LOSSES = {
    "soft targets": lambda net: cross_entropy(net(inputs(1)), SOFT),
    "weighted": weighted,
    "two outputs": two_outputs,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_estimator_is_the_trace_of_the_dense_hessian_in_value_and_gradient(name, net):
    """A missing factor or weight, a detached p, or features of another pass would bias every step."""
    layers, parameters = Layers({"head": net.second.weight}), list(net.parameters())
    loss = LOSSES[name](net)
    exact = exact_trace(loss, layers, create_graph=True)
    truth = gradients(exact[0], parameters)
    plain = gradients(loss.total, parameters)
    passes = Passes(net, layers, lambda: LOSSES[name](net))
    step = TopLayer().add_gradient(passes, torch.ones(1).double(), 0.5)
    torch.testing.assert_close(step.traces, exact.detach(), **TOLERANCE)
    for p, t, g in zip(parameters, truth, plain, strict=True):
        torch.testing.assert_close(p.grad, g + 0.5 * t, **TOLERANCE)


def test_float32_logits_are_summed_in_float64():
    """1 − ||p||² of a confident example vanishes in float32: p = 1 − 2e-8 rounds to 1."""
    trace = top_layer_trace(torch.tensor([[18.0, 0.0]]), torch.ones(1, 1))
    p = 1 / (1 + math.exp(-18.0))
    assert math.isclose(float(trace), 2 * p * (1 - p), rel_tol=1e-6)  # cancellation: 1e-16 / 3e-8


VIT = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 12, "num_heads": 2}
TIMM = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 8]}, "fc"),
    "vit": ("vit_tiny_patch16_224", VIT, "head"),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 8)}, "head.fc"),
    "preact": ("preact_resnet18", {"width": 2}, "fc"),
}


@pytest.mark.parametrize("name", TIMM)
def test_heads_of_real_models_are_found_and_exact(name):
    """Pooling, dropout and normalisation before the head differ by family; the trace is the model's."""
    timm_name, kwargs, head_name = TIMM[name]
    model = create_model(timm_name, num_classes=3, **kwargs).double().eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    with head_calls(model) as calls:
        z = model(x)
    loss = cross_entropy(z, torch.tensor([0, 2]))
    assert find_head(model.backbone)[0] == head_name
    exact = exact_trace(loss, {"head": find_head(model)[1].weight})[0]
    torch.testing.assert_close(top_layer_trace(z, features_of(Output(z), calls)), exact, **TOLERANCE)


def with_classifier(classifier: nn.Module) -> nn.Module:
    """Like timm's models with a 1x1 convolution as classifier, or none, and linear maps elsewhere."""
    model = nn.Sequential(nn.Linear(2, 2), classifier)
    model.get_classifier = lambda: classifier
    return model


@pytest.mark.parametrize("classifier", [nn.Conv2d(3, 2, 1), nn.Identity()])
def test_models_without_a_linear_head_are_refused_by_what_they_have(classifier):
    """The last nn.Linear of a model with a convolutional head may be anything, such as a gate."""
    with pytest.raises(ValueError, match=f"a head of type {type(classifier).__name__}"):
        find_head(with_classifier(classifier))
    with pytest.raises(ValueError, match="a head of type NoneType"):
        find_head(nn.Sequential(classifier))


def tokens(net: nn.Module) -> Loss:
    """A head that runs on every token: the trace has cross terms between positions."""
    z = net(inputs(1)[:, None].expand(N, 7, 4))
    return Loss(z.square().mean(), {}, (Output(z[:, 0]),))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net: cross_entropy(net(inputs(1)) / 2, Y), "unscaled"),  # a temperature after the head
        (lambda net: mean_squared_error(net(inputs(1)), SOFT), "got a mse"),
        (lambda net: Loss(net(inputs(1)).sum(), {}, (Output(net(inputs(1)), "hinge"),)), "'hinge'"),
        (lambda net: Loss(net(inputs(1)).sum()), "does not say which outputs"),
        (tokens, "for vectors"),
    ],
)
def test_losses_that_do_not_fit_are_refused(loss, message, net):
    """Each would be a number, and a wrong one."""
    passes = Passes(net, Layers({"head": net.second.weight}), lambda: loss(net))
    with pytest.raises(ValueError, match=message):
        TopLayer().draw(passes, 1, torch.Generator())
