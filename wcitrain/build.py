"""From a checked recipe to the parts of a run; the recipe holds the methods, so little is left to do."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from wcitrain.checkpoint import class_names_in
from wcitrain.data import Images, ImageSet, MixedSet, Splits, load_extra, match_classes, pseudo_label
from wcitrain.data.pixels import ArraySource
from wcitrain.data.splits import is_count
from wcitrain.files import read_json
from wcitrain.models import Classifier, create_model, load_exported
from wcitrain.objectives import Objective, WithInputRegularizer
from wcitrain.optim import RegularizedOptimizer
from wcitrain.recipe import Recipe
from wcitrain.seeding import seed_from
from wcitrain.starting import normalise, start_from
from wcitrain.text import name_some
from wcitrain.weights import HUB, on_hub

SIZES = ("num_classes", "in_chans")  # that the data say


def open_training_set(recipe: Recipe, splits: Splits, device: torch.device) -> Images:
    """Return what training draws its batches from: training images, the recipe's extra ones among them.

    ValueError where augmentation, label noise or extra images do not fit the data.
    """
    train, extra, noise = splits.train, recipe.extra, recipe.label_noise
    recipe.augment.check(splits.shape)
    if not train.can_shuffle and noise.share and not noise.resample:
        text = "got false with images that are read front to back and have no places; expected true."
        raise ValueError(f"label_noise.resample: {text} Change it, or use another data source.")
    if extra.path is None:
        return train
    if not isinstance(train, ImageSet):
        text = f"got {extra.path} with {recipe.data.name}, which is read front to back; expected null."
        raise ValueError(f"extra.path: {text} Remove extra, or use another data source.")
    images = load_extra(extra, recipe.data, splits)
    if isinstance(images.source, ArraySource) and extra.labeler is None and not is_count(splits.class_names):
        print(f"extra.path: labels without names, in the order {name_some(splits.class_names)}", flush=True)
    if extra.labeler is not None:
        names = class_names_in(Path(extra.labeler))
        numbers, note = match_classes(names, splits.class_names, "extra.labeler")
        images, confidence = pseudo_label(images, load_exported(extra.labeler).to(device), device)
        images = replace(images, y=torch.tensor(numbers).argsort()[images.y])
        print(f"extra.labeler: {note}\n" if note else "", end="")
        print(f"pseudo-labels of {len(images)} extra images: mean confidence {confidence:.2f}", flush=True)
    return MixedSet(train, images, extra.fraction)


def untrained(recipe: Recipe) -> Recipe:
    """Return the recipe without the weights that it starts from: they are loaded from elsewhere."""
    bare = {"pretrained": False, "checkpoint_path": None, "match": "name"}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=bare)})


def by_architecture(recipe: Recipe) -> Recipe:
    """Return the recipe with what stands behind ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``.

    That is a name of timm's, arguments, and weights to start from: a run goes on without folder or hub.
    ValueError for such a name of a model that does not start from its weights.
    """
    settings = recipe.model
    source, _, place = settings.name.replace("hf_hub:", HUB).partition(":")
    if source not in ("hf-hub", "local-dir"):
        return recipe
    if not settings.starts_from_weights:
        rule = "one. Set model.pretrained or checkpoint_path, or name the architecture alone"
        raise ValueError(f"model.name: got {settings.name} with no source of weights; expected {rule}.")
    folder = on_hub(f"{HUB}{place}") if source == "hf-hub" else Path(place)
    if not (folder / "config.json").is_file():
        rule = "a folder of timm's, with config.json and its weights. Correct it"
        raise ValueError(f"model.name: got local-dir:{place} without config.json; expected {rule}.")
    config = read_json(folder / "config.json")
    own = {key: value for key, value in config.get("model_args", {}).items() if key not in SIZES}
    known = {"name": config["architecture"], "kwargs": own | settings.kwargs}
    if settings.pretrained:
        known |= {"pretrained": False, "checkpoint_path": place if source == "local-dir" else f"{HUB}{place}"}
    return recipe.model_copy(update={"model": settings.model_copy(update=known)})


def settled(recipe: Recipe, model: Classifier) -> Recipe:
    """Return the recipe with the normalisation that its model took from weights, which may be gone later."""
    settings = recipe.model
    if not settings.starts_from_weights:
        return recipe
    own = {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    known = {key: value for key, value in own.items() if getattr(settings, key) is None}
    return recipe.model_copy(update={"model": settings.model_copy(update=known)})


def initial_model(recipe: Recipe, splits: Splits, *, is_target: bool = False) -> Classifier:
    """Return the model as it is before the first step: a function of the recipe and its seed.

    Weights of other classes are fitted, see ``start_from``; not for a model that is measured as it is
    (``is_target``), whose head would be random.

    It seeds torch's global generator; ``preserve.kept_random_state`` around it keeps the former state.
    """
    torch.manual_seed(seed_from(recipe.seed, "model"))
    settings = recipe.model.model_dump()
    settings |= {"num_classes": splits.num_classes, "in_chans": splits.in_chans}
    settings |= settings.pop("kwargs") | {"rotation_head": recipe.objective.needs_rotation_head}
    path, given = recipe.model.checkpoint_path, {key: settings[key] for key in ("mean", "std")}
    match = settings.pop("match")
    if path is None and match != "name":
        rule = "it with model.checkpoint_path, whose tensors it is about. Set that"
        raise ValueError(f"model.match: got {match}; expected {rule}.")
    model = create_model(**settings | {"checkpoint_path": None})
    if path is not None:
        start_from(model, path, match=match, class_names=splits.class_names, **given, is_exact=is_target)
    elif recipe.model.pretrained and not is_target:
        config: Any = model.backbone.pretrained_cfg
        known = {key: config[key] for key in given if key in config}
        normalise(model, known, recipe.model.name, given)
        if config.get("num_classes", splits.num_classes) != splits.num_classes:
            print(f"{recipe.model.name}: read nothing of the head, which is new: the classes are others")
    return model


def fresh_objective(recipe: Recipe) -> Objective:
    """Return the recipe's objective, without state of other runs, inside its input-space regulariser."""
    objective: Objective = replace(recipe.objective)  # type: ignore[type-var]
    regularizer = recipe.input_regularizer
    return cast(Objective, WithInputRegularizer(objective, regularizer)) if regularizer else objective


def wrap(
    recipe: Recipe, base: torch.optim.Optimizer, model: nn.Module, steps_per_epoch: int
) -> RegularizedOptimizer:
    """Return ``base`` wrapped with the recipe's perturbation and penalty."""
    rules: dict[str, Any] = {"perturbation": recipe.perturbation, "penalty": recipe.penalty}
    settings = rules | recipe.wrapper.model_dump() | {"seed": recipe.seed}
    return RegularizedOptimizer(base, model, **settings, steps_per_epoch=steps_per_epoch)


def step_size(recipe: Recipe, attack: Any) -> float:
    """Return the attack's step, or that of ``ThreatModel.step_for`` where the recipe leaves it open."""
    return recipe.threat.step_for(attack.num_steps, attack.step_size)
