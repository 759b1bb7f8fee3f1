"""``estimator: auto``: what is chosen, what is refused and how, and that the dry run leaves no trace."""

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from torch import nn

from wcitrain import create_model
from wcitrain.curvature import ESTIMATORS, GaussNewton, Hutchinson, Output, cross_entropy
from wcitrain.optim import RegularizedOptimizer, WCIPenalty

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
WITHOUT_SECOND_DERIVATIVES = {"mobilenetv3_small_050": "hardsigmoid"}


def wrap(model: nn.Module, **penalty) -> RegularizedOptimizer:
    """The model under SGD with a WCI penalty."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return RegularizedOptimizer(optimizer, model, penalty=WCIPenalty(1e-3, **penalty))


@pytest.mark.parametrize("name", ZOO)
def test_auto_works_on_the_zoo_or_names_what_stands_in_the_way(name):
    """A penalty that crashes in the first backward of a ViT, or falls back in silence, is of no use."""
    model = create_model(name, num_classes=10, **ZOO[name]).train()
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    if name in WITHOUT_SECOND_DERIVATIVES:
        for refused in ("auto", "gauss_newton", "hutchinson"):
            with pytest.raises(ValueError, match=f"{WITHOUT_SECOND_DERIVATIVES[name]}.*WCIPosterior"):
                wrap(model, estimator=refused).step(lambda: cross_entropy(model(x), y))
        return
    optimizer = wrap(model)
    choice = optimizer.choose_estimator(lambda: cross_entropy(model(x), y))
    assert choice.estimator == GaussNewton()
    assert choice.use_math_attention == name.startswith("vit")
    for _ in range(2):
        assert torch.isfinite(optimizer.step(lambda: cross_entropy(model(x), y)))
    traces = optimizer.traces()
    assert torch.isfinite(traces).all()
    assert (traces >= 0).all()


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


def test_second_derivatives_that_are_wrong_are_not_used():
    """torch's fused weight norm returns a wrong second derivative: auto must not build a penalty on it."""
    torch.manual_seed(0)
    inner = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))
    model = nn.Sequential(nn.Flatten(), inner, nn.Tanh(), nn.Linear(8, 3))
    x, y = image_batch()
    with pytest.raises(ValueError, match=r"gauss_newton is not possible here.*silently wrong.*Remove"):
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
        match=r"penalty.estimator: got auto.*gauss_newton is.*before torch.compile",
    ):
        optimizer.step(lambda: cross_entropy(compiled(x), y))
    assert_same(everything(model), before)
    assert optimizer.traces() is None
    assert all(p.grad is None for p in model.parameters())
    optimizer = wrapped(WCIPenalty(0.0))  # monitoring works
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
