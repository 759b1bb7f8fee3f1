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

STDERR = ("_stderr", "/stderr")
CURVES = {  # title: (unit, keys: the first solid, the second dashed)
    "Clean accuracy": ("%", ("val/clean_accuracy", "train/clean_accuracy")),
    "Robust accuracy": ("%", ("val/robust_accuracy", "train/robust_accuracy")),
    "Robust loss": ("cross-entropy in nats", ("val/robust_loss", "train/robust_loss")),
    "Robust generalisation gap": ("% points, train − validation", ("robust_gap",)),
    "Weight-Curvature Index": ("sum over layers", ("wci/total",)),
}
KINDS = {"clean": "clean test accuracy (%)", "robust": "robust test accuracy (%)"}
KINDS |= {"gap": "gap, train − test (points)", "wci": "Weight-Curvature Index"}


def training_measures(rows: Sequence[Row]) -> Figure | None:
    """Draw what was measured during training, the metrics ``measures/...``, against the epoch."""
    keys = dict.fromkeys(key for row in rows for run in row.runs for entry in run.metrics for key in entry)
    names = [key for key in keys if key.startswith("measures/") and not key.endswith(STDERR)]
    panels = {key.removeprefix("measures/").replace("_", " "): ("", (key,)) for key in names}
    return curves(rows, "Measures during training", panels, "")


def curves(
    rows: Sequence[Row],
    title: str = "Training curves",
    asked: Mapping[str, tuple[str, tuple[str, ...]]] = CURVES,
    note: str = "solid: validation, dashed: train; bands: min to max over seeds, one run: ± standard error",
    by: str = "epoch",
) -> Figure | None:
    """Draw accuracies, loss, gap and index against the epoch or ``step``: mean over seeds in their range.

    The index of a single run is drawn in a band of its standard error.
    """
    sizes, panels = epoch_sizes(rows), []
    axis = f"{by} ({sizes[0]:g} steps each)" if by == "epoch" and len(sizes) == 1 else by
    for name, (unit, keys) in asked.items():
        is_share, lines = unit.startswith("%"), []
        for row in rows:
            for key, mark, dash in zip(keys, ("", "_"), ("-", "--"), strict=False):  # "_": not in the legend
                x, *values = band(row.runs, key, by)
                mean, low, high = (((100 if is_share else 1) * v).tolist() for v in values)
                width = 1.8 if row.is_finished else 1.0
                lines += [Line(mark + row.label, row.index, x, mean, low, high, dash, width)] * bool(x)
        if lines:
            panels.append(Panel(name, axis, unit, lines, may_be_log=not is_share))
    return panels_figure(title, panels, note) if panels else None


def epoch_sizes(rows: Sequence[Row]) -> list[float]:
    """Return how many optimizer steps an epoch has in these runs: several numbers where runs differ."""
    entries = (entry for row in rows for run in row.runs for entry in run.metrics if "step" in entry)
    return sorted({entry["step"] / entry["epoch"] for entry in entries})


def band(
    runs: Sequence[Run], key: str, by: str = "epoch"
) -> tuple[list[float], np.ndarray, np.ndarray, np.ndarray]:
    """Return the epochs (or steps) where every run has a finite ``key``, the mean there, and its range.

    That is min to max over runs, for one run ± the standard error, where it is known.
    """
    known = [{m[by]: m for m in run.metrics if by in m and math.isfinite(number(m, key))} for run in runs]
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
    figure, axes = grid("What the methods do, last epoch", 4, 4, (2.5, 0.7 + 0.3 * len(rows)))
    for ax, (kind, title) in zip(axes, KINDS.items(), strict=True):
        styled(ax, xlabel=title)
        for place, row in enumerate(rows):
            if values := row.values(kind):
                points = np.array([sum(values) / len(values), *row.bounds(kind)])
                x, low, high = points * (1 if kind == "wci" else 100)
                xerr = [[max(0.0, x - low)], [max(0.0, high - x)]]  # equal seeds: their mean may be rounded
                ax.errorbar([x], [place], xerr=xerr, **look(row.index))
        labels = [drawing.short(row.label, 32) if ax is axes[0] else "" for row in rows]
        ax.set_yticks(range(len(rows)), labels)
        ax.set_ylim(len(rows) - 0.5, -0.5)
    note = "mean over seeds; bars: min to max, one run: 95 % interval, index ± error"
    figure.supxlabel(note, fontsize=9, color=drawing.SOFT)
    return figure


def layers(rows: Sequence[Row]) -> Figure | None:
    """Draw the index of each layer at the last measured epoch, of finished rows (all, if there are none)."""
    chosen: list[tuple[Row, float, dict[str, float]]] = []
    for row in [row for row in rows if row.is_finished] or rows:
        keys = dict.fromkeys(key for entry in row.runs[0].metrics for key in entry if key.startswith("wci/"))
        bands = {key: band(row.runs, key) for key in keys if key not in ("wci/total", "wci/total_stderr")}
        if epochs := [epoch for x, *_ in bands.values() for epoch in x]:
            last = {key: float(m[-1]) for key, (x, m, *_) in bands.items() if x and x[-1] == max(epochs)}
            chosen.append((row, max(epochs), last))
    if not chosen:
        return None
    names = list(dict.fromkeys(name for _, _, values in chosen for name in values))
    size = (8, 0.9 + 0.2 * max(8, len(names)))
    figure, (ax,) = grid("Weight-Curvature Index by layer", size=size)
    styled(ax, xlabel="WCI of the layer, mean over seeds")
    for i, (row, epoch, values) in enumerate(chosen):
        places = np.arange(len(names)) + 0.6 * ((i + 0.5) / len(chosen) - 0.5)  # equal ones stay apart
        style = look(row.index) | {"linestyle": "", "markersize": 5, "label": f"{row.label}, epoch {epoch:g}"}
        ax.plot([values.get(name, math.nan) for name in names], places, **style)
    scaled(ax, "x", [value for _, _, values in chosen for value in values.values()])
    ax.set_yticks(range(len(names)), drawing.short_names(names))
    ax.set_ylim(len(names) - 0.5, -0.5)  # the input layer on top
    legend(figure)
    return figure
