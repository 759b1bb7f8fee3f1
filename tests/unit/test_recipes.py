"""Every recipe that ships parses, builds, and takes steps; every sweep lists recipes that exist."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from wcitrain.build import (
    build_augmentation,
    build_mixing,
    build_objective,
    build_optimizer,
    build_regularizer,
    learning_rate_factor,
    threat_factor,
)
from wcitrain.labels import method_label
from wcitrain.models import create_model
from wcitrain.recipe import load_recipe, recipe_from_dict
from wcitrain.studying import read_studies
from wcitrain.sweep import read_sweep, sweep_content

FOLDER = Path(__file__).parents[2] / "recipes"
STUDIES = [FOLDER / "yamada_logistic.yaml"]  # read by a tool of its own
SWEEPS = [*sorted((FOLDER / "sweeps").glob("*.yaml")), FOLDER / "stutz_flatness.yaml"]
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path not in (*SWEEPS, *STUDIES))
CHANNELS = {"digits": (1, 8), "folder": (3, 16), "cifar10": (3, 16)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(FOLDER).with_suffix("")))
def test_a_recipe_builds_and_takes_two_steps(path):
    """A recipe nobody runs in the tests rots first. (Full-size networks are narrowed and long attacks cut to two steps.)"""
    recipe = load_recipe(path)
    settings = recipe.model.model_dump() | {"checkpoint_path": None}
    if recipe.model.name == "preact_resnet18":
        settings["kwargs"] = {"width": 4}
    channels, size = CHANNELS[recipe.data.source]
    torch.manual_seed(0)
    model = create_model(
        **{k: v for k, v in settings.items() if k != "kwargs"},
        num_classes=10,
        in_chans=channels,
        rotation_head=recipe.objective.name == "rotation",
        **settings["kwargs"],
    )
    optimizer = build_regularizer(recipe, build_optimizer(recipe, model), model, updates=10)
    objective = build_objective(recipe)
    if hasattr(objective, "num_steps") and objective.num_steps > 3:
        objective = replace(objective, num_steps=2)
    augmentation, mixing = build_augmentation(recipe), build_mixing(recipe)
    x, y = torch.rand(4, channels, size, size), torch.tensor([0, 1, 2, 3])
    if augmentation is not None:
        x = torch.stack([augmentation.apply((255 * image).byte(), n) for n, image in enumerate(x)]) / 255
    if mixing is not None:
        x, y = mixing.apply(x, y, 10, seed=0)
    before = model.backbone.fc.weight.detach().clone()
    for step in range(2):
        now = objective.scaled(threat_factor(recipe, (step + 1) / 10))
        x_adv = now.perturb(model, x, y)
        if recipe.threat.norm == "linf" and recipe.objective.name != "union":
            assert (x_adv - x).abs().max() <= recipe.threat.eps + 1e-6
        assert torch.isfinite(optimizer.step(partial(now.loss, model, x, x_adv, y)))
        if x_adv.requires_grad:
            now.after_backward(x, x_adv)
    assert not torch.equal(before, model.backbone.fc.weight)


def test_every_small_recipe_has_its_full_size_counterpart_and_both_differ_from_plain_training():
    """A method that can only be tried small, or a file that forgot its method, is of no use."""
    small = {p.stem for p in (FOLDER / "small").glob("*.yaml")}
    full = {p.stem for p in (FOLDER / "cifar10").glob("*.yaml")}
    assert small - full == {"crop_flip"}  # part of every full-size recipe
    assert full - small == {"extra_synthetic"}  # needs a download of gigabytes
    for folder in ("small", "cifar10"):
        plain = load_recipe(FOLDER / folder / "at.yaml").model_dump() | {"name": ""}
        for path in (FOLDER / folder).glob("*.yaml"):
            assert path.stem == "at" or load_recipe(path).model_dump() | {"name": ""} != plain, path
            assert load_recipe(path).name == f"{folder}-{path.stem.replace('_', '-')}"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_reads_its_recipes(path):
    """All recipes of a sweep are checked before the first one trains, and what is measured after the last one."""
    assert len({(method_label(recipe), recipe.name) for recipe in read_sweep(path)}) >= 3
    read_studies(sweep_content(path).get("measure"), path.name)


def test_every_recipe_is_described():
    """A recipe without its row of hardware, time and expected numbers is a riddle."""
    text = (FOLDER / "README.md").read_text()
    names = [str(p.relative_to(FOLDER)) for p in (*RECIPES, *SWEEPS, *STUDIES)]
    missing = [n for n in names if n not in text and n.removeprefix("cifar10/").replace(".yaml", "") not in text]
    assert missing == []


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
        "TRADES β=6 + AWP γ=0.005": {"objective": {"name": "trades"}, "perturbation": {"name": "awp", "gamma": 0.005}},
        "AT max of linf, l2": {"objective": {"name": "union"}},
        "standard + CURE 4": {"objective": {"name": "standard"}, "input_regularizer": {"name": "cure"}},
        "cutout + mixup": {"augment": {"policy": "cutout", "cutout_size": 4}, "mixing": {"mixup_alpha": 1}},
        "label smoothing 0.1 + EMA 0.9": {"objective": {"label_smoothing": 0.1}, "train": {"ema_decay": 0.9}},
        "GSAM ρ=0.05 α=0.2 + SWA": {"perturbation": {"name": "gsam"}, "train": {"swa_start_epoch": 1}},
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


def test_what_a_composed_recipe_says_reaches_the_wrapper():
    """Beside a perturbation the penalty's own settings were once dropped without a word."""
    penalty = {"name": "frobenius_trace", "frobenius_weight": 1e-3, "trace_weight": 0.5, "trace_decay": 0.1}
    for weight, measures in ((0.5, True), (0.0, False)):
        recipe = recipe_from_dict({"perturbation": {"name": "awp"}, "penalty": penalty | {"trace_weight": weight}})
        model = create_model("resnet18", num_classes=3, layers=[1, 1, 1, 1], channels=[4, 4, 4, 4])
        optimizer = build_regularizer(recipe, build_optimizer(recipe, model), model, updates=10)
        assert optimizer.penalty.measures_curvature is measures
        assert optimizer.penalty.frobenius_weight == 1e-3
        assert optimizer.trace_decay == 0.1
