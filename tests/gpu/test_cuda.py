"""What only a CUDA device can show; skipped without one."""

import pytest
import torch
from cases import RULES, BatchNormNet, assert_same, image_batch

from wcitrain.attacks import ThreatModel
from wcitrain.curvature import cross_entropy
from wcitrain.evaluation import evaluate
from wcitrain.measures import MEASURES, Problem
from wcitrain.optim import RegularizedOptimizer
from wcitrain.recipe import recipe_from_dict
from wcitrain.train import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("rule", RULES)
def test_weights_come_back_bit_for_bit_on_the_device(rule):
    """Learning rate zero through every rule; statistics and traces live on the device."""
    torch.manual_seed(0)
    model = BatchNormNet().cuda()
    base = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer = RegularizedOptimizer(base, model, **RULES[rule].kwargs)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    x, y = (z.cuda() for z in image_batch())
    for _ in range(3):
        assert torch.isfinite(optimizer.step(lambda: cross_entropy(model(x), y)))
    assert_same({k: v.detach() for k, v in model.named_parameters()}, before)


@pytest.mark.parametrize("rule", [r for r in RULES if "hutchinson" not in r and "2 probes" not in r])
def test_a_step_never_waits_for_the_device(rule):
    """Every synchronisation stops the host until the device is done: passes no longer overlap."""
    torch.manual_seed(0)
    model = BatchNormNet().cuda()
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, **RULES[rule].kwargs)
    x, y = (z.cuda() for z in image_batch())
    try:
        for number in range(4):
            torch.cuda.set_sync_debug_mode("error" if number == 3 else "default")
            optimizer.step(lambda: cross_entropy(model(x), y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", [r for r in RULES if "one pass" in r])
def test_one_pass_under_fp16_with_a_scaler_equals_float32(rule):
    """Gradients are scaled, traces are not; a step that overflows is skipped whole."""
    traces, weights = [], []
    for is_half in (False, True):
        torch.manual_seed(0)
        model = BatchNormNet().cuda().eval()
        scaler = torch.amp.GradScaler("cuda", enabled=is_half, init_scale=2.0**10)
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer = RegularizedOptimizer(base, model, scaler=scaler, **RULES[rule].kwargs)
        x, y = (z.cuda() for z in image_batch())
        for _ in range(4):
            with optimizer.perturbed(), torch.autocast("cuda", torch.float16, enabled=is_half):
                loss = cross_entropy(model(x), y).total
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        traces.append(optimizer.traces())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*traces, rtol=0.1, atol=0.05 * float(traces[0].abs().max()))  # half has 11 bits
    assert torch.allclose(*weights, atol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_on_the_device_learns(precision, tmp_path):
    """The whole chain in both precisions."""
    recipe = recipe_from_dict(
        {
            "output": str(tmp_path),
            "data": {"source": "digits", "val_size": 100, "max_train": 800},
            "model": {"stem": "cifar", "kwargs": {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}},
            "threat": {"eps": 0.1},
            "objective": {"num_steps": 3, "step_size": 0.05},
            "perturbation": {"name": "wci", "relative_size": 0.5},
            "train": {"epochs": 12, "batch_size": 50, "precision": precision, "channels_last": True},
            "evaluation": {"train_size": 200, "every": 6},
            "tracking": {"wandb": "disabled"},
        }
    )
    assert fit(recipe)["last"]["test"]["clean_accuracy"] > 0.7


NAMES = ["lambda_max", "gradient_norm", "relative_flatness", "margins"]
NAMES += ["spectral_norms", "path_norm", "sam_sharpness"]


@pytest.mark.parametrize("name", NAMES)
def test_a_measure_is_the_same_on_the_device(name):
    """Generators, norms or sums that stay on the CPU; clean images, as random starts differ by device."""
    torch.manual_seed(0)
    model = BatchNormNet().eval()
    x, y = image_batch()
    expected = MEASURES[name]().measure(Problem(model, [(x, y)]))
    found = MEASURES[name]().measure(Problem(model.cuda(), [(x, y)]))
    assert found.value == pytest.approx(expected.value, rel=1e-3)  # float32, other algorithms


@pytest.mark.parametrize("attacks", [["pgd-5x2", "margin-5"], ["autoattack:apgd-ce+square"]])
def test_an_evaluation_runs_on_the_device(attacks):
    """Flags come back to the CPU, whatever the model is on."""
    if any("autoattack" in name for name in attacks):
        pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model = BatchNormNet().eval()
    x, y = image_batch()
    settings = {"attacks": attacks, "preflight": "off"}
    here = evaluate(model, [(x, y)], ThreatModel("linf", 0.05), **settings)
    there = evaluate(model.cuda(), [(x, y)], ThreatModel("linf", 0.05), **settings)
    assert there.clean_accuracy == here.clean_accuracy
    assert abs(there.robust_accuracy() - here.robust_accuracy()) <= 2 / len(y)  # examples at the edge
