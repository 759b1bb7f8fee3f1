"""Does a measure go with the robust gap over models? A table, JSON and scatter plots.

Hyper-parameters are what differs between the recipes of the models. Sections that choose a method (objective,
perturbation, ...) are one hyper-parameter each, elsewhere every key is one.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wcitrain import files
from wcitrain.commands.common import file_name
from wcitrain.commands.study import GAP, Measured
from wcitrain.measures import Correlation, correlate

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


def correlated(models: Sequence[Measured], folder: Path, seed: int = 0) -> tuple[str, list[Path]]:
    """Correlate every measure with ``GOALS``; return the tables, and the files written in ``folder``."""
    from wcitrain.report.figures import scatter_page  # matplotlib takes a second to import

    axes = hyper_parameters(models)
    runs = [str(model.target.home) for model in models]
    methods = [model.target.recipe.method for model in models]
    names = dict.fromkeys(name for model in models for name in model.measures if name != GAP)
    columns = {name: [model.value(name) for model in models] for name in names}
    columns = {name: column for name, column in columns.items() if sum(map(math.isfinite, column)) >= 3}
    header = ["measure", "Kendall τ", "Pearson r", "Ψ", "information", "models"]
    differing = f"hyper-parameters that differ: {', '.join(axes) or 'none'}."
    lines = [f"{len(models)} models of {len(set(runs))} runs; {differing}"]
    lines += [f"Left out: {line}." for model in models for line in model.without_value()]
    correlations, figures = {}, {}
    for goal, part in GOALS.items():
        gap = [model.value(GAP, part) for model in models]
        rows = {name: correlate(column, gap, runs, axes, seed=seed) for name, column in columns.items()}
        rows = dict(sorted(rows.items(), key=lambda row: _strength(row[1])))
        table = [header, ["---", *["---:"] * (len(header) - 1)]]
        table += [[name, *_cells(row)] for name, row in rows.items()]
        lines += ["", f"### {goal}", "", *(f"| {' | '.join(row)} |" for row in table)]
        correlations[goal] = {name: asdict(row) for name, row in rows.items()}
        notes = {name: f"τ {row.kendall}" for name, row in rows.items()}
        panels = {name: columns[name] for name in rows}
        figures[goal] = scatter_page(panels, notes, gap, goal, methods)
    text = "\n".join([*lines, "", LEGEND])
    points = [
        {"run": run, "at": model.target.at, "epoch": model.target.epoch}
        for run, model in zip(runs, models, strict=True)
    ]
    document = {"models": points, "axes": axes, "correlations": correlations}
    written = [files.write_json(folder / "correlation.json", document), folder / "correlation.md"]
    written[1].write_text(text + "\n", "utf-8")
    for goal, figure in figures.items():
        if figure:
            written.append(folder / f"{file_name('scatter', goal)}.png")
            figure.savefig(written[-1])
    return text, written


def hyper_parameters(models: Sequence[Measured]) -> dict[str, list[str]]:
    """Return the keys that differ between the recipes; of those that always change together the first."""
    rows = []
    for model in models:
        flat: dict[str, Any] = {}
        for section, content in model.target.recipe.model_dump(mode="json").items():
            if section in WHOLE or not isinstance(content, dict):
                flat[section] = content
            else:
                flat |= {f"{section}.{key}": v for key, v in content.items() if key not in CANNOT_DIFFER}
        rows.append({key: json.dumps(value, sort_keys=True) for key, value in flat.items()})
    axes: dict[str, list[str]] = {}
    seen = set()
    for key in dict.fromkeys(key for row in rows for key in row):
        column = [row.get(key, "") for row in rows]
        codes = tuple(column.index(value) for value in column)
        if key.partition(".")[0] not in WITHOUT_MEANING and len(set(codes)) > 1 and codes not in seen:
            seen.add(codes)
            axes[key] = column
    return axes


def _cells(row: Correlation) -> list[str]:
    chance = f"{row.information:.3f} ({row.information_chance:.3f})"
    information = "–" if math.isnan(row.information) else chance
    return [*map(str, (row.kendall, row.pearson, row.granulated)), information, str(row.num_models)]


def _strength(row: Correlation) -> float:
    return 0.0 if math.isnan(row.kendall.value) else -abs(row.kendall.value)
