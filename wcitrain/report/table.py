"""The results table: methods as rows, mean and range over seeds as cells."""

import math
from collections.abc import Callable, Sequence

from wcitrain.report.runs import Row, Run, group_rows, number

MISSING = "–"
HEADER = ["method", "seeds", "clean test", "robust test", "robust train", "gap", "WCI", "cost"]
HEADER += ["best (epoch)"]
ALIKE = "Robust test accuracy does not tell these methods apart: their intervals overlap."


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
        text = f'got at={at!r}; expected "last" or "best". Choose the epoch to report.'
        raise ValueError(f"results_table: {text}")
    rows = group_rows(runs)
    lines = [tuple(HEADER), ("---", *["---:"] * (len(HEADER) - 1)), *table_cells(rows, at)]
    table = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
    return "\n".join([*table, "", *how_to_read(rows, at), ""])


def table_cells(rows: Sequence[Row], at: str) -> list[tuple[str, ...]]:
    """Return a line of cells for each row, as ``HEADER`` names them."""
    plain = [row.runs for row in rows if row.is_finished and row.runs[0].method == "AT"]
    # Two plain-AT groups (two models, say) leave no single reference.
    seconds = [number(run.summary, "train_seconds") for run in plain[0]] if len(plain) == 1 else [math.nan]
    reference = sum(seconds) / len(seconds) or math.nan
    return [_cells(row, at, reference) for row in rows]


def how_to_read(rows: Sequence[Row], at: str) -> tuple[str, ...]:
    """Return the sentences below the table."""
    epoch = {"last": "the last epoch", "best": "the epoch with the best robust validation accuracy"}[at]
    attack = attacks(rows)
    return (
        *alike(rows, at),
        f"Accuracies in percent at {epoch}{'; attack: ' * bool(attack)}{attack}.",
        f"Several seeds: mean (min to max); one run: value [95 % interval]; {MISSING}: not measured.",
        "gap: robust train minus robust test accuracy, in points. best: robust test accuracy at the epoch "
        "that is best by robust validation accuracy.",
        "cost: training time as a multiple of AT's in this table. (val): an unfinished run, measured on "
        "validation data.",
    )


def alike(rows: Sequence[Row], at: str) -> tuple[str, ...]:
    """Return a sentence if the ranges (of one run the 95 % intervals) of all methods overlap pairwise."""
    bounds = [row.bounds("robust", at) for row in rows if row.is_finished and row.values("robust", at)]
    # Intervals overlap pairwise exactly if the highest lower end is below every upper end.
    is_alike = len(bounds) > 1 and max(low for low, _ in bounds) <= min(high for _, high in bounds)
    return (ALIKE,) if is_alike else ()


def attacks(rows: Sequence[Row]) -> str:
    """Return the attack behind the robust accuracies; all of them, if runs that are compared differ."""
    return " / ".join(
        sorted({str(r.summary["attack"]) for w in rows for r in w.runs if r.summary.get("attack")})
    )


def _cells(row: Row, at: str, reference: float) -> tuple[str, ...]:
    """Return the cells of one row; ``reference`` is the training time of plain AT in seconds."""
    now, best = [run.measured(at) for run in row.runs], [run.measured("best") for run in row.runs]
    val = "" if row.is_finished else " (val)"

    def accuracy(kind: str) -> str:
        text = cell([n[kind] for n in now], percent, val)
        return text + interval(*(now[0].get(f"{kind}/{end}", math.nan) for end in ("low", "high"))) * (
            len(now) == 1
        )

    wci = cell([n["wci"] for n in now], three_digits)
    if len(now) == 1 and wci != MISSING and math.isfinite(now[0]["wci_stderr"]):
        wci += f" ± {now[0]['wci_stderr']:.2g}"
    seconds = [number(run.summary, "train_seconds") if row.is_finished else math.nan for run in row.runs]
    epochs = sorted(int(n["epoch"]) for n in best if math.isfinite(n["epoch"]))
    when = f", epoch {epochs[0]}" if epochs else ""
    if epochs and epochs[-1] > epochs[0]:
        when = f", epochs {epochs[0]} to {epochs[-1]}"
    train = cell([n["robust train"] for n in now], percent)
    gap = cell([n["gap"] for n in now], percent, val)
    cost = cell([s / reference for s in seconds], lambda value: f"{value:.2f}", "×")
    best_robust = cell([n["robust"] for n in best], percent, val) + when
    known = (accuracy("clean"), accuracy("robust"), train, gap, wci, cost, best_robust)
    return (row.label, str(len(now)), *known)


def cell(values: Sequence[float], text: Callable[[float], str], unit: str = "") -> str:
    """Return one value, or mean (min to max); runs without the value are counted, never hidden."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return MISSING
    result = text(sum(finite) / len(finite)) + unit
    if len(finite) > 1:
        result += f" ({text(min(finite))} to {text(max(finite))})"
    return result if len(finite) == len(values) else f"{result}, {len(finite)} of {len(values)} runs"


def interval(low: float, high: float) -> str:
    """Return " [48.0, 52.0]" for shares; nothing where the interval of a run is unknown."""
    return f" [{percent(low)}, {percent(high)}]" if math.isfinite(low + high) else ""


def percent(fraction: float) -> str:
    """Return a share as percent without the sign: 45.2."""
    return f"{100 * fraction:.1f}"


def three_digits(value: float) -> str:
    """Return three significant digits: 3.30."""
    return f"{value:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    """Return "42 s", "7 min 37 s" or "2 h 05 min"."""
    if not math.isfinite(seconds):
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.3g} s" if seconds < 10 else f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def few(names: Sequence[str], most: int = 3) -> str:
    """Return the names, or the first of them and the number of the others."""
    if len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
