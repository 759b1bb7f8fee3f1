"""What every measure promises: the same number again, no trace behind on errors, frozen models, no data."""

import contextlib
import itertools

import pytest
import torch
from cases import BatchNormNet, assert_same, everything, image_batch
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.measures import MEASURES, Measure, Measurement, Problem, take_landscape

QUICK = {
    "average_flatness": {"num_draws": 2, "reference_restarts": 2},
    "worst_flatness": {"reference_restarts": 2},
    "average_sharpness": {"num_draws": 2},
    "worst_sharpness": {"ascent_steps": 2},
    "pac_bayes_sharpness": {"num_draws": 2, "num_bisections": 4},
    "magnitude_aware_sharpness": {"num_draws": 2, "num_bisections": 4},
}
WEIGHTS_ALONE = ("frobenius_norms", "spectral_norms", "path_norm", "distance_from_initialisation")
CLEAN = (*WEIGHTS_ALONE, "clean_loss")  # no attack has a say in them


class Landscape(Measure):
    """Sections through the loss, as a measure."""

    name = "landscape"

    def measure(self, problem: Problem) -> Measurement:
        found = take_landscape(problem, "adversarial", num_points=3, num_directions=1)
        return Measurement("landscape", float(found.robust[0, 2]), num_examples=found.num_examples)


EVERY: dict[str, Measure] = {name: kind(**QUICK.get(name, {})) for name, kind in MEASURES.items()}
EVERY["landscape"] = Landscape()


def attack(norm: str, eps: float) -> Attack:
    return Attack(ThreatModel(norm, eps), 2, 0.02)  # short of the border, so that starts matter


def problem(model: nn.Module, adversary: Attack | None, num: int = 24, seed: int = 0) -> Problem:
    initial = {name: value + 0.1 for name, value in model.state_dict().items()}
    batches = [image_batch(24)]
    return Problem(model, batches, adversary, seed, num, test_batches=batches[:1], initial=initial)


def messy_model() -> nn.Module:
    """BatchNorm and dropout in train mode, a part in eval, a frozen tensor, a gradient, a random state."""
    torch.manual_seed(0)
    model = BatchNormNet().train()
    model.bn.eval()
    model.bn.running_mean.uniform_(-0.1, 0.1)
    model.conv.weight.grad = torch.full_like(model.conv.weight, 3.0)
    model.bn.bias.requires_grad_(False)
    torch.manual_seed(123)
    return model


class Traces:
    """All that a measure must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.state, self.random = model, everything(model), torch.get_rng_state()
        self.flags = self.read()

    def read(self) -> list:
        model = self.model
        return [
            [p.data_ptr() for p in model.parameters()],
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        ]

    def check(self) -> None:
        assert_same(everything(self.model), self.state)
        assert self.read() == self.flags
        assert torch.equal(torch.get_rng_state(), self.random)


@pytest.mark.parametrize("adversary", [None, attack("l2", 0.5)], ids=["clean", "l2"])
@pytest.mark.parametrize("name", EVERY)
def test_every_measure_leaves_no_trace_and_repeats(name, adversary):
    """A measurement must not change the training around it; the same seed must give the same number."""
    model, measure = messy_model(), EVERY[name]
    traces = Traces(model)
    first = measure.measure(problem(model, adversary))
    traces.check()
    torch.rand(7)  # the global random state must not matter
    assert str(measure.measure(problem(model, adversary)).as_dict()) == str(first.as_dict())
    assert first.name == name
    if name in WEIGHTS_ALONE:
        return
    assert first.num_examples == 24 * (1 + measure.needs_test)
    assert "nan" not in first.settings
    assert measure.measure(problem(model, adversary, num=10)).num_examples == 10 * (1 + measure.needs_test)
    if adversary is not None and name not in CLEAN:  # starts, at least
        other = measure.measure(problem(model, adversary, seed=6))
        assert str(other.as_dict()) != str(first.as_dict())


@pytest.mark.parametrize("name", EVERY)
def test_every_measure_leaves_no_trace_on_exceptions(name):
    """An exception in a perturbed pass leaves perturbed weights: fail in the 2nd, 10th and 25th forward."""
    for after in (2, 10, 25):
        model, calls = messy_model(), itertools.count(1)

        def fail(module: nn.Module, args: object, after: int = after, calls: itertools.count = calls) -> None:
            if next(calls) == after:
                raise RuntimeError("stop")

        model.register_forward_pre_hook(fail)
        traces = Traces(model)
        with contextlib.suppress(RuntimeError):
            EVERY[name].measure(problem(model, attack("linf", 0.1)))
        traces.check()


@pytest.mark.parametrize("name", EVERY)
def test_every_measure_takes_a_frozen_model_and_refuses_wrong_images(name):
    """A model loaded for evaluation is frozen; an empty loader must not give NaN."""
    torch.manual_seed(0)
    model, measure = BatchNormNet().eval().requires_grad_(False), EVERY[name]
    adversary = attack("linf", 0.1)
    traces = Traces(model)
    with torch.no_grad():
        assert measure.measure(problem(model, adversary)).name == name
    if name not in WEIGHTS_ALONE:
        with pytest.raises(ValueError, match="no images"):
            measure.measure(Problem(model, [], adversary, test_batches=[image_batch(12)]))
    if name not in CLEAN:
        x, y = image_batch(12)
        with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
            measure.measure(Problem(model, [(3 * x, y)], adversary, test_batches=[(x, y)]))
    traces.check()


SCALE_FREE = {"wci", "average_flatness", "worst_flatness", "relative_flatness"}
SCALE_FREE |= {"asam_sharpness", "awp_sharpness"}


@pytest.mark.parametrize("name", [*sorted(SCALE_FREE), "sam_sharpness", "lambda_max", "hessian_trace"])
def test_relative_measures_ignore_scale_between_layers(name):
    """(W_1, b_1) c and W_2 / c is the same function: a measure that changes can be made anything.

    c = 4 is exact in binary, so only norms are rounded: 1e-15, amplified by 20 attack steps.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = image_batch(40)
    own = QUICK.get(name, {}) | ({"xi": 0.01} if name == "worst_flatness" else {})
    measure = MEASURES[name](**own | ({"layers": "weights"} if name == "asam_sharpness" else {}))
    before = measure.measure(Problem(model, [(x.double(), y)], ThreatModel("linf", 0.1))).value
    with torch.no_grad():
        model[1].weight.mul_(4)
        model[1].bias.mul_(4)
        model[3].weight.div_(4)
    after = measure.measure(Problem(model, [(x.double(), y)], ThreatModel("linf", 0.1))).value
    assert (abs(after / before - 1) < 1e-9) == (name in SCALE_FREE)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", EVERY)
def test_measures_are_the_same_without_gradients(name, mode):
    """Notebooks evaluate under either, where autograd refuses what was made, the batches too."""
    model = messy_model()
    expected = EVERY[name].measure(problem(model, attack("linf", 0.1)))
    with mode():
        assert str(EVERY[name].measure(problem(model, attack("linf", 0.1)))) == str(expected)
