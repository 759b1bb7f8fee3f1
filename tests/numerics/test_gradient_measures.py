"""Gradients in weights and images against closed forms; and what every curvature measure leaves behind."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from test_flatness import EPS, binary_model
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.flatness import average_flatness, worst_flatness
from wcitrain.measures.gradients import gradient_norm, input_curvature, input_gradient_norm
from wcitrain.measures.m_sharpness import average_sharpness, worst_sharpness
from wcitrain.measures.relative_flatness import relative_flatness
from wcitrain.measures.sharpness import asam_sharpness, awp_sharpness, sam_sharpness
from wcitrain.measures.spectrum import hessian_spectrum, lambda_max


def worst_images(model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The adversarial images of a binary linear model under linf."""
    W = model.weight.detach()
    return x + EPS.eps * (W[1 - y] - W[y]).sign()


def softmax_errors(model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """p − e_y [N, C]: the gradient of the cross-entropy in the outputs."""
    with torch.no_grad():
        return model(x).softmax(1) - F.one_hot(y, model.out_features)


def test_gradient_norm_is_the_closed_form_at_the_worst_images():
    """mean (p − e_y) hᵀ over all examples before the norm: the mean of chunks' norms is larger."""
    model, x, y = binary_model()
    z = worst_images(model, x, y)
    errors = softmax_errors(model, z, y)
    weight, bias = (errors.T @ z / 40).norm(), errors.mean(0).norm()
    result = gradient_norm(model, [(x, y)], EPS, chunk_size=7)
    assert result.parts == pytest.approx({"weight": float(weight), "bias": float(bias)}, rel=1e-10)
    assert result.value == pytest.approx(float((weight**2 + bias**2).sqrt()), rel=1e-10)
    assert math.isnan(gradient_norm(model, [(x, y)], EPS).stderr)  # one chunk has no spread


def test_the_error_of_the_gradient_norm_is_its_spread_over_samples():
    """The delta method along the gradient: 40 samples, whose deviation is known to 11 %."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.rand(2000, 4).double(), (torch.rand(2000) < 0.3).long()
    results = []
    for seed in range(40):
        rows = torch.randint(0, 2000, (100,), generator=torch.Generator().manual_seed(seed))
        results.append(gradient_norm(model, [(x[rows], y[rows])], None, chunk_size=5))
    spread = torch.tensor([r.value for r in results]).std()
    assert 0.6 < spread / torch.tensor([r.stderr for r in results]).mean() < 1.6


def test_input_gradient_norms_are_the_closed_form():
    """||Wᵀ(p − e_y)|| by example, in the dual of the threat's norm; a mean's gradient is N times less."""
    model, x, y = binary_model()
    g = softmax_errors(model, worst_images(model, x, y), y) @ model.weight.detach()
    lengths = {"l1": g.abs().sum(1), "l2": g.norm(dim=1), "linf": g.abs().amax(1)}
    result = input_gradient_norm(model, [(x, y)], EPS, chunk_size=7)
    assert result.parts == pytest.approx({k: float(v.mean()) for k, v in lengths.items()}, rel=1e-10)
    assert result.value == result.parts["l1"]
    assert result.stderr == pytest.approx(float(lengths["l1"].std()) / math.sqrt(40), rel=1e-10)
    assert input_gradient_norm(model, [(x, y)], EPS, norm="linf").value == pytest.approx(
        result.parts["linf"], rel=1e-10
    )
    clean = input_gradient_norm(model, [(x, y)], None)
    assert clean.value == clean.parts["l2"]


@pytest.mark.parametrize("direction", ["sign", "gradient"])
@pytest.mark.parametrize("threat", [None, EPS], ids=["clean", "linf"])
def test_input_curvature_is_the_closed_form(direction, threat):
    """∇²ℓ = Wᵀ(diag p − p pᵀ)W in the limit; for h = 1.5 the difference of closed gradients over h."""
    model, x, y = binary_model()
    W, z = model.weight.detach(), x if threat is None else worst_images(model, x, y)
    g = softmax_errors(model, z, y) @ W
    d = g.sign() if direction == "sign" else g
    d = d / d.norm(dim=1, keepdim=True)
    with torch.no_grad():
        p = model(z).softmax(1)
        H = torch.einsum("ci,ncd,dj->nij", W, p.diag_embed() - p[:, :, None] * p[:, None], W)
    limit = (H @ d[:, :, None]).squeeze(2).norm(dim=1)
    far = (softmax_errors(model, z + 1.5 * d, y) @ W - g).norm(dim=1) / 1.5
    exact = input_curvature(model, [(x, y)], threat, step=None, direction=direction, chunk_size=7)
    assert exact.value == pytest.approx(float(limit.mean()), rel=1e-9)
    assert exact.stderr == pytest.approx(float(limit.std()) / math.sqrt(40), rel=1e-9)
    cure = input_curvature(model, [(x, y)], threat, direction=direction, chunk_size=7)
    assert cure.value == pytest.approx(float(far.mean()), rel=1e-9)
    # Truncation: one third derivative times h/2, 1e-5 of the value here at most; rounding 1e-16/h.
    near = input_curvature(model, [(x, y)], threat, step=1e-5, direction=direction)
    assert near.value == pytest.approx(exact.value, rel=1e-4)


def test_a_constant_model_has_no_slope_and_no_curvature():
    """Zero over zero: one example without gradient would turn the mean into NaN."""
    model, x, y = binary_model()
    with torch.no_grad():
        model.weight.zero_()
    for step in (1.5, None):
        assert input_curvature(model, [(x, y)], EPS, step=step).value == 0
    assert input_gradient_norm(model, [(x, y)], EPS).value == 0
    with torch.no_grad():
        model.bias.copy_(torch.tensor([2000.0, 0.0]))
    zero = gradient_norm(model, [(x, torch.zeros_like(y))], EPS, chunk_size=7)
    assert (zero.value, zero.stderr) == (0, 0)


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (input_gradient_norm, {"norm": "l3"}, "norm: got 'l3'"),
        (input_curvature, {"step": 0.0}, "step: got 0.0"),
        (input_curvature, {"direction": "random"}, "direction: got 'random'"),
        (gradient_norm, {"layers": "none*"}, "selects no trainable tensor"),
    ],
)
def test_wrong_settings_are_refused(measure, options, message):
    """Before the attack, by name."""
    model, x, y = binary_model()
    with pytest.raises(ValueError, match=message):
        measure(model, [(x, y)], EPS, **options)


# Every measure --------------------------------------------------------------------------------------------

FEW = {"num_steps": 2, "step_size": 0.02}  # short of the border, so that starts matter
MEASURES = {
    "average_flatness": (average_flatness, FEW | {"num_draws": 2, "reference_restarts": 2}),
    "worst_flatness": (worst_flatness, FEW | {"num_restarts": 2, "reference_restarts": 2}),
    "sam_sharpness": (sam_sharpness, FEW),
    "asam_sharpness": (asam_sharpness, FEW),
    "awp_sharpness": (awp_sharpness, FEW),
    "average_sharpness": (average_sharpness, FEW | {"num_draws": 2}),
    "worst_sharpness": (worst_sharpness, FEW | {"ascent_steps": 2}),
    "hessian_spectrum": (hessian_spectrum, FEW | {"k": 2}),
    "lambda_max": (lambda_max, FEW),
    "relative_flatness": (relative_flatness, FEW),
    "relative_flatness, probes": (relative_flatness, FEW | {"layers": "weights", "num_probes": 2}),
    "gradient_norm": (gradient_norm, FEW),
    "input_gradient_norm": (input_gradient_norm, FEW),
    "input_curvature": (input_curvature, FEW),
    "input_curvature, limit": (input_curvature, FEW | {"step": None}),
}


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
        self.model = model
        self.state = everything(model)
        self.pointers = [p.data_ptr() for p in model.parameters()]
        self.flags = self.read()
        self.random = torch.get_rng_state()

    def read(self) -> list:
        return [
            [m.training for m in self.model.modules()],
            [p.requires_grad for p in self.model.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in self.model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()],
        ]

    def check(self) -> None:
        assert_same(everything(self.model), self.state)
        assert [p.data_ptr() for p in self.model.parameters()] == self.pointers
        assert self.read() == self.flags
        assert torch.equal(torch.get_rng_state(), self.random)


@pytest.mark.parametrize("threat", [None, ThreatModel("l2", 0.5)], ids=["clean", "l2"])
@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_leaves_no_trace_and_repeats(name, threat):
    """A measurement must not change the training around it; the same seed must give the same number."""
    measure, options = MEASURES[name]
    model, data = messy_model(), [image_batch(24)]
    traces = Traces(model)
    torch.rand(1)
    traces.random = torch.get_rng_state()
    first = measure(model, data, threat, seed=5, **options)
    traces.check()
    torch.rand(7)  # the global random state must not matter
    assert measure(model, data, threat, seed=5, **options).as_dict() == first.as_dict()
    assert first.name == name.split(",")[0]
    assert first.num_examples == 24
    assert math.isfinite(first.value)
    assert "nan" not in first.settings
    assert ("clean" in first.settings) == (threat is None)
    few = measure(model, data, threat, num_examples=10, **options)
    assert few.num_examples == 10
    if threat is not None:
        assert measure(model, data, threat, seed=6, **options).value != first.value  # starts, at least


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_leaves_no_trace_on_exceptions(name):
    """An exception in a perturbed pass leaves perturbed weights: fail in the 3rd, 10th and 25th forward."""
    measure, options = MEASURES[name]
    for after in (3, 10, 25):
        model = messy_model()
        calls = [0]

        def fail(module: nn.Module, args: object, after: int = after, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] == after:
                raise RuntimeError("stop")

        model.register_forward_pre_hook(fail)
        traces = Traces(model)
        with contextlib.suppress(RuntimeError):
            measure(model, [image_batch(24)], EPS, **options)
        assert calls[0] >= 3
        traces.check()


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_takes_a_frozen_model_and_refuses_no_data(name):
    """A model loaded for evaluation is frozen; an empty loader must not give NaN."""
    measure, options = MEASURES[name]
    torch.manual_seed(0)
    model = BatchNormNet().eval().requires_grad_(False)
    traces = Traces(model)
    with torch.no_grad():
        assert math.isfinite(measure(model, [image_batch(12)], EPS, **options).value)
    for data, num_examples, message in [
        ([], None, "no images"),
        ([image_batch(12)], 0, "num_examples: got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(model, data, EPS, num_examples=num_examples, **options)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        measure(model, [(3 * image_batch(12)[0], image_batch(12)[1])], EPS, **options)
    traces.check()
