"""``estimator: auto``: what is chosen, what is refused and in which words, and that the dry run leaves no trace."""

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from torch import nn

from wcitrain import create_model
from wcitrain.curvature import Loss, Output, cross_entropy
from wcitrain.optim import FrobeniusTracePenalty, RegularizedOptimizer, WCIPenalty

# The smallest forms of the families people fine-tune; images of 32 px.
ZOO = {
    "resnet10t": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4),
    },
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
}  # fmt: skip
WITHOUT_SECOND_DERIVATIVES = {"mobilenetv3_small_050": "Hardsigmoid"}


def wrap(model: nn.Module, **penalty) -> RegularizedOptimizer:
    """The model under SGD with a WCI penalty."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return RegularizedOptimizer(optimizer, model, penalty=WCIPenalty(1e-3, **penalty))


@pytest.mark.parametrize("name", ZOO)
def test_auto_works_on_the_zoo_or_names_what_stands_in_the_way(name):
    """A penalty that crashes in the first backward of a ViT, or falls back in silence, is of no use."""
    model = create_model(name, num_classes=10, **ZOO[name]).train()
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    optimizer = wrap(model)
    choice = optimizer.choose_estimator(lambda: cross_entropy(model(x), y))
    if name in WITHOUT_SECOND_DERIVATIVES:
        assert choice.estimator == "two_point"
        assert WITHOUT_SECOND_DERIVATIVES[name] in choice.reason
        with pytest.raises(ValueError, match=WITHOUT_SECOND_DERIVATIVES[name]):
            wrap(model, estimator="gauss_newton").choose_estimator(lambda: cross_entropy(model(x), y))
    else:
        assert choice.estimator == "gauss_newton"
        assert choice.use_math_attention == name.startswith("vit")
    for _ in range(2):
        assert torch.isfinite(optimizer.step(lambda: cross_entropy(model(x), y)))
    traces = optimizer.traces()
    assert torch.isfinite(traces).all()
    assert choice.estimator == "two_point" or (traces >= 0).all()


@pytest.mark.parametrize("estimator", ["auto", "gauss_newton", "hutchinson", "top_layer", "two_point"])
def test_the_dry_run_leaves_no_trace(estimator):
    """It evaluates the loss in train mode: statistics, gradients and random numbers must be as if it had not."""
    model = BatchNormNet()
    x, y = image_batch()
    F.cross_entropy(model(x), y).backward()
    before, gradients, state = everything(model), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    wrap(model, estimator=estimator).choose_estimator(lambda: cross_entropy(model(x), y))
    assert_same(everything(model), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


def test_a_loss_without_outputs_gets_two_point_and_the_reason():
    """The plain three-line loop returns a tensor: auto must not guess what the outputs were."""
    model = BatchNormNet()
    x, y = image_batch()
    optimizer, calls = wrap(model), []
    choice = optimizer.choose_estimator(lambda: calls.append(1) or F.cross_entropy(model(x), y))
    assert choice.estimator == "two_point"
    assert "does not say which outputs" in choice.reason
    assert len(calls) == 1  # nothing that another attention kernel could mend
    with pytest.raises(ValueError, match=r"Return wcitrain\.cross_entropy"):
        wrap(model, estimator="gauss_newton").backward(lambda: F.cross_entropy(model(x), y))


def test_third_derivatives_are_refused_where_they_raise_or_are_wrong():
    """BatchNorm in train mode raises; LayerNorm's third derivative is wrong without a word."""
    x, y = image_batch()
    model = BatchNormNet()
    with pytest.raises(ValueError, match="bn"):
        wrap(model, estimator="hutchinson", gradient="autograd").backward(lambda: cross_entropy(model(x), y))
    normed = nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="silently wrong"):
        wrap(normed, estimator="hutchinson", gradient="autograd").backward(lambda: cross_entropy(normed(x), y))
    wrap(normed, estimator="hutchinson").backward(lambda: cross_entropy(normed(x), y))  # second derivatives are right


def test_second_derivatives_that_are_wrong_are_not_used():
    """torch's fused weight norm returns a wrong second derivative: auto must not build a penalty on it."""
    torch.manual_seed(0)
    inner = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))
    model = nn.Sequential(nn.Flatten(), inner, nn.Tanh(), nn.Linear(8, 3))
    x, y = image_batch()
    choice = wrap(model).choose_estimator(lambda: cross_entropy(model(x), y))
    assert choice.estimator == "two_point"
    assert "silently wrong" in choice.reason


def test_the_closed_form_is_refused_where_it_does_not_hold():
    """Scaled logits (a temperature) are not what the head returned; a convolutional head is not linear."""
    model = BatchNormNet()
    x, y = image_batch()
    optimizer = wrap(model, estimator="top_layer")
    assert list(optimizer.layers) == ["fc.weight"]
    with pytest.raises(ValueError, match="unscaled"):
        optimizer.backward(lambda: cross_entropy(model(x) / 2, y))
    with pytest.raises(ValueError, match="only layer is the head"):
        RegularizedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            penalty=WCIPenalty(0.1, estimator="top_layer"),
            layers="all",
        )


def test_a_trades_like_loss_has_both_branches_in_its_trace():
    """β must weigh the adversarial branch's curvature: t(β) is affine in β."""
    model = BatchNormNet().eval()
    x, y = image_batch()
    values = []
    for beta in (0.0, 1.0, 3.0):

        def loss_fn(beta=beta):
            clean, adversarial = model(x), model((x + 0.1).clamp(0, 1))
            total = F.cross_entropy(clean, y) + beta * F.kl_div(
                adversarial.log_softmax(1), clean.softmax(1).detach(), reduction="batchmean"
            )
            return Loss(total, {}, (Output(clean), Output(adversarial, weight=beta)))

        penalty = FrobeniusTracePenalty(0.0, 0.0, estimator="top_layer")
        optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, penalty=penalty)
        optimizer.step(loss_fn)
        values.append(float(optimizer.traces()[0]))
    assert values[1] > values[0] * 1.1
    assert values[2] - values[0] == pytest.approx(3 * (values[1] - values[0]), rel=1e-5)


def test_outputs_of_different_batch_sizes_have_their_own_means():
    """Labelled and unlabelled images in one loss: each term is a mean over its own examples."""
    from wcitrain.curvature import exact_gauss_newton_trace, top_layer_trace
    from wcitrain.curvature.gauss_newton import gauss_newton_samples

    torch.manual_seed(0)
    head = nn.Linear(4, 3).double()
    few, many = torch.randn(3, 4).double(), torch.randn(12, 4).double()
    outputs = (Output(head(few)), Output(head(many), weight=0.5))
    exact = float(top_layer_trace(outputs, [few, many]).detach())
    assert float(exact_gauss_newton_trace(outputs, {"w": head.weight}).mean[0]) == pytest.approx(exact, rel=1e-10)
    draws = gauss_newton_samples(
        outputs, {"w": head.weight}, num_probes=600, generator=torch.Generator().manual_seed(0)
    )
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 600**0.5


def test_auto_survives_a_loss_that_cannot_be_diagnosed():
    """Parts of the model called in the loss: the culprit cannot be named, but two_point works."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Hardsigmoid(), nn.Linear(8, 3))
    x, y = image_batch()
    choice = wrap(model).choose_estimator(lambda: cross_entropy(model.forward(x), y))
    assert choice.estimator == "two_point"


def test_divergence_is_not_mistaken_for_another_head():
    """NaN logits equal themselves here: the loss is NaN and the caller's own check finds it."""
    model = BatchNormNet()
    x, y = image_batch()
    optimizer = wrap(model, estimator="top_layer")
    optimizer.step(lambda: cross_entropy(model(x), y))
    assert not torch.isfinite(optimizer.backward(lambda: cross_entropy(model(x * float("nan")), y)))


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_outputs_without_a_class_dimension_are_refused(loss):
    """One number an image is [N, 1] here."""
    from wcitrain.curvature import binary_cross_entropy, mean_squared_error

    function = binary_cross_entropy if loss == "bce" else mean_squared_error
    with pytest.raises(ValueError, match=r"expected \[N, C\]"):
        function(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("strength", [0.0, 1e-3])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_work_whatever_the_strength(strength, backend):
    """A compiled graph may be differentiated once, and inductor's buffers used once: monitoring needs two backwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    compiled = torch.compile(model, backend=backend)
    x, y = image_batch()
    optimizer = RegularizedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), compiled, penalty=WCIPenalty(strength)
    )
    choice = optimizer.choose_estimator(lambda: cross_entropy(compiled(x), y))
    assert strength == 0 or choice.estimator == "two_point"
    for _ in range(2):
        assert torch.isfinite(optimizer.step(lambda: cross_entropy(compiled(x), y)))


def test_a_penalty_that_is_not_finite_shows_in_the_returned_loss(monkeypatch):
    """The gradient is NaN there: a finite loss would let the trainer step on it."""
    from wcitrain.optim import penalty_steps

    model = BatchNormNet()
    x, y = image_batch()
    optimizer = wrap(model, estimator="gauss_newton")
    optimizer.step(lambda: cross_entropy(model(x), y))
    draw = penalty_steps.gauss_newton_samples
    monkeypatch.setattr(penalty_steps, "gauss_newton_samples", lambda *a, **k: draw(*a, **k) * float("inf"))
    assert not torch.isfinite(optimizer.backward(lambda: cross_entropy(model(x), y)))
