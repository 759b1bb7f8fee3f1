"""``estimator: auto``: what is chosen, what is refused and how, and that the dry run leaves no trace."""

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from torch import nn

from wcitrain import create_model
from wcitrain.curvature import ESTIMATORS, GaussNewton, Hutchinson, Loss, Output, TwoPoint, cross_entropy
from wcitrain.optim import RegularizedOptimizer, TracePenalty, WCIPenalty

# The smallest forms of the families people fine-tune; images of 32 px.
ZOO = {
    "resnet10t": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24,
        "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4),
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
    estimator = "auto"
    if name in WITHOUT_SECOND_DERIVATIVES:
        for refused in ("auto", "gauss_newton", "hutchinson"):
            with pytest.raises(ValueError, match=f"{WITHOUT_SECOND_DERIVATIVES[name]}.*two_point"):
                wrap(model, estimator=refused).step(lambda: cross_entropy(model(x), y))
        estimator = "two_point"  # which the message names
    optimizer = wrap(model, estimator=estimator)
    choice = optimizer.choose_estimator(lambda: cross_entropy(model(x), y))
    assert choice.estimator == (TwoPoint() if estimator == "two_point" else GaussNewton())
    assert choice.use_math_attention == name.startswith("vit")
    for _ in range(2):
        assert torch.isfinite(optimizer.step(lambda: cross_entropy(model(x), y)))
    traces = optimizer.traces()
    assert torch.isfinite(traces).all()
    assert estimator == "two_point" or (traces >= 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_dry_run_leaves_no_trace(estimator):
    """It evaluates the loss in train mode: statistics, gradients, random numbers must be as before."""
    model = BatchNormNet()
    x, y = image_batch()
    F.cross_entropy(model(x), y).backward()
    before, gradients, state = (
        everything(model),
        [p.grad.clone() for p in model.parameters()],
        torch.get_rng_state(),
    )
    wrap(model, estimator=estimator).choose_estimator(lambda: cross_entropy(model(x), y))
    assert_same(everything(model), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


def test_a_loss_without_outputs_is_refused_as_a_penalty_and_measured_by_hutchinson():
    """The plain three-line loop returns a tensor: auto must not guess what the outputs were.

    Nor may it fall to differences, which wreck the training of ReLU networks (Hutchinson's too).
    """
    model = BatchNormNet()
    x, y = image_batch()
    for estimator in ("auto", "gauss_newton"):
        with pytest.raises(ValueError, match=r"does not say which outputs.*Return wcitrain\.cross_entropy"):
            wrap(model, estimator=estimator).backward(lambda: F.cross_entropy(model(x), y))
    base, calls = torch.optim.SGD(model.parameters(), lr=1e-3), []
    monitor = RegularizedOptimizer(base, model, penalty=WCIPenalty(0.0))
    choice = monitor.choose_estimator(lambda: calls.append(1) or F.cross_entropy(model(x), y))
    assert choice.estimator == Hutchinson()
    assert "does not say which outputs" in choice.reason
    assert len(calls) == 2  # one for each: nothing that another attention kernel could mend


def test_third_derivatives_are_refused_where_they_raise_or_are_wrong():
    """BatchNorm in train mode raises; LayerNorm's third derivative is wrong without a word."""
    x, y = image_batch()
    model = BatchNormNet()
    with pytest.raises(ValueError, match="bn"):
        wrap(model, estimator=Hutchinson(gradient="autograd")).backward(lambda: cross_entropy(model(x), y))
    normed = nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="silently wrong"):
        wrap(normed, estimator=Hutchinson(gradient="autograd")).backward(lambda: cross_entropy(normed(x), y))
    # second derivatives are right
    wrap(normed, estimator="hutchinson").backward(lambda: cross_entropy(normed(x), y))


def test_second_derivatives_that_are_wrong_are_not_used():
    """torch's fused weight norm returns a wrong second derivative: auto must not build a penalty on it."""
    torch.manual_seed(0)
    inner = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))
    model = nn.Sequential(nn.Flatten(), inner, nn.Tanh(), nn.Linear(8, 3))
    x, y = image_batch()
    with pytest.raises(ValueError, match=r"gauss_newton is not possible here.*silently wrong.*two_point"):
        wrap(model).backward(lambda: cross_entropy(model(x), y))


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

        penalty = TracePenalty(estimator="top_layer")
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
    assert float(exact_gauss_newton_trace(outputs, {"w": head.weight}).mean[0]) == pytest.approx(
        exact, rel=1e-10
    )
    draws = gauss_newton_samples(
        outputs, {"w": head.weight}, num_probes=600, generator=torch.Generator().manual_seed(0)
    )
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 600**0.5


def test_a_loss_that_cannot_be_diagnosed_is_refused_with_what_torch_says():
    """A loss that calls parts of the model: the culprit has no name, but the refusal must not crash."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Hardsigmoid(), nn.Linear(8, 3))
    x, y = image_batch()
    with pytest.raises(
        ValueError, match=r"second derivatives are needed, which fail: .*hardsigmoid.*two_point"
    ):
        wrap(model).backward(lambda: cross_entropy(model.forward(x), y))


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


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_is_refused_before_any_step_and_told_what_to_set(backend):
    """It may be differentiated once; differences at W ± u once wrecked a small ReLU network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    compiled, before = torch.compile(model, backend=backend), everything(model)
    x, y = image_batch()

    def wrapped(penalty: WCIPenalty) -> RegularizedOptimizer:
        return RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compiled, penalty=penalty)

    optimizer = wrapped(WCIPenalty(1e-3))
    with pytest.raises(
        ValueError,
        match=r"penalty.estimator: got auto.*gauss_newton is.*before torch.compile, or .*two_point",
    ):
        optimizer.step(lambda: cross_entropy(compiled(x), y))
    assert_same(everything(model), before)
    assert optimizer.traces() is None
    assert all(p.grad is None for p in model.parameters())
    # what works: as told, monitoring
    for penalty in (WCIPenalty(1e-3, estimator="two_point"), WCIPenalty(0.0)):
        optimizer = wrapped(penalty)
        for _ in range(2):
            assert torch.isfinite(optimizer.step(lambda: cross_entropy(compiled(x), y)))


def test_a_penalty_that_is_not_finite_shows_in_the_returned_loss(monkeypatch):
    """The gradient is NaN there: a finite loss would let the trainer step on it."""
    from wcitrain.curvature import gauss_newton

    model = BatchNormNet()
    x, y = image_batch()
    optimizer = wrap(model, estimator="gauss_newton")
    optimizer.step(lambda: cross_entropy(model(x), y))
    draw = gauss_newton.gauss_newton_samples
    monkeypatch.setattr(gauss_newton, "gauss_newton_samples", lambda *a, **k: draw(*a, **k) * float("inf"))
    assert not torch.isfinite(optimizer.backward(lambda: cross_entropy(model(x), y)))
