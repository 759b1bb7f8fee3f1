"""Several recipes times a grid of settings times several seeds, one after the other; what is finished is not run again.

A sweep file::

    recipes: [cifar10_small.yaml, cifar10_small_wci.yaml]   # relative to the sweep file
    seeds: [0, 1, 2]
    settings: [train.epochs=40]                              # optional, for all of them
    grid: {threat.eps: [4/255, 8/255], optimizer.lr: [0.1]}  # optional: every combination, each under a name of its own
    measure: [{measures: [wci], at: last}]                   # optional: what is measured then, see ``studying``
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    path, content = Path(path), sweep_content(path)
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
    points = _grid_points(content.get("grid", {}), f"{path}: grid")
    if both := {text.partition("=")[0] for text in common} & set(points[0]):
        raise ValueError(
            f"{path}: got {', '.join(sorted(both))} both as a setting and in the grid; expected one of them."
        )
    recipes = []
    for seed, name, point in itertools.product(seeds, content["recipes"], points):
        here = [*common, *(f"{key}={json.dumps(value)}" for key, value in point.items()), f"seed={seed}"]
        recipe = load_recipe(path.parent / name, here)
        if point:
            recipe = load_recipe(path.parent / name, [*here, f"name={recipe.name}{_point_name(point)}"])
        recipes.append(recipe)
    folders = [run_folder(recipe) for recipe in recipes]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"{path}: got two runs in {twice}; expected one folder each. Give every recipe its own name.")
    return recipes


def sweep_content(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a sweep file.

    Raises:
        ValueError: No YAML, unknown keys, or no recipes.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: got {error}; expected a sweep file with `recipes` and `seeds`.") from error
    keys = {"recipes", "seeds", "settings", "grid", "measure"}
    if not isinstance(content, dict) or set(content) - keys or not content.get("recipes"):
        raise ValueError(
            f"{path}: got {sorted(content) if isinstance(content, dict) else type(content).__name__}; expected the keys "
            "recipes (a list of files), seeds (a list of integers) and optionally settings (a list of key=value), grid (lists of "
            "values by key) and measure (a list of studies)."
        )
    return content


def _grid_points(grid: Any, where: str) -> list[dict[str, Any]]:
    """Return every combination of a grid's values, the last key changing fastest; one empty point without a grid."""
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(
            f"{where}: got {grid!r}; expected a list of values for each key, such as {{optimizer.lr: [0.1]}}."
        )
    if {"seed", "name"} & set(grid):
        raise ValueError(
            f"{where}: got the key seed or name; expected other settings. Use `seeds`; names are made here."
        )
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _point_name(point: dict[str, Any]) -> str:
    """Return what a point of the grid adds to a run's name, such as "-eps_8_255-lr_0.1"."""
    texts = (f"{key.rpartition('.')[2]}_{value}" for key, value in point.items())
    return "".join("-" + re.sub(r"[^A-Za-z0-9._]+", "_", text).strip("_") for text in texts)


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
