"""Run folders in memory, grouped over seeds into the rows that tables and figures share."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain.recipe.reading import read_yaml

RUN_FOLDER = "a run folder: recipe.yaml, metrics.jsonl and, once finished, summary.json"
KINDS = ("clean", "robust")


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

    @property
    def train_seconds(self) -> float:
        """Wall-clock seconds of training, of an unfinished run so far."""
        known = number(self.summary, "train_seconds")
        return known if math.isfinite(known) else number(self.metrics[-1], "train_seconds")

    def measured(self, at: str) -> dict[str, float]:
        """Return its numbers at the last or best epoch: of test images once finished, else of validation."""
        if self.is_finished:
            entry = self.summary.get(at) or {}
            numbers = {k: number(entry, "test", f"{k}_accuracy") for k in KINDS}
            for i, end in enumerate(("low", "high")):
                numbers |= {f"{k}/{end}": number(entry, "test", f"{k}_accuracy_interval", i) for k in KINDS}
            numbers |= {"robust train": number(entry, "train", "robust_accuracy")}
            numbers |= {"wci": number(entry, "wci"), "wci_stderr": number(entry, "wci_stderr")}
        else:
            evaluated = [m for m in self.metrics if math.isfinite(number(m, "val/robust_accuracy"))]
            entry = evaluated[-1] if evaluated else {}
            if evaluated and at == "best":
                entry = max(evaluated, key=lambda m: m["val/robust_accuracy"])
            numbers = {k: number(entry, f"val/{k}_accuracy") for k in KINDS}
            numbers |= {"robust train": number(entry, "train/robust_accuracy")}
            numbers |= {"wci": number(entry, "wci/total"), "wci_stderr": number(entry, "wci/total_stderr")}
        ends = {
            f"wci/{end}": numbers["wci"] + s * numbers["wci_stderr"] for end, s in (("low", -1), ("high", 1))
        }
        return numbers | ends | {"gap": number(entry, "robust_gap"), "epoch": number(entry, "epoch")}


def look_up(source: Any, *keys: str | int) -> Any:
    """Return ``source[key][key]...``; None where it is absent."""
    for key in keys:
        try:
            source = source[key]
        except (KeyError, IndexError, TypeError):
            return None
    return source


def number(source: Any, *keys: str | int) -> float:
    """Return ``source[key][key]...`` as a float; NaN where it is absent or no number."""
    value = look_up(source, *keys)
    return float(value) if isinstance(value, int | float) else math.nan


def load_run(folder: str | Path) -> Run:
    """Read one run folder; without a summary the recipe names group and seed, and the group the method.

    A last line of ``metrics.jsonl`` that is not whole is left out with a warning: the run may be writing it.

    Raises:
        ValueError: The folder, its metrics or its recipe is missing, empty or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        text = f"got a path that is not a folder; expected {RUN_FOLDER}. Check the spelling."
        raise ValueError(f"{folder}: {text}")
    if missing := [file for file in ("metrics.jsonl", "recipe.yaml") if not (folder / file).is_file()]:
        text = f"got a folder without {missing[0]}; expected {RUN_FOLDER}. Pass one run's folder."
        raise ValueError(f"{folder}: {text}")
    metrics = _read_metrics(folder / "metrics.jsonl")
    path = folder / "recipe.yaml"
    try:
        recipe = read_yaml(path.read_text("utf-8"))
    except ValueError as error:
        text = f"{path}: got {error}; expected YAML. Restore the file from a checkpoint."
        raise ValueError(text) from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: got {recipe!r}; expected a mapping. Restore the resolved recipe.")
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        text = f"{path}: got {error}; expected one JSON object. Delete it to report the run as unfinished."
        raise ValueError(text) from error
    name = str(summary.get("name") or folder.name)
    seed = int(summary.get("seed") or recipe.get("seed") or 0)
    group = str(summary.get("group") or recipe.get("name") or name)
    return Run(folder, name, group, seed, str(summary.get("method") or group), metrics, summary, recipe)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return one dict a line, in the order of the epochs."""
    lines = [(i, line) for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip()]
    metrics = []
    for i, line in lines:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or "epoch" not in entry:
                raise ValueError("no object with an epoch")
            metrics.append(entry)
        except ValueError as error:  # includes json.JSONDecodeError
            if i != lines[-1][0]:
                text = f"got {line[:60]!r} ({error}); expected one JSON object with its epoch."
                raise ValueError(f"{path}:{i}: {text} Repair or remove the line.") from error
            text = "the last line is not whole and is left out (is it being written?)"
            warnings.warn(f"{path}:{i}: {text}", stacklevel=3)
    if not metrics:
        text = "got no whole line; expected one JSON object an epoch. Wait for the first epoch."
        raise ValueError(f"{path}: {text}")
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

    def values(self, kind: str, at: str = "last") -> list[float]:
        """Return the runs' finite numbers ("clean", "robust", "gap", "wci") at the last or best epoch."""
        return [v for v in (run.measured(at)[kind] for run in self.runs) if math.isfinite(v)]

    def bounds(self, kind: str, at: str = "last") -> tuple[float, float]:
        """Return min and max of the values, of one run its interval (95 %, of the index ± error) if known."""
        values, first = self.values(kind, at), self.runs[0].measured(at)
        low, high = first.get(f"{kind}/low", math.nan), first.get(f"{kind}/high", math.nan)
        is_interval = len(self.runs) == 1 and math.isfinite(low + high)
        return (low, high) if is_interval else (min(values), max(values))


def group_rows(runs: Sequence[Run]) -> list[Row]:
    """Group the runs, groups in the order in which they are first met."""
    if not runs:
        text = "got no runs; expected at least one. Pass the folders of the runs to compare."
        raise ValueError(f"report: {text}")
    folders = [run.folder.resolve() for run in runs]
    if twice := [str(run.folder) for i, run in enumerate(runs) if folders[i] in folders[:i]]:
        text = f"got {', '.join(twice)} more than once; expected each run once. Leave the repeats out."
        raise ValueError(f"report: {text}")
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
