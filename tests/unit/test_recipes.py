"""Every recipe that ships parses, builds, and takes steps; every sweep lists recipes that exist."""

from pathlib import Path

import pytest
import torch

from wcitrain.build import build_objective, build_optimizer, build_regularizer, learning_rate_factor, method_label
from wcitrain.models import create_model
from wcitrain.recipe import load_recipe, recipe_from_dict
from wcitrain.sweep import read_sweep

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SWEEPS = sorted((FOLDER / "sweeps").glob("*.yaml"))
CHANNELS = {"digits": (1, 8), "folder": (3, 16)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_builds_and_takes_two_steps(path):
    """A recipe nobody runs in the tests rots first."""
    recipe = load_recipe(path)
    settings = recipe.model.model_dump()
    channels, size = CHANNELS[recipe.data.source]
    model = create_model(
        **{k: v for k, v in settings.items() if k != "kwargs"}, num_classes=10, in_chans=channels, **settings["kwargs"]
    )
    optimizer = build_regularizer(recipe, build_optimizer(recipe, model), model, updates=10)
    objective = build_objective(recipe)
    x, y = torch.rand(4, channels, size, size), torch.tensor([0, 1, 2, 3])
    before = model.backbone.fc.weight.detach().clone()
    for _ in range(2):
        x_adv = objective.perturb(model, x, y)
        assert (x_adv - x).abs().max() <= recipe.threat.eps + 1e-6
        assert torch.isfinite(optimizer.step(lambda x_adv=x_adv: objective.loss(model, x, x_adv, y)))
    assert not torch.equal(before, model.backbone.fc.weight)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_reads_its_recipes(path):
    """All recipes of a sweep are checked before the first one trains."""
    assert len({method_label(recipe) for recipe in read_sweep(path)}) >= 3


def test_every_recipe_is_described():
    """A recipe without its row of hardware, time and expected numbers is a riddle."""
    text = (FOLDER / "README.md").read_text()
    assert [p.name for p in RECIPES + SWEEPS if p.name not in text] == []


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant"}, [1, 1, 1, 1, 1]),
        ({"name": "piecewise", "milestones": [5, 8], "gamma": 0.1}, [1, 1, 0.1, 0.1, 0.01]),
        ({"name": "cosine"}, [1, 0.8536, 0.5, 0.1464, 0]),
        ({"name": "cosine", "final_fraction": 0.1, "warmup_epochs": 5}, [0, 0.5, 1, 0.55, 0.1]),
        ({"name": "one_cycle", "peak_epoch": 5}, [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_learning_rates_follow_their_schedule(schedule, expected):
    """At 0, 1/4, 1/2, 3/4 and all of ten epochs."""
    recipe = recipe_from_dict({"train": {"epochs": 10}, "schedule": schedule})
    assert [learning_rate_factor(recipe, e) for e in (0, 2.5, 5, 7.5, 10)] == pytest.approx(expected, abs=1e-4)


def test_labels_say_what_is_trained():
    """Tables and figures are read by their labels."""
    labels = {
        "AT": {},
        "standard": {"objective": {"name": "standard"}},
        "AWP γ=0.01": {"perturbation": {"name": "awp"}},
        "WCI λ=0.1": {"perturbation": {"name": "wci", "strength": 0.1}},
        "WCI r=1 +F": {"perturbation": {"name": "wci", "frobenius": True}},
        "noise r=1": {"perturbation": {"name": "noise"}},
        "wci penalty 0.1": {"penalty": {"name": "wci", "strength": 0.1}},
    }
    assert [method_label(recipe_from_dict(data)) for data in labels.values()] == list(labels)
    assert method_label(recipe_from_dict({"penalty": {"name": "wci"}})) == "AT"  # monitoring only


def test_optimizers_by_name_and_without_decay_on_norms():
    """sgd is torch's SGD (timm's is Nesterov); decay_norm_and_bias=false takes vectors out of the decay."""
    model = create_model("resnet18", num_classes=3, layers=[1, 1, 1, 1], channels=[4, 4, 4, 4])
    recipe = recipe_from_dict({"optimizer": {"name": "sgd", "decay_norm_and_bias": False}})
    sgd = build_optimizer(recipe, model)
    assert type(sgd) is torch.optim.SGD
    assert not sgd.defaults["nesterov"]
    assert [g["weight_decay"] for g in sgd.param_groups] == [5e-4, 0.0]
    assert all(p.ndim <= 1 for p in sgd.param_groups[1]["params"])
    assert sum(len(g["params"]) for g in sgd.param_groups) == len(list(model.parameters()))
    lamb = build_optimizer(recipe_from_dict({"optimizer": {"name": "lamb", "lr": 0.01}}), model)
    assert type(lamb).__name__ == "Lamb"
    with pytest.raises(ValueError, match=r"optimizer.name: got 'adamww'.*Did you mean adamw"):
        build_optimizer(recipe_from_dict({"optimizer": {"name": "adamww"}}), model)
    with pytest.raises(ValueError, match=r"second derivatives"):
        build_optimizer(recipe_from_dict({"optimizer": {"name": "adahessian"}}), model)
    with pytest.raises(ValueError, match=r"optimizer.kwargs: sgd refuses"):
        build_optimizer(recipe_from_dict({"optimizer": {"kwargs": {"nonsense": 1}}}), model)
