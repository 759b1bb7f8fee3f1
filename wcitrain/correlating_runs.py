"""``wcitrain measure --correlate``: does a measure go with the robust gap over runs?

The answer is a table, JSON and scatter plots. The models are those of ``measuring_many``; hyper-parameters
are what differs between the recipes of their runs. Sections that choose a method (objective, perturbation,
...) are one hyper-parameter each, elsewhere every key is one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wcitrain.measures.correlation import Correlation, correlate
from wcitrain.measuring_many import GAP, MeasuredModel
from wcitrain.recipe.reading import read_yaml

TARGETS = {  # name: (part of the gap's measurement, None for its value)
    "robust gap (loss)": None,
    "robust gap (accuracy)": "accuracy_gap",
    "robust loss on test": "test_loss",
}
WHOLE = (
    "objective",
    "input_regularizer",
    "perturbation",
    "penalty",
    "augment",
    "mixing",
    "extra",
    "label_noise",
    "schedule",
)
WITHOUT_MEANING = ("name", "seed", "output", "evaluation", "measures", "checkpoint", "tracking")
CANNOT_DIFFER = ("num_threads", "device")


@dataclass(frozen=True)
class Study:
    """Correlations by target and measure, the hyper-parameters they are conditioned on, and the models."""

    models: Sequence[MeasuredModel]
    axes: Mapping[str, Sequence[Any]]
    correlations: Mapping[str, Mapping[str, Correlation]]

    def text(self) -> str:
        """Return a markdown table for each target, the strongest rank correlation first."""
        first = next(iter(next(iter(self.correlations.values())).values()))
        lines = [
            f"{first.num_models} models of {first.num_runs} runs; hyper-parameters that differ: "
            f"{', '.join(self.axes) or 'none'}."
        ]
        for target, rows in self.correlations.items():
            lines += ["", f"### {target}", "", *_table(rows)]
        lines += [
            "",
            "Brackets: 95 % bootstrap intervals over runs. Ψ: Kendall's τ among models that differ in one "
            "hyper-parameter, averaged over hyper-parameters (granulated). within: τ among the epochs of a "
            "run. information: conditional mutual information, the least over conditions on at most two "
            "hyper-parameters; in brackets what a shuffled measure reaches one time in twenty. –: not "
            "defined.",
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a number that is not finite becomes None."""
        return {
            "models": [{"run": str(m.run or m.target), "at": m.at, "epoch": m.epoch} for m in self.models],
            "axes": {name: list(map(str, values)) for name, values in self.axes.items()},
            "correlations": {
                target: {name: _finite(asdict(row)) for name, row in rows.items()}
                for target, rows in self.correlations.items()
            },
        }


def study(models: Sequence[MeasuredModel], *, num_bootstrap: int = 1000, seed: int = 0) -> Study:
    """Correlate every measure of the models with ``TARGETS``.

    Args:
        models: With ``robust_gap`` among their measures; at least three.
        num_bootstrap, seed: See ``correlate``.

    Raises:
        ValueError: Fewer than three models, or models without the gap.
    """
    without = [str(m.path) for m in models if GAP not in m.measures]
    if len(models) < 3 or without:
        raise ValueError(
            f"correlate: got {len(models)} models, {len(without)} of them without {GAP}; expected at least "
            f"three with it. Name more runs, and {GAP} among the measures."
        )
    runs = [str(m.run or m.target) for m in models]
    axes = _axes([_hyper_parameters(m) for m in models])
    names = [name for name in dict.fromkeys(name for m in models for name in m.measures) if name != GAP]
    correlations: dict[str, dict[str, Correlation]] = {}
    for target, part in TARGETS.items():
        goal = [m.value(GAP, part) for m in models]
        rows = {}
        for name in names:
            values = [m.value(name) for m in models]
            if sum(math.isfinite(v) for v in values) >= 3:
                rows[name] = correlate(values, goal, runs, axes, num_bootstrap=num_bootstrap, seed=seed)
        correlations[target] = dict(sorted(rows.items(), key=lambda row: -_strength(row[1])))
    return Study(models, axes, correlations)


def write_study(found: Study, folder: Path) -> tuple[Path, ...]:
    """Write ``correlation.{md,json}`` and scatter plots for each target, in place of those that are there."""
    from wcitrain.report.scatter import scatter_page  # matplotlib takes a second to import

    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "correlation.md", folder / "correlation.json"]
    written[0].write_text(found.text() + "\n", "utf-8")
    written[1].write_text(json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n", "utf-8")
    groups = [_label(m) for m in found.models]
    for target, part in TARGETS.items():
        path = folder / f"scatter-{target.replace(' ', '-').replace('(', '').replace(')', '')}.png"
        rows = found.correlations[target]
        panels = {name: [m.value(name) for m in found.models] for name in rows}
        notes = {name: f"τ {row.kendall}" for name, row in rows.items()}
        figure = scatter_page(panels, notes, [m.value(GAP, part) for m in found.models], target, groups)
        if figure is not None:
            figure.savefig(path)
            written.append(path)
    return tuple(written)


def _label(model: MeasuredModel) -> str:
    """Return the method of a model's run, or its folder's name."""
    try:
        return str(json.loads((Path(model.run or model.target) / "summary.json").read_text())["method"])
    except (OSError, ValueError, KeyError):
        return Path(model.run or model.target).name


def _hyper_parameters(model: MeasuredModel) -> dict[str, str]:
    """Return what a run's recipe says, as comparable texts by key."""
    path = Path(model.run) / "recipe.yaml" if model.run else None
    if path is None or not path.is_file():
        return {}
    found: dict[str, str] = {}
    for section, content in read_yaml(path.read_text("utf-8")).items():
        if section in WITHOUT_MEANING:
            continue
        if section in WHOLE or not isinstance(content, dict):
            found[section] = json.dumps(content, sort_keys=True)
        else:
            found |= {
                f"{section}.{k}": json.dumps(v, sort_keys=True)
                for k, v in content.items()
                if k not in CANNOT_DIFFER
            }
    return found


def _axes(rows: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the keys that differ; of keys that always change together the first stands for all."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    axes: dict[str, list[str]] = {}
    seen = set()
    for key in keys:
        column = [row.get(key, "") for row in rows]
        codes = tuple(column.index(value) for value in column)
        if len(set(codes)) > 1 and codes not in seen:
            seen.add(codes)
            axes[key] = column
    return axes


def _table(rows: Mapping[str, Correlation]) -> list[str]:
    header = ["measure", "Kendall τ", "Spearman ρ", "Pearson r", "Ψ", "within", "information", "models"]
    lines = ["| " + " | ".join(header) + " |", "| --- | " + " | ".join(["---:"] * (len(header) - 1)) + " |"]
    for name, row in rows.items():
        information = (
            "–" if math.isnan(row.information) else f"{row.information:.3f} ({row.information_chance:.3f})"
        )
        cells = [
            name,
            row.kendall,
            row.spearman,
            row.pearson,
            row.granulated,
            row.within,
            information,
            row.num_models,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _strength(row: Correlation) -> float:
    return 0.0 if math.isnan(row.kendall.value) else abs(row.kendall.value)


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
