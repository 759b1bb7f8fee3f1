"""The results and the cost of every row, as tables and dots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from wcitrain.report.charts import dot_chart
from wcitrain.report.markup import Markup, charts, element, folded, join, table
from wcitrain.report.runs import KINDS, MISSING, Row, Run, measured, number
from wcitrain.report.svg import Entry, Series
from wcitrain.report.table import cell, how_to_read, table_cells
from wcitrain.report.words import duration, memory

_COST = 7  # the place of the multiple of AT's time in a line of the results table


def results(rows: Sequence[Row], legend: Sequence[Entry], at: str) -> Markup:
    """Return the results table at ``at``, the other epoch's folded, and the accuracies as dots."""
    other = {"last": "best", "best": "last"}[at]
    words = {"last": "the last epoch", "best": "the epoch best by robust validation accuracy"}
    header, *body = table_cells(rows, at)
    parts = [table(f"Results at {words[at]}, accuracies in percent", header, body)]
    parts.append(element("ul", join(element("li", line) for line in how_to_read(rows, at)), class_="how"))
    header, *body = table_cells(rows, other)
    folded_table = table(f"Results at {words[other]}, accuracies in percent", header, body)
    parts.append(folded(f"The same at {words[other]}", folded_table))
    figures = []
    finished = [(i, row) for i, row in enumerate(rows) if row.is_finished]
    names = [row.label for _, row in finished]
    for kind in KINDS:
        dots = []
        for epoch in ("last", "best"):
            for place, (i, row) in enumerate(finished):
                values, (low, high) = (
                    row_values(row, kind, epoch),
                    row_bounds(row, kind, epoch) or (math.nan, math.nan),
                )
                if values:
                    mean = sum(values) / len(values)
                    dots.append(
                        Series(
                            i,
                            f"{epoch} epoch",
                            [place],
                            [100 * mean],
                            [100 * low],
                            [100 * high],
                            epoch == "best",
                        )
                    )
        if dots:
            title, text = f"{kind.capitalize()} test accuracy", "{:.1f} %".format
            figures.append(dot_chart(title, names, dots, legend, unit="%", text=text))
    if figures:
        note = (
            "Filled: last epoch; hollow: best epoch. Whiskers: min to max over seeds; one run: 95 % interval."
        )
        parts += [charts(figures), element("p", note, class_="note")]
    return join(parts)


def costs(rows: Sequence[Row], legend: Sequence[Entry]) -> Markup:
    """Return passes, multiples, seconds and memory of every row."""
    header = (
        "method",
        "forwards",
        "backwards",
        "× own objective",
        "× PGD-10 AT",
        "training",
        "an epoch",
        "× AT's time",
        "peak memory",
    )
    reference = {cells[0]: cells[_COST] for cells in table_cells(rows, "last")}
    lines, measured_dots, counted_dots = [], [], []
    for i, row in enumerate(rows):
        runs = row.runs

        def of(*keys: str, runs: Sequence[Run] = runs) -> list[float]:
            return [number(run.summary, *keys) for run in runs]

        passes = [
            mean_and_range(of("cost", f"{way}_passes"), lambda v: f"{v:g}") for way in ("forward", "backward")
        ]
        epoch = [train_seconds(run) / run.metrics[-1]["epoch"] for run in runs if run.metrics[-1]["epoch"]]
        epoch = [value for value in epoch if math.isfinite(value)]
        multiples = [
            mean_and_range(of("cost", key), lambda v: f"{v:.2f}×")
            for key in ("relative", "relative_to_pgd10_at")
        ]
        lines.append(
            (
                row.label,
                *passes,
                *multiples,
                mean_and_range([train_seconds(run) for run in runs], duration),
                mean_and_range(epoch, duration),
                reference.get(row.label, MISSING),
                mean_and_range(of("peak_memory_mb"), memory),
            )
        )
        if epoch:
            mean = sum(epoch) / len(epoch)
            measured_dots.append(Series(i, "", [i], [mean], [min(epoch)], [max(epoch)]))
        counted = [value for value in of("cost", "relative_to_pgd10_at") if math.isfinite(value)]
        if counted:
            counted_dots.append(Series(i, "", [i], [sum(counted) / len(counted)]))
    names = [row.label for row in rows]
    figures = []
    if measured_dots:
        figures.append(
            dot_chart("Training time of an epoch", names, measured_dots, legend, unit="s", from_zero=True)
        )
    if counted_dots:
        unit = "× adversarial training with PGD-10"
        figures.append(
            dot_chart("Counted cost of a step", names, counted_dots, legend, unit=unit, from_zero=True)
        )
    if not figures and all(set(line[1:]) == {MISSING} for line in lines):
        return Markup("")
    note = (
        "Forwards and backwards are passes of a step; a forward counts 1, a backward to the input 1, a "
        "backward to the weights 2. × own objective: the same objective without weight perturbation and "
        "penalty. Times are wall-clock and depend on what else the machine did."
    )
    return table("Cost of training", header, lines) + element("p", note, class_="note") + charts(figures)


def mean_and_range(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Return mean (min to max) without a range where all values read the same."""
    finite = [value for value in values if math.isfinite(value)]
    return text(finite[0]) if finite and len(set(map(text, values))) == 1 else cell(values, text)


def row_values(row: Row, kind: str, at: str = "last") -> list[float]:
    """Return the runs' finite "clean" or "robust" accuracies at the last or best epoch, in [0, 1]."""
    return [v for v in (measured(run, at)[kind] for run in row.runs) if math.isfinite(v)]


def row_bounds(row: Row, kind: str, at: str = "last") -> tuple[float, float] | None:
    """Return min and max over the runs; of one run its 95 % interval; None without a value."""
    values = row_values(row, kind, at)
    if len(row.runs) == 1 and values:
        low, high = (measured(row.runs[0], at)[f"{kind}/{end}"] for end in ("low", "high"))
        return (low, high) if math.isfinite(low + high) else (values[0], values[0])
    return (min(values), max(values)) if values else None


def train_seconds(run: Run) -> float:
    """Return the wall-clock seconds of training, of an unfinished run so far."""
    known = number(run.summary, "train_seconds")
    return known if math.isfinite(known) else number(run.metrics[-1], "train_seconds")
