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
        at: ``"last"`` or ``"best"``, the epoch of all columns but the last, which is the best epoch's.

    Raises:
        ValueError: No runs, or an unknown ``at``.
    """
    if at not in ("last", "best"):
        raise ValueError(
            f'results_table: got at={at!r}; expected "last" or "best". Choose the epoch to report.'
        )
    rows = group_rows(runs)
    header, *body = table_cells(rows, at)
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *body]
    table = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    return "\n".join([table, "", *how_to_read(rows, at), ""])


def table_cells(rows: Sequence[Row], at: str) -> list[tuple[str, ...]]:
    """Return the header and a line of cells for each row."""
    plain = [row.runs for row in rows if row.is_finished and row.runs[0].method == "AT"]
    # Two plain-AT groups (two models, say) leave no single reference.
    seconds = [number(run.summary, "train_seconds") for run in plain[0]] if len(plain) == 1 else [math.nan]
    reference = sum(seconds) / len(seconds) or math.nan
    header = (
        "method",
        "seeds",
        "clean test",
        "robust test",
        "robust train",
        "gap",
        "WCI",
        "cost",
        "best (epoch)",
    )
    return [header, *(_table_row(row, at, reference) for row in rows)]


def how_to_read(rows: Sequence[Row], at: str) -> tuple[str, ...]:
    """Return the sentences below the table."""
    epoch = {"last": "the last epoch", "best": "the epoch with the best robust validation accuracy"}[at]
    attack = attacks(rows)
    return (
        f"Accuracies in percent at {epoch}{'; attack: ' * bool(attack)}{attack}.",
        f"Several seeds: mean (min to max); one run: value [95 % interval]; {MISSING}: not measured.",
        "gap: robust train minus robust test accuracy, in points. best: robust test accuracy at the epoch "
        "that is best by robust validation accuracy.",
        "cost: training time as a multiple of AT's in this table. (val): an unfinished run, measured on "
        "validation data.",
    )


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
        return (
            cell([n[kind] for n in now], percent, val) + has_interval * f" [{percent(low)}, {percent(high)}]"
        )

    wci = cell([n["wci"] for n in now], three_digits)
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
        cell([n["train/robust_accuracy"] for n in now], percent),
        cell([n["gap"] for n in now], percent, val),
        wci,
        cell([s / reference for s in seconds], lambda value: f"{value:.2f}", "×"),
        cell([n["robust"] for n in best], percent, val) + when,
    )


def cell(values: Sequence[float], text: Callable[[float], str], unit: str = "") -> str:
    """Return one value, or mean (min to max); runs without the value are counted, never hidden."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return MISSING
    result = text(sum(finite) / len(finite)) + unit
    if len(finite) > 1:
        result += f" ({text(min(finite))} to {text(max(finite))})"
    return result if len(finite) == len(values) else f"{result}, {len(finite)} of {len(values)} runs"


def percent(fraction: float) -> str:
    """Return a share as percent without the sign: 45.2."""
    return f"{100 * fraction:.1f}"


def three_digits(value: float) -> str:
    """Return three significant digits: 3.30."""
    return f"{value:#.3g}".rstrip(".")
