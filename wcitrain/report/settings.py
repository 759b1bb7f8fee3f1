"""What differs between runs: their resolved recipes, key by key, as data and as the page's section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wcitrain.report.markup import Markup, element, folded, join, table
from wcitrain.report.runs import MISSING, Run
from wcitrain.report.words import count

NAMES = ("name", "seed", "output")  # they tell runs apart and are no settings of the method
FEW = 6  # up to here settings are lines and runs columns
# Settings that change the task or the test and not only the method; rows that differ in one do not compare.
_TASK = (
    *(
        "data.source",
        "data.root",
        "data.name",
        "data.test_split",
        "data.image_size",
        "data.max_train",
        "data.max_test",
    ),
    *("model.", "threat.", "evaluation.num_steps", "evaluation.step_size", "evaluation.num_restarts"),
)


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
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return str(value)


def compare_settings(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, list[str | None]]]:
    """Return the settings that all runs share, and each run's value of the others, None where it has none.

    ``NAMES`` are left out of both. The order is that of the recipes.
    """
    recipes = [flat(run.recipe) for run in runs]
    equal: dict[str, str] = {}
    differing: dict[str, list[str | None]] = {}
    for key in _merged_keys(recipes):
        values = [recipe.get(key) for recipe in recipes]
        if key.split(".")[0] in NAMES and "." not in key:
            continue
        if None not in values and len(set(values)) == 1:
            equal[key] = str(values[0])
        else:
            differing[key] = values
    return equal, differing


def _merged_keys(recipes: Sequence[Mapping[str, str]]) -> list[str]:
    """Return every key once, those of one section together."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    sections = list(dict.fromkeys(key.split(".")[0] for key in keys))
    return sorted(keys, key=lambda key: sections.index(key.split(".")[0]))


def task_differences(runs: Sequence[Run]) -> list[str]:
    """Return the settings of ``_TASK`` with more than one value; a key that a run lacks makes no difference.

    Of a path only the last part counts: runs of one data set may have been started in different folders.
    """
    _, differing = compare_settings(runs)
    found = []
    for key, values in differing.items():
        known = {
            value.rpartition("/")[2] if key == "data.root" else value for value in values if value is not None
        }
        if key.startswith(_TASK) and len(known) > 1:
            found.append(key)
    return found


def settings_section(runs: Sequence[Run]) -> Markup:
    """Return the settings that differ as a table, those that are equal folded away."""
    equal, differing = compare_settings(runs)
    parts = []
    if len(runs) > 1:
        parts.append(
            element("p", "Seeds and names aside, these runs have the same settings.") if not differing else ""
        )
    if differing:
        parts.append(_differences(runs, differing))
    shared = [(key, element("td", element("code", value))) for key, value in equal.items()]
    title = f"{count(len(equal), 'setting')}{' that all runs share' * (len(runs) > 1)}"
    parts.append(folded(title, table(title.capitalize(), ("setting", "value"), shared, "words")))
    return join(parts)


def _differences(runs: Sequence[Run], differing: dict[str, list[str | None]]) -> Markup:
    """Return the table; runs with equal settings, seeds of a method, share a line."""
    columns: dict[tuple[str, tuple[str | None, ...]], list[Run]] = {}
    for i, run in enumerate(runs):
        columns.setdefault((run.group, tuple(values[i] for values in differing.values())), []).append(run)
    heads = [
        join([members[0].method, element("small", ", ".join(run.name for run in members))])
        for members in columns.values()
    ]
    lines = []  # [keys][columns]
    for place, (key, values) in enumerate(differing.items()):
        usual = max(dict.fromkeys(values), key=values.count)
        here = [values_[place] for _, values_ in columns]
        is_rare = [value != usual and values.count(usual) > len(values) / 2 for value in here]
        cells = [
            element("td", MISSING if value is None else value, class_="rare" * rare)
            for value, rare in zip(here, is_rare, strict=True)
        ]
        lines.append((key, cells))
    caption = (
        f"{count(len(differing), 'setting')} that differ; bold: unlike most runs; {MISSING}: no such setting"
    )
    if len(heads) <= FEW:
        return table(caption, ("setting", *heads), [(key, *cells) for key, cells in lines], "settings")
    body = [(head, *(cells[i] for _, cells in lines)) for i, head in enumerate(heads)]
    return table(caption, ("run", *(key for key, _ in lines)), body, "settings")
