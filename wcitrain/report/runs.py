"""Run folders in memory, grouped over seeds into the rows that tables and figures share."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcitrain.recipe.reading import read_yaml

RUN_FOLDER = "a run folder: recipe.yaml, metrics.jsonl and, once finished, summary.json"
MISSING = "–"
KINDS = ("clean", "robust")
# Okabe and Ito's colour-blind safe palette, grey for its pale yellow; beyond eight groups the marker changes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Run:
    """One run folder in memory; ``summary`` is None as long as the run has not written one."""

    folder: Path
    name: str
    group: str  # the name without its seed
    seed: int
    method: str  # a label such as "AT" or "WCI r=1"
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    recipe: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end and wrote its test accuracies."""
        return self.summary is not None and self.summary.get("status") == "finished"


def load_run(folder: str | Path) -> Run:
    """Read one run folder.

    A last line of ``metrics.jsonl`` that is not whole is left out with a warning: the run may be writing it
    right now. Without a summary the folder names the run, its seed comes from the recipe, and the group name
    stands for the method.

    Raises:
        ValueError: The folder, its metrics or its recipe is missing, empty or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: got a path that is not a folder; expected {RUN_FOLDER}. Check the spelling."
        )
    for file in ("metrics.jsonl", "recipe.yaml"):
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder}: got a folder without {file}; expected {RUN_FOLDER}. Pass one run's folder."
            )
    metrics = _read_metrics(folder / "metrics.jsonl")
    try:
        recipe = read_yaml((folder / "recipe.yaml").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{folder / 'recipe.yaml'}: got {error}; expected YAML. Restore the file from a checkpoint."
        ) from error
    if not isinstance(recipe, dict):
        raise ValueError(
            f"{folder / 'recipe.yaml'}: got {recipe!r}; expected a mapping. Restore the resolved recipe."
        )
    summary = None
    if (folder / "summary.json").is_file():
        try:
            summary = json.loads((folder / "summary.json").read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{folder / 'summary.json'}: got {error}; expected one JSON object. "
                "Delete it to report the run as unfinished."
            ) from error
    known = summary or {}
    name = str(known.get("name") or folder.name)
    seed = int(known.get("seed") or recipe.get("seed") or 0)
    group = str(known.get("group") or recipe.get("name") or name)
    return Run(folder, name, group, seed, str(known.get("method") or group), metrics, summary, recipe)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return one dict a line, in the order of the epochs."""
    lines = [
        (i, line) for i, line in enumerate(path.read_text("utf-8").splitlines(), start=1) if line.strip()
    ]
    metrics = []
    for i, line in lines:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or "epoch" not in entry:
                raise ValueError("no object with an epoch")
            metrics.append(entry)
        except ValueError as error:  # includes json.JSONDecodeError
            if i != lines[-1][0]:
                raise ValueError(
                    f"{path}:{i}: got {line[:60]!r} ({error}); expected one JSON object with its epoch. "
                    "Repair or remove the line."
                ) from error
            warnings.warn(
                f"{path}:{i}: the last line is not whole and is left out (is it being written?)", stacklevel=3
            )
    if not metrics:
        raise ValueError(
            f"{path}: got no whole line; expected one JSON object an epoch. Wait for the first epoch."
        )
    return sorted(metrics, key=lambda entry: entry["epoch"])


@dataclass(frozen=True)
class Row:
    """What shares a table row and a curve: the finished runs of one group, or one unfinished run."""

    label: str
    runs: list[Run]
    colour: str  # of the group, so that it stays the same in every figure
    marker: str

    @property
    def is_finished(self) -> bool:
        """Whether the row has test accuracies."""
        return self.runs[0].is_finished


def group_rows(runs: Sequence[Run]) -> list[Row]:
    """Group the runs, groups in the order in which they are first met."""
    if not runs:
        raise ValueError(
            "report: got no runs; expected at least one. Pass the folders of the runs to compare."
        )
    folders = [run.folder.resolve() for run in runs]
    if twice := [str(run.folder) for i, run in enumerate(runs) if folders[i] in folders[:i]]:
        raise ValueError(
            f"report: got {', '.join(twice)} more than once; expected each run once. Leave the repeats out."
        )
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    methods = {
        group: next((r.method for r in members if r.summary), group) for group, members in groups.items()
    }
    rows = []
    for i, (group, members) in enumerate(groups.items()):
        label = methods[group]
        if list(methods.values()).count(label) > 1:
            label = f"{label} ({group})"
        style = (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)])
        finished = [run for run in members if run.is_finished]
        if len({run.seed for run in finished}) < len(finished):
            warnings.warn(
                f"group {group!r} holds a seed more than once: its runs are not independent", stacklevel=3
            )
        if finished:
            rows.append(Row(label, finished, *style))
        for run in members:
            if not run.is_finished:
                ident = label if len(members) == 1 else f"{label}, seed {run.seed}"
                rows.append(Row(f"{ident} (unfinished, epoch {run.metrics[-1]['epoch']})", [run], *style))
    return rows


def number(source: Any, *keys: str | int) -> float:
    """Return ``source[key][key]...`` as a float; NaN where it is absent, None or no number."""
    for key in keys:
        try:
            source = source[key]
        except (KeyError, IndexError, TypeError):
            return math.nan
    return float(source) if isinstance(source, int | float) else math.nan


def measured(run: Run, at: str) -> dict[str, float]:
    """Return a run's numbers at its last or best epoch: on test from the summary, else on validation."""
    if run.is_finished:
        assert run.summary is not None
        entry, split = run.summary.get(at) or {}, "test"
        numbers = {
            f"{s}/{k}_accuracy": number(entry, s, f"{k}_accuracy") for s in ("train", "test") for k in KINDS
        }
        for kind in KINDS:
            numbers[f"{kind}/low"] = number(entry, "test", f"{kind}_accuracy_interval", 0)
            numbers[f"{kind}/high"] = number(entry, "test", f"{kind}_accuracy_interval", 1)
        numbers |= {"wci": number(entry, "wci"), "wci_stderr": number(entry, "wci_stderr")}
    else:
        evaluated = [m for m in run.metrics if math.isfinite(number(m, "val/robust_accuracy"))]
        entry, split = {}, "val"
        if evaluated:
            entry = evaluated[-1] if at == "last" else max(evaluated, key=lambda m: m["val/robust_accuracy"])
        numbers = {
            key: number(entry, key) for key in (f"{s}/{k}_accuracy" for s in ("train", "val") for k in KINDS)
        }
        numbers |= {"wci": number(entry, "wci/total"), "wci_stderr": number(entry, "wci/total_stderr")}
    numbers |= {kind: numbers[f"{split}/{kind}_accuracy"] for kind in KINDS}
    return numbers | {"gap": number(entry, "robust_gap"), "epoch": number(entry, "epoch")}
