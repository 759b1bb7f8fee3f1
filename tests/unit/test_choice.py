"""``estimator: auto``: what is chosen, what is refused and how, and that the dry run leaves no trace."""

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from oracles import exact_gauss_newton_trace
from torch import nn

from wcitrain import create_model
from wcitrain.curvature import ESTIMATORS, GaussNewton, Hutchinson, Output, cross_entropy, gauss_newton
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.optim import RegularizedOptimizer, WCIPenalty

# The smallest forms of the families people fine-tune; images of 32 px.
ZOO = {
    "resnet10t": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "swin_tiny_patch4_window7_224": dict(img_size=32, patch_size=2, window_size=4, depths=(1, 1, 2, 1)),
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
}


def wrap(model: nn.Module, **penalty) -> RegularizedOptimizer:
    """The model under SGD with a WCI penalty."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return RegularizedOptimizer(optimizer, model, penalty=WCIPenalty(1e-3, **penalty))


@pytest.mark.parametrize("name", ZOO)
def test_auto_works_on_the_zoo_or_names_what_stands_in_the_way(name):
    """A penalty that crashes in the first backward of a ViT, or falls back in silence, is of no use."""
    model = create_model(name, num_classes=10, **ZOO[name]).train()
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    if name == "mobilenetv3_small_050":  # no second derivatives
        for refused in ("auto", "gauss_newton", "hutchinson"):
            with pytest.raises(ValueError, match=r"hardsigmoid.*blocks\.0\.0\.se\.gate.*WCIPosterior"):
                wrap(model, estimator=refused).step(lambda: cross_entropy(model(x), y))
        return
    optimizer = wrap(model)
    choice = optimizer.choose_estimator(lambda: cross_entropy(model(x), y))
    assert choice.estimator == GaussNewton()
    for _ in range(2):
        assert torch.isfinite(optimizer.step(lambda: cross_entropy(model(x), y)))
    assert (optimizer.traces() >= 0).all()


@pytest.mark.parametrize("strength", [0.0, 1e-3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_dry_run_leaves_no_trace(estimator, strength):
    """It makes the passes of a step in train mode: weights, statistics, .grad, random numbers as before."""
    model, (x, y) = BatchNormNet(), image_batch()
    F.cross_entropy(model(x), y).backward()
    gradients, before = [p.grad.clone() for p in model.parameters()], everything(model)
    base, state = torch.optim.SGD(model.parameters(), lr=1e-3), torch.get_rng_state()
    optimizer = RegularizedOptimizer(base, model, penalty=WCIPenalty(strength, estimator=estimator))
    optimizer.choose_estimator(lambda: cross_entropy(model(x), y))
    assert_same(everything(model), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_out_of_memory_in_the_dry_run_is_not_a_reason_for_another_estimator(monkeypatch):
    """Auto would measure another quantity, because another process held the device's memory."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gauss_newton, "gauss_newton_samples", full)
    model, (x, y) = BatchNormNet(), image_batch()
    with pytest.raises(torch.OutOfMemoryError):
        wrap(model).choose_estimator(lambda: cross_entropy(model(x), y))


def test_a_loss_without_outputs_is_refused_as_a_penalty_and_measured_by_hutchinson():
    """The plain three-line loop returns a tensor: auto must not guess what the outputs were.

    Nor may it fall to differences, which wreck the training of ReLU networks (Hutchinson's too).
    """
    model, (x, y) = BatchNormNet(), image_batch()
    for estimator in ("auto", "gauss_newton"):
        with pytest.raises(ValueError, match=r"does not say which outputs.*Return wcitrain\.cross_entropy"):
            wrap(model, estimator=estimator).backward(lambda: F.cross_entropy(model(x), y))
    base, calls = torch.optim.SGD(model.parameters(), lr=1e-3), []
    monitor = RegularizedOptimizer(base, model, penalty=WCIPenalty(0.0))
    choice = monitor.choose_estimator(lambda: calls.append(1) or F.cross_entropy(model(x), y))
    assert choice.estimator == Hutchinson()
    assert "does not say which outputs" in choice.reason
    assert len(calls) == 2  # one for each: nothing that another attention kernel could mend


def test_top_layer_has_one_layer():
    """Another choice of layers would silently be the head."""
    model = BatchNormNet()
    assert list(wrap(model, estimator="top_layer").layers) == ["fc.weight"]
    base, penalty = torch.optim.SGD(model.parameters(), lr=0.1), WCIPenalty(0.1, estimator="top_layer")
    for wrong in ({"layers": "all"}, {"split_qkv": True}):
        with pytest.raises(ValueError, match="only layer is the head"):
            RegularizedOptimizer(base, model, penalty=penalty, **wrong)


def test_outputs_of_different_batch_sizes_have_their_own_means():
    """Labelled and unlabelled images in one loss: each term is a mean over its own examples."""
    torch.manual_seed(0)
    head, few, many = nn.Linear(4, 3).double(), torch.randn(3, 4).double(), torch.randn(12, 4).double()
    layers, outputs = {"w": head.weight}, (Output(head(few)), Output(head(many), weight=0.5))
    exact = float(exact_gauss_newton_trace(outputs, layers)[0])
    first, second = (float(exact_gauss_newton_trace(head(x), layers)[0]) for x in (few, many))
    assert exact == pytest.approx(first + 0.5 * second, rel=1e-10)
    generator = torch.Generator().manual_seed(0)
    draws = gauss_newton_samples(outputs, layers, num_probes=600, generator=generator)
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 600**0.5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_is_refused_before_any_step_and_told_what_to_set(backend):
    """It may be differentiated once; differences at W ± u once wrecked a small ReLU network."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    compiled, before, (x, y) = torch.compile(model, backend=backend), everything(model), image_batch()
    optimizer = wrap(compiled)
    with pytest.raises(ValueError, match=r"penalty.estimator: got auto.*gauss_newton is.*torch.compile"):
        optimizer.step(lambda: cross_entropy(compiled(x), y))
    assert_same(everything(model), before)
    assert optimizer.traces() is None
    monitor = RegularizedOptimizer(optimizer.base, compiled, penalty=WCIPenalty(0.0))
    for _ in range(2):
        assert torch.isfinite(monitor.step(lambda: cross_entropy(compiled(x), y)))


def test_a_penalty_that_is_not_finite_shows_in_the_returned_loss(monkeypatch):
    """The gradient is NaN there: a finite loss would let the trainer step on it."""
    model, (x, y) = BatchNormNet(), image_batch()
    optimizer = wrap(model, estimator="gauss_newton")
    optimizer.step(lambda: cross_entropy(model(x), y))
    draw = gauss_newton.gauss_newton_samples
    monkeypatch.setattr(gauss_newton, "gauss_newton_samples", lambda *a, **k: draw(*a, **k) * float("inf"))
    assert not torch.isfinite(optimizer.backward(lambda: cross_entropy(model(x), y)))
