"""Does a measure go with the robust gap over models? A table, JSON and scatter plots.

Hyper-parameters are what differs between the recipes of the models' runs. Sections that choose a method
(objective, perturbation, ...) are one hyper-parameter each, elsewhere every key is one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wcitrain import files
from wcitrain.commands.output import file_name
from wcitrain.commands.study import GAP, Measured
from wcitrain.measures import Correlation, correlate
from wcitrain.recipe.reading import read_yaml

GOALS = {  # name: (part of the gap's measurement, None for its value)
    "robust gap (loss)": None,
    "robust gap (accuracy)": "accuracy_gap",
    "robust loss on test": "test_loss",
}
WHOLE = ["objective", "input_regularizer", "perturbation", "penalty", "augment", "mixing", "extra"]
WHOLE += ["label_noise", "schedule"]
WITHOUT_MEANING = ("name", "seed", "output", "evaluation", "measures", "checkpoint", "tracking")
CANNOT_DIFFER = ("num_threads", "device")
LEGEND = """\
Brackets: 95 % bootstrap intervals over runs. Ψ: Kendall's τ among models that differ in one \
hyper-parameter, averaged over hyper-parameters (granulated). information: conditional mutual information, \
the least over conditions on at most two hyper-parameters; in brackets what a shuffled measure reaches one \
time in twenty. –: not defined."""

Rows = Mapping[str, Correlation]  # by measure


def correlated(models: Sequence[Measured], folder: Path, seed: int = 0) -> tuple[str, list[Path]]:
    """Correlate every measure with ``GOALS``; return the tables, and the files written in ``folder``."""
    axes = hyper_parameters(models)
    runs = [str(model.target.run or model.target.path) for model in models]
    names = dict.fromkeys(name for model in models for name in model.measures if name != GAP)
    columns = {name: [model.value(name) for model in models] for name in names}
    columns = {name: column for name, column in columns.items() if sum(map(math.isfinite, column)) >= 3}
    correlations: dict[str, Rows] = {}
    for goal, part in GOALS.items():
        gap = [model.value(GAP, part) for model in models]
        rows = {name: correlate(column, gap, runs, axes, seed=seed) for name, column in columns.items()}
        correlations[goal] = dict(sorted(rows.items(), key=lambda row: -_strength(row[1])))
    text = _text(correlations, axes)
    document = {
        "models": [
            {"run": run, "at": model.target.at, "epoch": model.target.epoch}
            for run, model in zip(runs, models, strict=True)
        ],
        "axes": axes,
        "correlations": {
            goal: {name: _finite(asdict(row)) for name, row in rows.items()}
            for goal, rows in correlations.items()
        },
    }
    written = [files.write_json(folder / "correlation.json", document), folder / "correlation.md"]
    written[1].write_text(text + "\n", "utf-8")
    return text, [*written, *_scatter_plots(models, correlations, folder)]


def hyper_parameters(models: Sequence[Measured]) -> dict[str, list[str]]:
    """Return the keys that differ between the recipes; of those that always change together the first."""
    rows = [_settings(model) for model in models]
    axes: dict[str, list[str]] = {}
    seen = set()
    for key in dict.fromkeys(key for row in rows for key in row):
        column = [row.get(key, "") for row in rows]
        codes = tuple(column.index(value) for value in column)
        if len(set(codes)) > 1 and codes not in seen:
            seen.add(codes)
            axes[key] = column
    return axes


def _settings(model: Measured) -> dict[str, str]:
    """Return what the recipe of a model's run says, as comparable texts by key."""
    path = model.target.run and model.target.run / "recipe.yaml"
    flat: dict[str, Any] = {}
    for section, content in (read_yaml(path.read_text("utf-8")) if path else {}).items():
        if section in WITHOUT_MEANING:
            continue
        if section in WHOLE or not isinstance(content, dict):
            flat[section] = content
        else:
            flat |= {f"{section}.{key}": v for key, v in content.items() if key not in CANNOT_DIFFER}
    return {key: json.dumps(value, sort_keys=True) for key, value in flat.items()}


def _text(correlations: Mapping[str, Rows], axes: Mapping[str, Any]) -> str:
    """Return a Markdown table for each goal, the strongest rank correlation first."""
    first = next(iter(next(iter(correlations.values())).values()))
    differing = f"hyper-parameters that differ: {', '.join(axes) or 'none'}."
    lines = [f"{first.num_models} models of {first.num_runs} runs; {differing}"]
    header = ["measure", "Kendall τ", "Pearson r", "Ψ", "information", "models"]
    for goal, rows in correlations.items():
        cells = [[name, *_cells(row)] for name, row in rows.items()]
        table = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        lines += ["", f"### {goal}", "", *(f"| {' | '.join(map(str, row))} |" for row in table)]
    return "\n".join([*lines, "", LEGEND])


def _cells(row: Correlation) -> list[Any]:
    chance = f"{row.information:.3f} ({row.information_chance:.3f})"
    information = "–" if math.isnan(row.information) else chance
    return [row.kendall, row.pearson, row.granulated, information, row.num_models]


def _scatter_plots(models: Sequence[Measured], correlations: Mapping[str, Rows], folder: Path) -> list[Path]:
    """Draw the measures against each goal, a colour a method."""
    from wcitrain.report.figures import scatter_page  # matplotlib takes a second to import

    groups, written = [_method(model) for model in models], []
    for goal, part in GOALS.items():
        panels = {name: [model.value(name) for model in models] for name in correlations[goal]}
        notes = {name: f"τ {row.kendall}" for name, row in correlations[goal].items()}
        gaps = [model.value(GAP, part) for model in models]
        if figure := scatter_page(panels, notes, gaps, goal, groups):
            written.append(folder / f"{file_name('scatter', goal)}.png")
            figure.savefig(written[-1])
    return written


def _method(model: Measured) -> str:
    """Return the method of a model's run, or its folder's name."""
    try:
        return str(
            json.loads(((model.target.run or model.target.path) / "summary.json").read_text())["method"]
        )
    except (OSError, ValueError, KeyError):
        return model.target.short_name


def _strength(row: Correlation) -> float:
    return 0.0 if math.isnan(row.kendall.value) else abs(row.kendall.value)


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
