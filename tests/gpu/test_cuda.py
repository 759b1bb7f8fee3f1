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


@pytest.mark.parametrize(
    "name",
    [
        "lambda_max",
        "gradient_norm",
        "relative_flatness",
        "margins",
        "spectral_norms",
        "path_norm",
        "sam_sharpness",
    ],
)
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
