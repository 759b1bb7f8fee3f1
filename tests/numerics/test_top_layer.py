"""The closed form of the last layer against the dense Hessian in float64, and the way to the features."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wcitrain.curvature.dense import exact_trace
from wcitrain.curvature.loss import Loss, Output, cross_entropy, mean_squared_error
from wcitrain.curvature.top_layer import HeadFeatures, find_head, top_layer_trace
from wcitrain.models import create_model

N, C, D = 6, 4, 3
# Sums of fewer than 100 products of order 1 to 10 in float64: rounding stays below 1e-13.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


class Net(nn.Module):
    """Smooth features and a linear head with bias; logits large enough that p is far from uniform."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, D)
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.fixture
def net() -> Net:
    net = Net().double()
    with torch.no_grad():
        net.head.weight *= 4
    return net


def inputs(seed: int) -> Tensor:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(seed)).double()


Y = torch.tensor([0, 1, 2, 3, 0, 1])
SOFT = torch.rand(N, C, generator=torch.Generator().manual_seed(5)).double().softmax(-1)
WEIGHT = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 3.0]).double()


def weighted(z: Tensor) -> Loss:
    return Loss((WEIGHT * F.cross_entropy(z, Y, reduction="none")).mean(), {}, (Output(z, weight=WEIGHT),))


LOSSES = {
    "cross-entropy": lambda z: cross_entropy(z, Y),
    "smoothed": lambda z: cross_entropy(z, Y, label_smoothing=0.2),
    "soft targets": lambda z: cross_entropy(z, SOFT),
    "weighted": weighted,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_closed_form_is_the_trace_of_the_dense_hessian_in_value_and_gradient(name, net):
    """A missing factor or weight, or a detached p, would bias every step."""
    with HeadFeatures(net) as head:
        loss = LOSSES[name](net(inputs(1)))
    trace = top_layer_trace(loss, head.features)
    exact = exact_trace(loss, {"head": net.head.weight}, create_graph=True).mean[0]
    torch.testing.assert_close(trace, exact, **TOLERANCE)
    for ours, theirs in zip(gradients(trace, net), gradients(exact, net), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def gradients(value: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters()), retain_graph=True, materialize_grads=True))


def test_several_outputs_add_up(net):
    """TRADES with the clean branch detached is a sum over clean and adversarial outputs of one head."""
    with HeadFeatures(net) as head:
        z, z_adv = net(inputs(1)), net(inputs(2))
    soft = F.cross_entropy(z_adv, z.softmax(-1).detach())
    loss = Loss(F.cross_entropy(z, Y) + 6 * soft, {}, (Output(z), Output(z_adv, weight=6.0)))
    exact = exact_trace(loss, {"head": net.head.weight}, create_graph=True).mean[0]
    torch.testing.assert_close(top_layer_trace(loss, head.features), exact, **TOLERANCE)


def test_float32_logits_are_summed_in_float64():
    """1 − ||p||² of a confident example vanishes in float32: p = 1 − 2e-8 rounds to 1."""
    z = torch.tensor([[18.0, 0.0]])
    trace = top_layer_trace(z, torch.ones(1, 1))
    p = 1 / (1 + math.exp(-18.0))
    assert math.isclose(float(trace), 2 * p * (1 - p), rel_tol=1e-6)  # cancellation: 1e-16 / 3e-8


TIMM = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 8]}, "fc"),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 12, "num_heads": 2},
        "head",
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 8)}, "head.fc"),
    "preact": ("preact_resnet18", {"width": 2}, "fc"),
}


@pytest.mark.parametrize("name", TIMM)
def test_heads_of_real_models_are_found_and_exact(name):
    """Pooling, dropout and normalisation before the head differ by family; the trace is the model's."""
    timm_name, kwargs, head_name = TIMM[name]
    model = create_model(timm_name, num_classes=3, **kwargs).double().eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    with HeadFeatures(model) as head:
        loss = cross_entropy(model(x), torch.tensor([0, 2]))
    assert head.name == f"backbone.{head_name}"
    assert find_head(model.backbone)[0] == head_name
    exact = exact_trace(loss, {"head": head.head.weight}).mean[0]
    torch.testing.assert_close(top_layer_trace(loss, head.features_of(loss)), exact, **TOLERANCE)


def test_features_are_matched_to_outputs_not_to_the_order_of_passes(net):
    """An attack inside the context adds passes: the first features would be the wrong ones."""
    with HeadFeatures(net) as head:
        net(inputs(7))
        z_adv, z = net(inputs(2)), net(inputs(1))
        net(inputs(8))
    first, second = head.features_of((Output(z), Output(z_adv)))
    assert len(head.features) == 4
    assert first is head.features[2]
    assert second is head.features[1]
    with pytest.raises(ValueError, match="none of 4 recorded passes of head returned"):
        head.features_of(z / 2)  # a temperature after the head: the closed form would be wrong


class ConvHead(nn.Module):
    """Like timm's models with a 1x1 convolution as classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(3, 2, 1)

    def get_classifier(self) -> nn.Module:
        return self.fc


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (ConvHead, "a classifier of type Conv2d"),
        (
            lambda: timm.create_model("resnet18", num_classes=0, layers=[1, 1, 1, 1], channels=[4, 4, 4, 8]),
            "type Identity",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 2, 1)), "no nn.Linear at all"),
    ],
)
def test_models_without_a_linear_head_are_refused_by_what_they_have(make, found):
    """The last nn.Linear of a model with a convolutional head may be anything, such as a gate."""
    with pytest.raises(ValueError, match=found):
        find_head(make())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, h: top_layer_trace(z, [h, h]), "got 2 tensors of features"),
        (lambda z, h: top_layer_trace(z, h[:, None]), r"expected \[N, D\]"),
        (lambda z, h: top_layer_trace(Output(z, "hinge"), h), "got 'hinge'"),
        (lambda z, h: top_layer_trace(mean_squared_error(z, z), h), "of cross-entropies"),
        (lambda z, h: top_layer_trace(Loss(z.sum()), h), "does not say which outputs"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    """Broadcasting would turn them into a number."""
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(N, C), torch.zeros(N, D))


def test_a_head_that_runs_on_every_token_is_refused():
    """Then a weight is used several times an image, and the trace has cross terms between positions."""
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(ValueError, match="one vector an image"), HeadFeatures(model):
        model(torch.zeros(2, 7, 5))
