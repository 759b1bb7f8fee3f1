"""The drawn sections of the page: curves, layers, evaluations, measures, pictures."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from wcitrain.measures.wci import with_error
from wcitrain.report.charts import colour_key, dot_chart, heat_map, line_chart
from wcitrain.report.found import Accuracy, accuracies, findings, measures, pictures
from wcitrain.report.markup import Markup, charts, element, folded, join, table
from wcitrain.report.runs import MISSING, Row, Run
from wcitrain.report.series import band, layer_series, short_names, spans_decades
from wcitrain.report.svg import Entry, Series
from wcitrain.report.table import cell, percent, three_digits

OURS = frozenset({"curves.png", "tradeoff.png", "wci_layers.png"})
PICTURE_BYTES = 2_500_000  # of the pictures on a page; base64 makes them a third larger
MAX_MAPS = 6  # heat maps that are not folded away
_ERRORS = ("_stderr", "/stderr")

_PANELS = (  # title, unit, factor, keys (solid, dashed)
    ("Clean accuracy", "%", 100, ("val/clean_accuracy", "train/clean_accuracy")),
    ("Robust accuracy", "%", 100, ("val/robust_accuracy", "train/robust_accuracy")),
    ("Robust loss", "cross-entropy, nats", 1, ("val/robust_loss", "train/robust_loss")),
    ("Robust generalisation gap", "train − validation, percentage points", 100, ("robust_gap",)),
    ("Weight-Curvature Index", "sum over layers", 1, ("wci/total",)),
)


def curves(rows: Sequence[Row], legend: Sequence[Entry]) -> Markup:
    """Return accuracies, loss, gap and WCI against the epochs."""
    figures = [_panel(rows, legend, *panel) for panel in _PANELS]
    if not any(figures):
        return Markup("")
    several = "mean over seeds in a band from min to max" if any(len(row.runs) > 1 for row in rows) else ""
    single = "one run: WCI ± standard error, where known" if any(len(row.runs) == 1 for row in rows) else ""
    reading = "; ".join(part for part in ("solid: validation, dashed: train", several, single) if part)
    reading = f"{reading[0].upper()}{reading[1:]}."
    return element("p", reading, class_="note") + charts([figure for figure in figures if figure])


def training_measures(rows: Sequence[Row], legend: Sequence[Entry]) -> Markup:
    """Return what was measured during training, the metrics ``measures/...``, against the epochs."""
    every = dict.fromkeys(key for row in rows for run in row.runs for entry in run.metrics for key in entry)
    keys = [key for key in every if key.startswith("measures/") and not key.endswith(_ERRORS)]
    figures = []
    for key in keys:
        stderr = next((key + ending for ending in _ERRORS if key + ending in every), "")
        figures.append(_panel(rows, legend, key.removeprefix("measures/"), "", 1, (key,), stderr))
    return charts([figure for figure in figures if figure])


def _panel(
    rows: Sequence[Row],
    legend: Sequence[Entry],
    title: str,
    unit: str,
    factor: float,
    keys: Sequence[str],
    stderr: str = "wci/total_stderr",
) -> str:
    """Return one chart against epochs; empty without a value."""
    lines = []
    for i, row in enumerate(rows):
        for key in keys:
            has_error = key == "wci/total" or key.startswith("measures/")
            epochs, mean, low, high = band(row.runs, key, stderr if has_error else "")
            if epochs:
                name = key.partition("/")[0].replace("val", "validation") if len(keys) > 1 else ""
                mean, low, high = ((factor * values).tolist() for values in (mean, low, high))
                lines.append(Series(i, name, epochs, mean, low, high, is_second=key != keys[0]))
    if not lines:
        return ""
    is_log = factor == 1 and spans_decades(value for line in lines for value in line.y)
    title += " (logarithmic)" * is_log
    text = (lambda value: f"{value:.1f}") if factor == 100 else three_digits
    return line_chart(
        title, lines, legend, unit=unit, text=text, is_log=is_log, has_zero=keys == ("robust_gap",)
    )


def layers(rows: Sequence[Row], legend: Sequence[Entry]) -> Markup:
    """Return the WCI of every layer: at the last measured epoch as dots, through training as heat maps."""
    maps = [(i, row, *layer_series(row)) for i, row in enumerate(rows)]
    maps = [(i, row, epochs, values) for i, row, epochs, values in maps if epochs]
    if not maps:
        return Markup("")
    keys = list(dict.fromkeys(key for *_, values in maps for key in values))
    names = short_names(keys)
    shares, indices = [], []
    for i, _, epochs, values in maps:
        last = {
            keys.index(key): float(curve[-1]) for key, curve in values.items() if math.isfinite(curve[-1])
        }
        total = sum(last.values())
        indices.append(Series(i, f"epoch {epochs[-1]}", list(last), list(last.values())))
        if total > 0:
            shares.append(
                Series(i, f"epoch {epochs[-1]}", list(last), [100 * v / total for v in last.values()])
            )
    figures = []
    for title, unit, dots in (("WCI of the layer", "", indices), ("Share of the network's WCI", "%", shares)):
        dots = [series for series in dots if series.x]
        if dots:
            is_log = spans_decades(value for series in dots for value in series.y)
            title += " (logarithmic)" * is_log
            form = {"text": three_digits, "is_log": is_log, "from_zero": not is_log, "unit": unit}
            figures.append(dot_chart(title, names, dots, legend, **form))  # type: ignore[arg-type]
    parts = [element("h3", "At the last measured epoch"), charts(figures)]
    heat = [entry for entry in maps if len(entry[2]) > 1]
    every = [float(v) for *_, values in heat for curve in values.values() for v in curve if math.isfinite(v)]
    if every:
        low, high, is_log = min(every), max(every), spans_decades(every)
        drawn = [
            heat_map(row.label, names, epochs, _grid(keys, epochs, values), low, high, is_log)
            for _, row, epochs, values in heat
        ]
        parts += [
            element("h3", "Through training"),
            Markup(colour_key(low, high, is_log)),
            charts(drawn[:MAX_MAPS]),
        ]
        if len(drawn) > MAX_MAPS:
            parts.append(folded(f"{len(drawn) - MAX_MAPS} more methods", charts(drawn[MAX_MAPS:])))
    return join(parts)


def _grid(keys: Sequence[str], epochs: Sequence[int], values: dict[str, np.ndarray]) -> np.ndarray:
    """Return [layers, epochs], NaN for a layer that the row lacks."""
    return np.array([values.get(key, np.full(len(epochs), np.nan)) for key in keys])


def evaluations(rows: Sequence[Row], legend: Sequence[Entry]) -> Markup:
    """Return the accuracies of ``wcitrain evaluate``, a column an attack, and curves against eps."""
    found = _per_protocol(rows)
    if not found:
        return Markup("")
    columns = list(
        dict.fromkeys(name for per_run in found.values() for entries in per_run for name in entries)
    )
    lines = []
    for (i, where), per_run in found.items():
        cells = [
            _accuracy_cell([entries[n] for entries in per_run if n in entries], len(per_run)) for n in columns
        ]
        lines.append((join([rows[i].label, element("small", where)]), str(len(per_run)), *cells))
    caption = "Evaluations, accuracy in percent; one run: [95 % interval], several: (min to max)"
    notes = [(run.name, text) for row in rows for run in row.runs for text in findings(run)]
    checks = element("h3", "Checks") + element(
        "ul", join(element("li", f"{name}: {text}") for name, text in notes)
    )
    parts = [table(caption, ("method", "runs", *columns), lines), charts(_eps_curves(found, legend))]
    return join([*parts, checks] if notes else parts)


# By row and protocol: of each run its accuracies by name.
_Found = dict[tuple[int, str], list[dict[str, Accuracy]]]


def _per_protocol(rows: Sequence[Row]) -> _Found:
    """Return one accuracy a run and name; those of other images or another seed stand apart.

    Where several files of a run hold the same attack or worst case, the least counts: each is an upper bound.
    """
    taken = [
        (i, number, a)
        for i, row in enumerate(rows)
        for number, run in enumerate(row.runs)
        for a in accuracies(run)
    ]
    digests: dict[str, set[str]] = {}
    for *_, accuracy in taken:
        digests.setdefault(accuracy.where, set()).add(accuracy.digest)
    found: dict[tuple[int, str], dict[int, dict[str, Accuracy]]] = {}
    for i, number, accuracy in taken:
        is_several = len(digests[accuracy.where]) > 1
        where = accuracy.where + f", images {accuracy.digest[:6] or 'unknown'}" * is_several
        entries = found.setdefault((i, where), {}).setdefault(number, {})
        former = entries.get(accuracy.name, accuracy)
        if not former.value < accuracy.value:  # equal, or the former is NaN
            entries[accuracy.name] = former if math.isnan(accuracy.value) else accuracy
    return {key: list(per_run.values()) for key, per_run in found.items()}


def _accuracy_cell(entries: Sequence[Accuracy], num_runs: int) -> str:
    text = cell([entry.value for entry in entries] + [math.nan] * (num_runs - len(entries)), percent)
    if len(entries) == 1 and math.isfinite(entries[0].low + entries[0].high):
        text += f" [{percent(entries[0].low)}, {percent(entries[0].high)}]"
    return text


def _eps_curves(found: _Found, legend: Sequence[Entry]) -> list[str]:
    """Return a chart for each norm, attack and protocol that was evaluated at several radii."""
    lines: dict[tuple[str, str, str], list[Series]] = {}
    for (i, where), per_run in found.items():
        points: dict[tuple[str, str], dict[float, list[Accuracy]]] = {}
        for accuracy in (a for entries in per_run for a in entries.values()):
            if accuracy.norm and math.isfinite(accuracy.eps):
                points.setdefault((accuracy.norm, accuracy.attack), {}).setdefault(accuracy.eps, []).append(
                    accuracy
                )
        for (norm, attack), at_eps in points.items():
            known = {eps: [a for a in at_eps[eps] if math.isfinite(a.value)] for eps in sorted(at_eps)}
            known = {eps: entries for eps, entries in known.items() if entries}
            if len(known) > 1:
                numbers = [_mean_low_high(entries) for entries in known.values()]
                mean, low, high = ([100 * value for value in column] for column in zip(*numbers, strict=True))
                places = [eps * (255 if norm == "linf" else 1) for eps in known]
                line = Series(i, "", places, mean, low, high)
                lines.setdefault((norm, attack, where), []).append(line)
    return [
        line_chart(
            f"Accuracy under {norm} {attack}",
            series,
            legend,
            unit=f"%, {where}".rstrip(", "),
            x_label="eps × 255" if norm == "linf" else "eps",
            text=lambda value: f"{value:.1f}",
        )
        for (norm, attack, where), series in lines.items()
    ]


def _mean_low_high(entries: Sequence[Accuracy]) -> tuple[float, float, float]:
    values = [entry.value for entry in entries]
    if len(entries) == 1 and math.isfinite(entries[0].low + entries[0].high):
        return values[0], entries[0].low, entries[0].high
    return sum(values) / len(values), min(values), max(values)


def measured_afterwards(runs: Sequence[Run]) -> Markup:
    """Return the measures of ``wcitrain measure``: a line a measure, a column a run."""
    values: dict[tuple[str, str, str], dict[int, str]] = {}
    for i, run in enumerate(runs):
        for one in measures(run):
            text = MISSING
            if math.isfinite(one.value):
                known = math.isfinite(one.stderr) and one.stderr > 0
                text = with_error(one.value, one.stderr) if known else f"{one.value:.4g}"
            values.setdefault((one.name, one.where, one.settings), {})[i] = text
    if not values:
        return Markup("")
    places = sorted({i for cells in values.values() for i in cells})
    lines = [
        (
            join([name, element("small", ", ".join(part for part in (where, settings) if part))]),
            *(cells.get(i, MISSING) for i in places),
        )
        for (name, where, settings), cells in sorted(values.items())
    ]
    return table(
        "Measures ± standard error, where one is known", ("measure", *(runs[i].name for i in places)), lines
    )


def gallery(runs: Sequence[Run]) -> Markup:
    """Return the run folders' pictures, as many as ``PICTURE_BYTES`` allow; the others are named."""
    shown, left_out, size = [], [], 0
    for run in runs:
        for path in pictures(run, OURS):
            name = f"{run.name}: {path.parent.name}/{path.name}"
            content = path.read_bytes()
            if size + len(content) > PICTURE_BYTES:
                left_out.append(name)
                continue
            size += len(content)
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            kind = {"landscapes": "Loss landscape", "figures": "Figure"}.get(path.parent.name, "Figure")
            alt = f"{kind} {path.stem} of run {run.name}"
            shown.append(
                f'<figure class="chart"><figcaption>{escape(name)}</figcaption>'
                f'<img src="{source}" alt="{escape(alt)}"></figure>\n'
            )
    note = (
        element("p", f"Left out to keep the page small: {', '.join(left_out)}.", class_="note")
        if left_out
        else ""
    )
    return charts(shown, "charts wide") + note if shown or note else Markup("")
