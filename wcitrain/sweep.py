"""Methods times bases times a grid of settings times seeds, one run after the other; finished runs are kept.

A sweep file::

    bases: [cifar10_small]  # ../bases/NAME.yaml, or paths from the sweep file
    methods: [at, wci, "trades wci", "awp perturbation.gamma=0.01 name=awp-0.01"]  # as for `wcitrain train`
    seeds: [0, 1, 2]
    settings: [train.epochs=40]  # optional, for all of them
    grid: {threat.eps: [4/255, 8/255], optimizer.lr: [0.1]}  # optional: every combination is a run
    measure: [{measures: [wci], at: last}]  # optional: what is measured then, see ``commands.sweep``
"""

import itertools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue

from wcitrain.method import Count, Text, method
from wcitrain.monitoring import NonFiniteLossError
from wcitrain.progress import as_it_began, has_started, refuse_another_run, run_folder
from wcitrain.recipe import Recipe, load_recipe, recipe_from_dict
from wcitrain.recipe.reading import read_yaml
from wcitrain.train import fit

Texts = Annotated[list[Text], Field(min_length=1, description="A list of names or files.")]


@method
class Sweep:
    """What a sweep file says."""

    bases: Texts
    methods: Texts
    seeds: Annotated[list[Count], Field(min_length=1)] = Field(default=[0], description="Such as [0, 1, 2].")
    settings: list[Text] = Field(default=[], description="Settings of all runs, such as [train.epochs=40].")
    grid: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = Field(
        default={}, description="A list of values for each key, such as {optimizer.lr: [0.1]}."
    )
    measure: JsonValue = Field(default=None, description="What is measured then; see commands.sweep.")


def run_sweep(recipes: Sequence[Recipe]) -> list[Path]:
    """Train what is not finished, after all are checked, and return the run folders in order.

    A run that was interrupted is resumed; one that diverges is reported and left out, and the others go on.

    Raises:
        ValueError: A run there used other settings.
    """
    runs = {run_folder(recipe): recipe for recipe in recipes}
    for folder, recipe in runs.items():
        started = folder / "recipe.yaml"
        if has_started(folder) and started.exists():
            refuse_another_run(load_recipe(started), as_it_began(recipe, folder), folder)
    folders = []
    for folder, recipe in runs.items():
        if (folder / "summary.json").exists():  # written whole, at the end of a run
            print(f"{folder}: finished, kept")
        else:
            print(f"\n== {folder} ==", flush=True)
            try:
                fit(recipe, resume=has_started(folder))
            except NonFiniteLossError as error:  # a result too: the other runs go on
                print(f"{folder}: diverged, {error}", flush=True)
                continue
        folders.append(folder)
    return folders


def read_sweep(
    path: str | Path, settings: Sequence[str] = (), bases: Sequence[str] | None = None
) -> list[Recipe]:
    """Return the recipes of a sweep: all bases and methods with the first seed, then with the second, ...

    ``settings`` win over the file's, and ``bases``, names or files, take the place of the file's.

    Raises:
        ValueError: The file is not a sweep, a recipe is wrong, or two runs share a folder.
    """
    path, sweep = Path(path), read_sweep_file(path)
    stacks = [shlex.split(stack) for stack in sweep.methods]  # values with blanks stand in quotes
    common = [*sweep.settings, *settings]
    given = [*common, *itertools.chain(*stacks)]
    if both := {text.partition("=")[0] for text in given if "=" in text} & {"seed", *sweep.grid}:
        rule = "seeds, and keys of the grid, there alone. Leave the setting out."
        raise ValueError(f"{path}: got {', '.join(sorted(both))} as a setting; expected {rule}")

    def file(folder: str, name: str) -> Path:
        is_path = name.endswith((".yaml", ".yml"))
        return path.parent / (name if is_path else f"../{folder}/{name}.yaml")

    recipes: dict[Path, Recipe] = {}
    points = [dict(zip(sweep.grid, one, strict=True)) for one in itertools.product(*sweep.grid.values())]
    combinations = itertools.product(sweep.seeds, bases or sweep.bases, stacks, points)
    for seed, base, stack, point in combinations:
        names = [file("methods", part) for part in stack if "=" not in part]
        here = [*common, *(part for part in stack if "=" in part), f"seed={seed}"]
        here += [f"{key}={json.dumps(value)}" for key, value in point.items()]
        recipe = load_recipe([file("bases", base), *names], here)
        if point:
            name = f"name={recipe.name}{_point_name(point)}"
            recipe = recipe_from_dict(recipe.model_dump(mode="json"), [name])
        if (folder := run_folder(recipe)) in recipes:
            rule = "one folder each. Add name=... to a method."
            raise ValueError(f"{path}: got two runs in {folder}; expected {rule}")
        recipes[folder] = recipe
    return list(recipes.values())


def read_sweep_file(path: str | Path) -> Sweep:
    """Return what a sweep file says.

    Raises:
        ValueError: No YAML, unknown or missing keys, or values of other types.
    """
    try:
        return Sweep(**read_yaml(Path(path).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}\nA sweep file is described in wcitrain/sweep.py.") from error


def _point_name(point: dict[str, Any]) -> str:
    """Return what a point of the grid adds to a run's name, such as "-eps_8_255-lr_0.1"."""
    texts = (f"{key.rpartition('.')[2]}_{value}" for key, value in point.items())
    return "".join("-" + re.sub(r"[^A-Za-z0-9._]+", "_", text).strip("_") for text in texts)
