"""The head of the page, what was run and what it says, and the table of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from wcitrain.report.markup import Markup, element, join, table
from wcitrain.report.results import row_bounds, row_values, train_seconds
from wcitrain.report.runs import MISSING, Row, Run, measured, number
from wcitrain.report.settings import task_differences
from wcitrain.report.table import attacks, cell, percent
from wcitrain.report.words import count, duration, few


def facts(rows: Sequence[Row]) -> Markup:
    """Return the boxes on top: runs, best accuracies, model, time, device."""
    runs = [run for row in rows for run in row.runs]
    summaries = [run.summary or {} for run in runs]
    groups, seeds = {run.group for run in runs}, sorted({run.seed for run in runs})
    open_, early = sum(not run.is_finished for run in runs), sum(bool(_stopped(run)) for run in runs)
    notes = [count(len(groups), "method"), f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"]
    notes += [f"{open_} unfinished"] * bool(open_) + [f"{early} stopped early"] * bool(early)
    boxes = [("Runs", str(len(runs)), ", ".join(notes))]
    if not task_differences(runs):
        for kind in ("robust", "clean"):
            if top := _top(rows, kind):
                row, values, (low, high) = top
                title = f"{'Highest ' * (len(rows) > 1)}{kind} test accuracy".capitalize()
                spread = f"{percent(low)} to {percent(high)} %" + ", 95 % interval" * (len(values) == 1)
                boxes.append(
                    (title, f"{percent(sum(values) / len(values))} %", f"{row.label}, last epoch; {spread}")
                )
    models = sorted({str(_section(run, "model").get("name", MISSING)) for run in runs})
    sizes = sorted({int(s["num_parameters"]) for s in summaries if s.get("num_parameters")})
    sizes_text = (
        " to ".join(f"{size:,}" for size in {sizes[0]: 0, sizes[-1]: 0}) + " parameters" if sizes else ""
    )
    boxes.append(("Model" if len(models) == 1 else "Models", few(models), sizes_text))
    sources = sorted({_data_text(run) for run in runs})
    boxes.append(("Data", few(sources), f"attack: {attacks(rows)}" if attacks(rows) else ""))
    seconds = [train_seconds(run) for run in runs if math.isfinite(train_seconds(run))]
    if seconds:
        spread = (
            f"{duration(min(seconds))} to {duration(max(seconds))} a run"
            if len(seconds) > 1
            else "wall-clock"
        )
        boxes.append(("Training time", duration(sum(seconds)), spread))
    devices = sorted({str(summary["device"]) for summary in summaries if summary.get("device")})
    versions = sorted({_versions(summary["versions"]) for summary in summaries if summary.get("versions")})
    if devices:
        boxes.append(("Device", few(devices), " / ".join(versions)))
    dates = sorted({_written(run)[:10] for run in runs})
    boxes.append(
        ("Last written", " to ".join(dict.fromkeys((dates[0], dates[-1]))), "date of the files, UTC")
    )
    entries = [
        element("div", join([element("dt", name), element("dd", join([value, element("small", note)]))]))
        for name, value, note in boxes
    ]
    return element("dl", join(entries), class_="facts") + Markup("\n")


def findings(rows: Sequence[Row]) -> Markup:
    """Return what the numbers say and what they do not, in words."""
    runs = [run for row in rows for run in row.runs]
    said = []
    differing = task_differences(runs)
    if differing:
        said.append(
            element(
                "p",
                "These runs differ in what is learnt or how it is tested, not only in the method: "
                f"{', '.join(differing)}. Their accuracies do not compare directly.",
                class_="warn",
            )
        )
    elif len([row for row in rows if row.is_finished]) > 1 and (top := _top(rows, "robust")):
        best, values, (low, high) = top
        others = [
            (row.label, row_bounds(row, "robust")) for row in rows if row.is_finished and row is not best
        ]
        near = [label for label, bounds in others if bounds and bounds[1] >= low]
        kind = "range over seeds" if len(values) > 1 else "95 % interval"
        text = (
            f"At the last epoch {best.label} has the highest robust test accuracy, "
            f"{cell(values, percent, ' %')}"
        )
        one = f"; its {kind} is {percent(low)} to {percent(high)} %."
        text += one if len(values) == 1 else f", over {len(values)} seeds."
        if near:
            text += (
                f" The {kind if len(values) > 1 else 'interval or range'} of {few(near, 4)} overlaps with "
                "its own: "
            )
            text += "these runs do not tell them apart."
        elif others:
            text += " No other method's range or interval reaches its own."
        said.append(element("p", text))
    unfinished = [run.name for run in runs if not run.is_finished]
    if unfinished:
        said.append(
            element(
                "p",
                f"Unfinished: {few(unfinished, 8)}. Unfinished runs show validation accuracies and are never "
                "averaged with finished ones.",
                class_="warn",
            )
        )
    return join(said, "\n")


def runs_table(runs: Sequence[Run]) -> Markup:
    """Return one line a run: state, epochs, accuracies, time."""
    accuracies = ("clean test", "robust test", "best robust")
    header = ("run", "method", "seed", "state", "epochs", *accuracies, "training", "written")
    lines = []
    for run in runs:
        now, best = measured(run, "last"), measured(run, "best")
        planned = number(run.recipe, "train", "epochs")
        done = f"{run.metrics[-1]['epoch']}" + (f" of {planned:g}" if math.isfinite(planned) else "")
        values = [
            cell([n], percent, "" if run.is_finished else " (val)") for n in (now["clean"], now["robust"])
        ]
        best_text = cell([best["robust"]], percent, "" if run.is_finished else " (val)")
        best_text += f", epoch {best['epoch']:.0f}" if math.isfinite(best["epoch"]) else ""
        state = element("td", _state(run))
        lines.append(
            (
                run.name,
                run.method,
                str(run.seed),
                state,
                done,
                *values,
                best_text,
                duration(train_seconds(run)),
                _written(run),
            )
        )
    return table("Every run; accuracies in percent at the last epoch", header, lines)


def _state(run: Run) -> Markup:
    if not run.is_finished:
        return element("span", "unfinished", class_="badge open")
    if reason := _stopped(run):
        return join([element("span", "stopped early", class_="badge open"), element("small", reason)], " ")
    return element("span", "finished", class_="badge done")


def _top(rows: Sequence[Row], kind: str) -> tuple[Row, list[float], tuple[float, float]] | None:
    """Return the finished row with the highest mean, its values and their bounds; None without one."""

    def mean(row: Row) -> float:
        return sum(row_values(row, kind)) / len(row_values(row, kind))

    known = [row for row in rows if row.is_finished and row_values(row, kind)]
    if not known:
        return None
    row = max(known, key=mean)
    return row, row_values(row, kind), row_bounds(row, kind) or (math.nan, math.nan)


def _stopped(run: Run) -> str:
    return str((run.summary or {}).get("stopped_early") or "")


def _versions(versions: Any) -> str:
    if not isinstance(versions, dict):
        return str(versions)
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _written(run: Run) -> str:
    """Return when the metrics were last written, UTC."""
    return datetime.fromtimestamp((run.folder / "metrics.jsonl").stat().st_mtime, UTC).strftime(
        "%Y-%m-%d %H:%M"
    )


def _section(run: Run, key: str) -> dict[str, Any]:
    section = run.recipe.get(key)
    return section if isinstance(section, dict) else {}


def _data_text(run: Run) -> str:
    data = _section(run, "data")
    name = data.get("name") or (
        str(data.get("root")).rstrip("/").rpartition("/")[2] if data.get("root") else ""
    )
    return f"{data.get('source', MISSING)}{f' {name}' if name else ''}"
