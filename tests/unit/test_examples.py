"""Every example in a docstring runs, and everything a user is meant to call without the trainer has one."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import wcitrain

MODULES = sorted(module.name for module in pkgutil.walk_packages(wcitrain.__path__, "wcitrain."))
README = (Path(__file__).parents[2] / "README.md").read_text()
WITH_AN_EXAMPLE = "Attack RegularizedOptimizer correlate evaluate measure_wci"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_in_docstrings_run(name):
    """An example that fails is worse than none: it is the first thing a user tries."""
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", WITH_AN_EXAMPLE.split())
def test_what_is_used_without_the_trainer_has_an_example(name):
    """Found through help(), kept right by the test above: one for each room."""
    assert ">>>" in getattr(wcitrain, name).__doc__


BLOCKS = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "in loader" in b]


def test_the_loops_of_the_readme_train_by_the_rule_and_move_batchnorm_once_a_step(monkeypatch):
    """What everybody copies. Its attack once ran in train mode: statistics moved 11 times a step."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:96]).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels[:96])
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    monkeypatch.setattr(wcitrain, "create_model", lambda *args, **kwargs: model)
    space, steps = {"loader": list(zip(x.split(32), y.split(32), strict=True))}, 0
    for block, num_steps in zip(BLOCKS, (1, 3), strict=True):
        exec(block, space)  # the second goes on with the model and the optimizer of the first
        steps += 3 * num_steps
        assert int(norm.num_batches_tracked) == steps
        assert space["optimizer"].param_groups[0]["regularizer"]["draws"] == steps
    assert model.training
    assert {"wci/1.weight", "wci/0.weight"} & set(space["optimizer"].metrics())
