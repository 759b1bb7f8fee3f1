"""Run folders in memory, grouped over seeds into the rows that figures and the results table share."""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain import files
from wcitrain.evaluation.results import percent
from wcitrain.recipe.reading import read_yaml

RUN_FOLDER = "a run folder: recipe.yaml, metrics.jsonl and, once finished, summary.json"
MISSING = "–"
HEADER = ["method", "seeds", "clean test", "robust test", "robust train", "gap", "WCI", "best (epoch)"]
SHARES = ("clean", "robust")
NAMES = ("name", "seed", "output")  # they tell runs apart and are no settings of the method


@dataclass(frozen=True)
class Run:
    """One run folder in memory; ``summary`` is empty as long as the run has not written one."""

    folder: Path
    name: str
    group: str  # the name without its seed
    seed: int
    method: str  # a label such as "AT" or "WCI r=1"
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end and wrote its test accuracies."""
        return self.summary.get("status") == "finished"

    def measured(self, at: str = "last") -> dict[str, float]:
        """Return its numbers at the last or best epoch: of test images once finished, else of validation."""
        entry: Any = self.summary.get(at) or {}
        if not self.is_finished:
            evaluated = [m for m in self.metrics if math.isfinite(number(m, "val/robust_accuracy"))] or [{}]
            is_best = at == "best" and evaluated[0]
            m = max(evaluated, key=lambda m: m["val/robust_accuracy"]) if is_best else evaluated[-1]
            entry = m | {"test": {f"{kind}_accuracy": m.get(f"val/{kind}_accuracy") for kind in SHARES}}
            entry |= {"train": {"robust_accuracy": m.get("train/robust_accuracy")}}
            entry |= {"wci": m.get("wci/total"), "wci_stderr": m.get("wci/total_stderr")}
        wci, error = number(entry, "wci"), number(entry, "wci_stderr")
        numbers = {"wci": wci, "wci_stderr": error, "wci/low": wci - error, "wci/high": wci + error}
        for kind in SHARES:
            numbers[kind] = number(entry, "test", f"{kind}_accuracy")
            for i, end in enumerate(("low", "high")):
                numbers[f"{kind}/{end}"] = number(entry, "test", f"{kind}_accuracy_interval", i)
        numbers |= {"robust train": number(entry, "train", "robust_accuracy")}
        return numbers | {"gap": number(entry, "robust_gap"), "epoch": number(entry, "epoch")}


def number(source: Any, *keys: str | int) -> float:
    """Return ``source[key][key]...`` as a float; NaN where it is absent or no number."""
    for key in keys:
        try:
            source = source[key]
        except (KeyError, IndexError, TypeError):
            return math.nan
    return float(source) if isinstance(source, int | float) else math.nan


def load_run(folder: str | Path) -> Run:
    """Read one run folder; without a summary the recipe names group and seed, and the group the method.

    A last line of ``metrics.jsonl`` that is not whole is left out with a warning: the run may be writing it.

    Raises:
        ValueError: The folder, its metrics or its recipe is missing, empty or damaged.
    """
    folder = Path(folder)
    if missing := [file for file in ("recipe.yaml", "metrics.jsonl") if not (folder / file).is_file()]:
        raise ValueError(f"{folder}: got no {missing[0]}; expected {RUN_FOLDER}. Check the path.")
    try:
        recipe = read_yaml((folder / "recipe.yaml").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'recipe.yaml'}: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{folder / 'recipe.yaml'}: got {recipe!r}; expected a mapping. Restore the recipe.")
    path = folder / "summary.json"
    summary = files.read_json(path) if path.is_file() else {}
    name = str(summary.get("name") or folder.name)
    seed = int(summary.get("seed") or recipe.get("seed") or 0)
    group = str(summary.get("group") or recipe.get("name") or name)
    method, metrics = str(summary.get("method") or group), _read_metrics(folder / "metrics.jsonl")
    return Run(folder, name, group, seed, method, metrics, summary, recipe)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return one dict a line, in the order of the epochs."""
    lines = [(i, line) for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip()]
    metrics = []
    for i, line in lines:
        try:
            entry = json.loads(line)
            metrics.append(entry | {"epoch": entry["epoch"]})
        except (ValueError, TypeError, KeyError) as error:
            if i != lines[-1][0]:
                text = f"got {line[:60]!r}; expected one JSON object with its epoch. Repair or remove it."
                raise ValueError(f"{path}:{i}: {text}") from error
            text = "the last line is not whole and is left out (is it being written?)"
            warnings.warn(f"{path}:{i}: {text}", stacklevel=3)
    if not metrics:
        raise ValueError(f"{path}: got no whole line; expected one an epoch. Wait for the first epoch.")
    return sorted(metrics, key=lambda entry: entry["epoch"])


@dataclass(frozen=True)
class Row:
    """What shares a table row and a curve: the finished runs of one group, or one unfinished run."""

    label: str
    runs: list[Run]
    index: int  # of the group and its look, so that they stay the same in every figure

    @property
    def is_finished(self) -> bool:
        """Whether the row has test accuracies."""
        return self.runs[0].is_finished

    def values(self, kind: str) -> list[float]:
        """Return the runs' finite numbers ("clean", "robust", "gap", "wci") at the last epoch."""
        return [v for v in (run.measured()[kind] for run in self.runs) if math.isfinite(v)]

    def bounds(self, kind: str) -> tuple[float, float]:
        """Return min and max of the values, of one run its interval (95 %, of the index ± error) if known."""
        values, first = self.values(kind), self.runs[0].measured()
        low, high = first.get(f"{kind}/low", math.nan), first.get(f"{kind}/high", math.nan)
        is_interval = len(self.runs) == 1 and math.isfinite(low + high)
        return (low, high) if is_interval else (min(values), max(values))


def group_rows(runs: Sequence[Run]) -> list[Row]:
    """Group the runs, groups in the order in which they are first met; ValueError for none or one twice."""
    folders = [run.folder.resolve() for run in runs]
    if not runs or len(set(folders)) < len(folders):
        twice = [str(run.folder) for i, run in enumerate(runs) if folders[i] in folders[:i]]
        got = f"{', '.join(twice)} more than once" if runs else "no runs"
        raise ValueError(f"report: got {got}; expected each run once, and at least one.")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    methods = {name: next((r.method for r in members if r.summary), name) for name, members in groups.items()}
    rows = []
    for i, (group, members) in enumerate(groups.items()):
        label = methods[group]
        if list(methods.values()).count(label) > 1:
            label = f"{label} ({group})"
        finished = [run for run in members if run.is_finished]
        if len({run.seed for run in finished}) < len(finished):
            warnings.warn(f"group {group!r} holds a seed twice: its runs are not independent", stacklevel=3)
        if finished:
            rows.append(Row(label, finished, i))
        for run in members:
            if not run.is_finished:
                name = label if len(members) == 1 else f"{label}, seed {run.seed}"
                rows.append(Row(f"{name} (unfinished, epoch {run.metrics[-1]['epoch']})", [run], i))
    return rows


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Return the settings that are not equal in all runs, and each run's value, None where it has none.

    By dotted keys such as ``train.epochs``, without ``NAMES``, those of one section together.
    """
    recipes = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in NAMES)
    sections = list(dict.fromkeys(key.split(".")[0] for key in keys))
    keys = dict.fromkeys(sorted(keys, key=lambda key: sections.index(key.split(".")[0])))
    values = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: column for key, column in values.items() if len(set(column)) > 1}


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    result: dict[str, str] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return result


# ---- the results table: methods as rows, mean and range over seeds as cells --------------------------------


def results_table(runs: Sequence[Run]) -> str:
    """Return a GitHub-markdown table with one row a group, and a paragraph that says how to read it."""
    rows = group_rows(runs)
    header, *lines = table_lines(rows)
    lines = [header, ["---", *["---:"] * (len(HEADER) - 1)], *lines]
    table = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
    return "\n".join([*table, "", *how_to_read(rows), ""])


def how_to_read(rows: Sequence[Row]) -> list[str]:
    """Return the sentences below the table; all attacks behind its robust accuracies are named."""
    bounds = [row.bounds("robust") for row in rows if row.is_finished and row.values("robust")]
    # Ranges (95 % intervals) overlap pairwise exactly if the highest lower end is below every upper end.
    is_alike = len(bounds) > 1 and max(low for low, _ in bounds) <= min(high for _, high in bounds)
    attacks = {str(run.summary["attack"]) for row in rows for run in row.runs if run.summary.get("attack")}
    return [
        *["Robust test accuracy does not tell these methods apart: their ranges overlap."] * is_alike,
        f"Accuracies in percent at the last epoch; attack: {' / '.join(sorted(attacks)) or 'unknown'}.",
        "Several seeds: mean (min to max), no 95 % interval: of n seeds the range holds the median of all "
        "with probability 1 − 2^(1−n), 75 % for three. One run: value [95 % interval over images], index ± "
        f"standard error. {MISSING}: not measured.",
        "gap: robust train minus robust test accuracy, in points. best: robust test accuracy at the epoch "
        "that is best by robust validation accuracy.",
        "(val): an unfinished run, measured on validation data.",
    ]


def table_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Return the header and a line of cells for each row."""
    lines = [HEADER]
    for row in rows:
        now, best = [run.measured() for run in row.runs], [run.measured("best") for run in row.runs]
        val = "" if row.is_finished else " (val)"
        shares = []
        for kind in SHARES:
            ends = [now[0][f"{kind}/{end}"] for end in ("low", "high")] if len(now) == 1 else []
            shares.append(cell([n[kind] for n in now], percent, val, ends))
        wci = cell([n["wci"] for n in now], lambda value: f"{value:#.3g}".rstrip("."))
        if len(now) == 1 and math.isfinite(now[0]["wci"] + now[0]["wci_stderr"]):
            wci += f" ± {now[0]['wci_stderr']:.2g}"
        epochs = sorted({int(n["epoch"]) for n in best if math.isfinite(n["epoch"])})
        when = f", epoch {epochs[0]}" if epochs else ""
        when = f", epochs {epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else when
        robust = cell([n["robust"] for n in best], percent, val) + when
        train = cell([n["robust train"] for n in now], percent)
        gap = cell([n["gap"] for n in now], percent, val)
        lines.append([row.label, str(len(now)), *shares, train, gap, wci, robust])
    return lines


def cell(
    values: Sequence[float], text: Callable[[float], str], unit: str = "", ends: Sequence[float] = ()
) -> str:
    """Return one value and its interval, or mean (min to max); runs without it are counted, never hidden."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return MISSING
    result = text(sum(finite) / len(finite)) + unit
    if len(finite) > 1:
        result += f" ({text(min(finite))} to {text(max(finite))})"
    elif ends and math.isfinite(sum(ends)):
        result += f" [{', '.join(map(text, ends))}]"
    return result if len(finite) == len(values) else f"{result}, {len(finite)} of {len(values)} runs"
