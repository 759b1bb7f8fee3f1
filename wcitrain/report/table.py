"""The results table: methods as rows, mean and range over seeds as cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from wcitrain.report.runs import MISSING, Row, Run, group_rows, measured, number


def results_table(runs: Sequence[Run], *, at: str = "last") -> str:
    """Return a GitHub-markdown table with one row a group, and a paragraph that says how to read it.

    Several seeds: mean (min to max). One run: the value, with its 95 % interval on test accuracies.

    Args:
        runs: At least one; rows keep the order in which the groups are first met.
        at: ``"last"`` or ``"best"``, the epoch of every column but the last, which is always the best epoch's.

    Raises:
        ValueError: No runs, or an unknown ``at``.
    """
    if at not in ("last", "best"):
        raise ValueError(f'results_table: got at={at!r}; expected "last" or "best". Choose the epoch to report.')
    rows = group_rows(runs)
    plain = [row.runs for row in rows if row.is_finished and row.runs[0].method == "AT"]
    # Two plain-AT groups (two models, say) leave no single reference.
    seconds = [number(run.summary, "train_seconds") for run in plain[0]] if len(plain) == 1 else [math.nan]
    reference = sum(seconds) / len(seconds)

    header = ("method", "seeds", "clean test", "robust test", "robust train", "gap", "WCI", "cost", "best (epoch)")
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *(_table_row(row, at, reference) for row in rows)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    epoch = {"last": "the last epoch", "best": "the epoch with the best robust validation accuracy"}[at]
    attack = attacks(rows)
    return f"""{table}

Accuracies in percent at {epoch}{"; attack: " * bool(attack)}{attack}.
Several seeds: mean (min to max); one run: value [95 % interval]; {MISSING}: not measured.
gap: robust train minus robust test accuracy, in points. best: robust test accuracy at the epoch that is best by robust
validation accuracy.
cost: training time as a multiple of AT's in this table. (val): an unfinished run, measured on validation data.
"""


def attacks(rows: Sequence[Row]) -> str:
    """Return the attack behind the robust accuracies; all of them, if runs that are compared differ."""
    summaries = [run.summary or {} for row in rows for run in row.runs]
    return " / ".join(sorted({str(summary["attack"]) for summary in summaries if summary.get("attack")}))


def _table_row(row: Row, at: str, reference: float) -> tuple[str, ...]:
    """Return the cells of one row; ``reference`` is the training time of plain AT in seconds."""
    now, best = [measured(run, at) for run in row.runs], [measured(run, "best") for run in row.runs]
    val = "" if row.is_finished else " (val)"

    def accuracy(kind: str) -> str:
        low, high = now[0].get(f"{kind}/low", math.nan), now[0].get(f"{kind}/high", math.nan)
        has_interval = len(now) == 1 and math.isfinite(low) and math.isfinite(high)
        return _cell([n[kind] for n in now], _percent, val) + has_interval * f" [{_percent(low)}, {_percent(high)}]"

    wci = _cell([n["wci"] for n in now], _three_digits)
    if len(now) == 1 and wci != MISSING and math.isfinite(now[0]["wci_stderr"]):
        wci += f" ± {now[0]['wci_stderr']:.2g}"
    seconds = [number(run.summary, "train_seconds") if row.is_finished else math.nan for run in row.runs]
    epochs = sorted(int(n["epoch"]) for n in best if math.isfinite(n["epoch"]))
    when = f", epoch {epochs[0]}" if epochs else ""
    if epochs and epochs[-1] > epochs[0]:
        when = f", epochs {epochs[0]} to {epochs[-1]}"
    return (
        row.label,
        str(len(row.runs)),
        accuracy("clean"),
        accuracy("robust"),
        _cell([n["train/robust_accuracy"] for n in now], _percent),
        _cell([n["gap"] for n in now], _percent, val),
        wci,
        _cell([s / reference for s in seconds], lambda value: f"{value:.2f}", "×"),
        _cell([n["robust"] for n in best], _percent, val) + when,
    )


def _cell(values: Sequence[float], text: Callable[[float], str], unit: str = "") -> str:
    """Return one value, or mean (min to max); runs without the value are counted, never hidden."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return MISSING
    cell = text(sum(finite) / len(finite)) + unit
    if len(finite) > 1:
        cell += f" ({text(min(finite))} to {text(max(finite))})"
    return cell if len(finite) == len(values) else f"{cell}, {len(finite)} of {len(values)} runs"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")
