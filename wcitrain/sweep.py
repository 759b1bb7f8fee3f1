"""Several recipes times several seeds, one after the other; what is finished is not run again.

A sweep file::

    recipes: [cifar10_small.yaml, cifar10_small_wci.yaml]   # relative to the sweep file
    seeds: [0, 1, 2]
    settings: [train.epochs=40]                              # optional, for all of them
"""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from wcitrain.progress import has_started, run_folder
from wcitrain.recipe import Recipe, load_recipe
from wcitrain.train import NonFiniteLossError, fit


def run_sweep(path: str | Path, settings: Sequence[str] = ()) -> list[Path]:
    """Train every recipe with every seed, resume what was interrupted, and return the run folders in order.

    All recipes are read and checked before the first one is trained.

    A run that diverges is reported and left out; the others go on.

    Raises:
        ValueError: The file is not a sweep, a recipe is wrong, or a run there used other settings.
    """
    recipes = read_sweep(path, settings)
    for recipe in recipes:
        folder = run_folder(recipe)
        started = folder / "recipe.yaml"
        if (
            has_started(folder)
            and started.exists()
            and _without_machine(load_recipe(started)) != _without_machine(recipe)
        ):
            raise ValueError(
                f"{folder}: got a run with other settings; expected this sweep's. Choose another name= or output=, or move "
                "the folder away."
            )
    failed = []
    for recipe in recipes:
        folder = run_folder(recipe)
        if is_finished(folder):
            print(f"{folder}: finished, kept")
            continue
        print(f"\n== {folder} ==", flush=True)
        try:
            fit(recipe, resume=has_started(folder))
        except NonFiniteLossError as error:  # a result too: the other runs go on
            print(f"{folder}: diverged, {error}", flush=True)
            failed.append(folder)
    return [run_folder(recipe) for recipe in recipes if run_folder(recipe) not in failed]


def read_sweep(path: str | Path, settings: Sequence[str] = ()) -> list[Recipe]:
    """Return the recipes of a sweep: all recipes with the first seed, then with the second, ...

    Raises:
        ValueError: Unknown keys, no recipes, seeds that are not integers, or two runs that share a folder.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: got {error}; expected a sweep file with `recipes` and `seeds`.") from error
    if not isinstance(content, dict) or set(content) - {"recipes", "seeds", "settings"} or not content.get("recipes"):
        raise ValueError(
            f"{path}: got {sorted(content) if isinstance(content, dict) else type(content).__name__}; expected the keys "
            "recipes (a list of files), seeds (a list of integers) and optionally settings (a list of key=value)."
        )
    seeds = content.get("seeds", [0])
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise ValueError(f"{path}: seeds: got {seeds!r}; expected a list of integers such as [0, 1, 2].")
    for key in ("recipes", "settings"):
        values = content.get(key, [])
        if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            raise ValueError(f"{path}: {key}: got {values!r}; expected a list of texts. Write [..].")
    common = [*content.get("settings", []), *settings]
    if any(setting.startswith("seed=") for setting in common):
        raise ValueError(f"{path}: got the setting seed=...; expected seeds in the sweep file. Change `seeds` there.")
    recipes = [
        load_recipe(path.parent / name, [*common, f"seed={seed}"]) for seed in seeds for name in content["recipes"]
    ]
    folders = [run_folder(recipe) for recipe in recipes]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"{path}: got two runs in {twice}; expected one folder each. Give every recipe its own name.")
    return recipes


def is_finished(folder: Path) -> bool:
    """Tell whether a run wrote its summary."""
    try:
        return json.loads((folder / "summary.json").read_text())["status"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


def _without_machine(recipe: Recipe) -> dict:
    """Return the settings that decide what is computed, without those that say where."""
    settings = recipe.model_dump()
    settings["train"].pop("num_threads")
    settings.pop("tracking")
    return settings
