"""Does a measure go with the robust gap over models? A table, JSON and scatter plots.

Hyper-parameters are what differs between the recipes of the models. Sections that choose a method (objective,
perturbation, ...) are one hyper-parameter each, elsewhere every key is one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wcitrain
from wcitrain import files
from wcitrain.commands.common import file_name
from wcitrain.commands.study import GAP, Measured
from wcitrain.measures.correlation import (
    MIN_RUNS,
    NUM_BOOTSTRAP,
    Correlation,
    Difference,
    compare,
    correlate,
    holm,
)

GOALS = {  # name: (part of the gap's measurement, None for its value)
    "robust gap (loss)": None,
    "robust gap (accuracy)": "accuracy_gap",
    "robust loss on test": "test_loss",
}
WHOLE = ["objective", "input_regularizer", "perturbation", "penalty", "augment", "mixing", "extra"]
WHOLE += ["label_noise", "schedule"]
WITHOUT_MEANING = ("name", "seed", "output", "evaluation", "measures", "checkpoint", "tracking")
CANNOT_DIFFER = ("num_threads", "device")
KEPT = ("value", "stderr", "num_examples", "settings")  # of a measurement
LEGEND = f"""\
Brackets: 95 % intervals over runs, from {MIN_RUNS} runs on (of r by the jackknife, else by the bootstrap). \
p: how often runs in another order reach as much, of information among runs of equal hyper-parameters; all \
are Holm's over the measures of the table. Ψ: Kendall's τ among models that differ in one hyper-parameter, \
averaged over hyper-parameters (granulated). information: conditional mutual information, the least over \
conditions on at most two hyper-parameters. Δ: |τ| minus that of the measure named, on the same draws of \
runs. –: not defined."""


def correlated(models: Sequence[Measured], folder: Path, seed: int = 0) -> tuple[str, list[Path]]:
    """Correlate every measure with ``GOALS``; return the tables, and the files written in ``folder``.

    The JSON has the values and seeds from which all of it can be computed again.
    """
    from wcitrain.report.figures import scatter_page  # matplotlib takes a second to import

    axes = hyper_parameters(models)
    runs = [str(model.target.home) for model in models]
    methods = [model.target.recipe.method for model in models]
    names = dict.fromkeys(name for model in models for name in model.measures if name != GAP)
    columns = {name: [model.value(name) for model in models] for name in names}
    columns = {name: column for name, column in columns.items() if sum(map(math.isfinite, column)) >= 3}
    goals = {goal: [model.value(GAP, part) for model in models] for goal, part in GOALS.items()}
    reference = "wci" if "wci" in columns else next(iter(columns), "")
    header = ["measure", "Kendall τ", "p", "Pearson r", "Ψ", "information", "p"]
    header += [f"Δ to {reference}", "p", "models"]
    differing = f"hyper-parameters that differ: {', '.join(axes) or 'none'}."
    lines = [f"{len(models)} models of {len(set(runs))} runs; {differing}"]
    lines += [f"Left out: {line}." for model in models for line in model.without_value()]
    correlations: dict[str, dict[str, Any]] = {}
    figures = {}
    for goal, gap in goals.items():
        rows = {name: correlate(column, gap, runs, axes, seed=seed) for name, column in columns.items()}
        rows = dict(sorted(rows.items(), key=lambda row: _strength(row[1])))
        differences = compare(columns, gap, runs, reference, seed=seed)
        chances = {
            "kendall_p": holm({name: row.kendall_p for name, row in rows.items()}),
            "information_p": holm({name: row.information_p for name, row in rows.items()}),
            "difference_p": holm({name: difference.p for name, difference in differences.items()}),
        }
        table = [header, ["---", *["---:"] * (len(header) - 1)]]
        correlations[goal] = {}
        for name, row in rows.items():
            adjusted = {key: ps[name] for key, ps in chances.items() if name in ps}
            difference = {"difference": asdict(differences[name])} if name in differences else {}
            correlations[goal][name] = asdict(row) | difference | {"holm": adjusted}
            table.append([name, *_cells(row, differences.get(name), adjusted)])
        lines += ["", f"### {goal}", "", *(f"| {' | '.join(row)} |" for row in table)]
        notes = {name: f"τ {row.kendall}" for name, row in rows.items()}
        figures[goal] = scatter_page({name: columns[name] for name in rows}, notes, gap, goal, methods)
    text = "\n".join([*lines, "", LEGEND])
    points = [
        {
            "run": run,
            "at": model.target.at,
            "epoch": model.target.epoch,
            "seed": model.target.recipe.seed,
            "method": method,
            "goals": {goal: column[i] for goal, column in goals.items()},
            "measures": {name: {k: one.get(k) for k in KEPT} for name, one in model.measures.items()},
        }
        for i, (run, method, model) in enumerate(zip(runs, methods, models, strict=True))
    ]
    document = {
        "version": wcitrain.__version__,
        "settings": {"seed": seed, "num_bootstrap": NUM_BOOTSTRAP, "reference": reference},
        "models": points,
        "axes": axes,
        "correlations": correlations,
    }
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


def _cells(row: Correlation, difference: Difference | None, holm: Mapping[str, float]) -> list[str]:
    p = {key: "–" if math.isnan(value) else f"{value:.3f}" for key, value in holm.items()}
    information = "–" if math.isnan(row.information) else f"{row.information:.3f}"
    versus = str(difference.kendall) if difference else "–"
    cells = [str(row.kendall), p["kendall_p"], str(row.pearson), str(row.granulated)]
    cells += [information, p["information_p"], versus, p.get("difference_p", "–")]
    return [*cells, str(row.num_models)]


def _strength(row: Correlation) -> float:
    return 0.0 if math.isnan(row.kendall.value) else -abs(row.kendall.value)
