"""The figures of the report: curves, what the methods do, the index by layer.

Each takes rows and returns a figure, or None where the runs lack the numbers for it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from wcitrain.report import drawing
from wcitrain.report.drawing import Line, Panel, grid, legend, look, panels_figure, scaled, styled
from wcitrain.report.runs import Row, Run, number

MAX_LAYER_ROWS = 6  # methods in the figures of layers
STDERR = ("_stderr", "/stderr")
CURVES = {  # title: (unit, keys: the first solid, the second dashed)
    "Clean accuracy": ("%", ("val/clean_accuracy", "train/clean_accuracy")),
    "Robust accuracy": ("%", ("val/robust_accuracy", "train/robust_accuracy")),
    "Robust loss": ("cross-entropy in nats", ("val/robust_loss", "train/robust_loss")),
    "Robust generalisation gap": ("% points, train − validation", ("robust_gap",)),
    "Weight-Curvature Index": ("sum over layers", ("wci/total",)),
}
Layers = list[tuple[Row, list[float], dict[str, np.ndarray]]]  # with epochs, and each layer's index at them


def curves(rows: Sequence[Row]) -> Figure | None:
    """Draw accuracies, loss, gap and index against the epoch: mean over seeds in their range.

    The index of a single run is drawn in a band of its standard error.
    """
    note = "solid: validation, dashed: train; bands: min to max over seeds, one run: ± standard error"
    return _curves(rows, "Training curves by epoch", CURVES, note)


def training_measures(rows: Sequence[Row]) -> Figure | None:
    """Draw what was measured during training, the metrics ``measures/...``, against the epoch."""
    keys = dict.fromkeys(key for row in rows for run in row.runs for entry in run.metrics for key in entry)
    names = [key for key in keys if key.startswith("measures/") and not key.endswith(STDERR)]
    panels = {key.removeprefix("measures/").replace("_", " "): ("", (key,)) for key in names}
    return _curves(rows, "Measures during training", panels)


def _curves(
    rows: Sequence[Row], title: str, asked: Mapping[str, tuple[str, tuple[str, ...]]], note: str = ""
) -> Figure | None:
    panels = []
    for name, (unit, keys) in asked.items():
        is_share, lines = unit.startswith("%"), []
        for row in rows:
            for key, mark, dash in zip(keys, ("", "_"), ("-", "--"), strict=False):  # "_": not in the legend
                x, *values = band(row.runs, key)
                mean, low, high = (((100 if is_share else 1) * v).tolist() for v in values)
                width = 1.8 if row.is_finished else 1.0
                lines += [Line(mark + row.label, row.index, x, mean, low, high, dash, width)] * bool(x)
        if lines:
            panels.append(Panel(name, "epoch", unit, lines, may_be_log=not is_share))
    return panels_figure(title, panels, note) if panels else None


def band(runs: Sequence[Run], key: str) -> tuple[list[float], np.ndarray, np.ndarray, np.ndarray]:
    """Return the epochs where every run has a finite ``key``, the mean there, and its range.

    That is min to max over runs, for one run ± the standard error, where it is known.
    """
    known = [{m["epoch"]: m for m in run.metrics if math.isfinite(number(m, key))} for run in runs]
    epochs = sorted(set.intersection(*map(set, known)))
    values = np.array([[number(entries[epoch], key) for epoch in epochs] for entries in known])  # [runs, E]
    mean, low, high = values.mean(0), values.min(0), values.max(0)
    if len(runs) == 1:
        errors = [[number(known[0][epoch], key + ending) for epoch in epochs] for ending in STDERR]
        error = np.nan_to_num(np.array(errors), posinf=0.0).max(0, initial=0.0)
        low, high = mean - error, mean + error
    return epochs, mean, low, high


def overview(rows: Sequence[Row]) -> Figure | None:
    """Draw test accuracies, gap and index at the last epoch, a line a method in the order of the runs."""
    rows = [row for row in rows if row.is_finished]
    if len(rows) < 2:
        return None
    asked = {"clean": "clean test accuracy (%)", "robust": "robust test accuracy (%)"}
    asked |= {"gap": "gap, train − test (points)", "wci": "Weight-Curvature Index"}
    figure, axes = grid("What the methods do, last epoch", 4, 4, (2.5, 0.7 + 0.3 * len(rows)))
    for ax, (kind, title) in zip(axes, asked.items(), strict=True):
        styled(ax, xlabel=title)
        for place, row in enumerate(rows):
            if values := row.values(kind):
                mean, (low, high) = sum(values) / len(values), row.bounds(kind)
                x, low, high = (v * (1 if kind == "wci" else 100) for v in (mean, low, high))
                ax.errorbar([x], [place], xerr=[[x - low], [high - x]], **look(row.index))
        ax.set_yticks(
            range(len(rows)), [drawing.short(row.label, 32) if ax is axes[0] else "" for row in rows]
        )
        ax.set_ylim(len(rows) - 0.5, -0.5)
    note = "mean over seeds; bars: min to max, one run: 95 % interval, index ± error"
    figure.supxlabel(note, fontsize=9, color=drawing.SOFT)
    return figure


def layers(rows: Sequence[Row]) -> Figure | None:
    """Draw the index of each layer at the last measured epoch."""
    chosen, names, title = _layers(rows)
    if not chosen:
        return None
    figure = drawing.empty_figure(8, 1.6 + 0.2 * max(8, len(names)), title)
    ax = styled(figure.subplots(), xlabel="WCI of the layer, mean over seeds")
    drawn: list[float] = []
    for i, (row, epochs, values) in enumerate(chosen):
        last = [float(values[name][-1]) if name in values else math.nan for name in names]
        places = np.arange(len(names)) + 0.6 * ((i + 0.5) / len(chosen) - 0.5)  # equal ones stay apart
        drawn += last
        label = f"{row.label}, epoch {epochs[-1]:g}"
        ax.plot(last, places, linestyle="", markersize=5, label=label, **look(row.index))
    scaled(ax, "x", drawn)
    ax.set_yticks(range(len(names)), drawing.short_names(names))
    ax.set_ylim(len(names) - 0.5, -0.5)  # the input layer on top
    legend(figure)
    return figure


def _layers(rows: Sequence[Row]) -> tuple[Layers, list[str], str]:
    """Return finished rows (all, if there are none) that have the layers' index, their names, and a title."""
    chosen: Layers = []
    for row in [row for row in rows if row.is_finished] or rows:
        keys = dict.fromkeys(key for entry in row.runs[0].metrics for key in entry if key.startswith("wci/"))
        bands = {key: band(row.runs, key) for key in keys if key not in ("wci/total", "wci/total_stderr")}
        means = {key: dict(zip(x, mean.tolist(), strict=True)) for key, (x, mean, *_) in bands.items()}
        epochs = sorted({epoch for numbers in means.values() for epoch in numbers})
        values = {key: np.array([n.get(e, math.nan) for e in epochs]) for key, n in means.items()}
        chosen += [(row, epochs, values)] * bool(epochs)
    note = f" (first {MAX_LAYER_ROWS} of {len(chosen)} methods)" if len(chosen) > MAX_LAYER_ROWS else ""
    chosen = chosen[:MAX_LAYER_ROWS]
    names = list(dict.fromkeys(key for _, _, values in chosen for key in values))
    return chosen, names, f"Weight-Curvature Index by layer{note}"
