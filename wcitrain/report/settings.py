"""What differs between runs: their resolved recipes, key by key."""

from collections.abc import Mapping, Sequence
from typing import Any

from wcitrain.report.runs import Run

NAMES = ("name", "seed", "output")  # they tell runs apart and are no settings of the method
# Settings that change the task or the test and not only the method; rows that differ in one do not compare.
_DATA = ("source", "root", "name", "test_split", "image_size", "max_train", "max_test")
_TASK = (*(f"data.{key}" for key in _DATA), "model.", "threat.")
_TASK += tuple(f"evaluation.{key}" for key in ("num_steps", "step_size", "num_restarts"))


def flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return ``{"train.epochs": "30", ...}``: dotted keys in the recipe's order, values as it writes them.

    >>> flat({"train": {"epochs": 30, "compile": False}, "milestones": [1, 2], "kwargs": {}})
    {'train.epochs': '30', 'train.compile': 'false', 'milestones': '[1, 2]', 'kwargs': '{}'}
    """
    result: dict[str, str] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = _written(value)
    return result


def _written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, list | tuple) else str(value)


def compare_settings(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, list[str | None]]]:
    """Return the settings that all runs share, and each run's value of the others, None where it has none.

    ``NAMES`` are left out of both. The order is that of the recipes, those of one section together.
    """
    recipes = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in NAMES)
    sections = list(dict.fromkeys(key.split(".")[0] for key in keys))
    equal: dict[str, str] = {}
    differing: dict[str, list[str | None]] = {}
    for key in sorted(keys, key=lambda key: sections.index(key.split(".")[0])):
        values = [recipe.get(key) for recipe in recipes]
        if None not in values and len(set(values)) == 1:
            equal[key] = str(values[0])
        else:
            differing[key] = values
    return equal, differing


def task_differences(runs: Sequence[Run]) -> list[str]:
    """Return the settings of ``_TASK`` with more than one value; a key that a run lacks makes no difference.

    Of a path only the last part counts: runs of one data set may have been started in different folders.
    """
    result = []
    for key, values in compare_settings(runs)[1].items():
        known = {v.rpartition("/")[2] if key == "data.root" else v for v in values if v is not None}
        if key.startswith(_TASK) and len(known) > 1:
            result.append(key)
    return result
