"""Measures at every kept epoch: against the epoch and the robust loss (Stutz et al. 2021, figures 1, 5)."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wcitrain.report.axes import INK, empty_figure, styled
from wcitrain.report.runs import COLOURS, MARKERS
from wcitrain.report.series import spans_decades

COLUMNS = 2
LOSS = "robust_loss"


@dataclass(frozen=True)
class Point:
    """One run at one epoch: its folder, the epoch, and measures by name."""

    run: Path
    epoch: int
    measures: Mapping[str, float]


def measures_through_training(points: Sequence[Point]) -> Figure | None:
    """Return a figure with one panel a measure: curves over epochs, a ring at the best by validation.

    The ring is where early stopping would have stopped, where that epoch was kept; else at the kept epoch
    before it. None without measures.
    """
    names = _names(points)
    runs = _runs(points)
    labels = _labels(runs)
    if not names:
        return None
    figure, axes = _page(len(names), len(runs))
    for ax, name in zip(axes, names, strict=False):
        for k, (run, members) in enumerate(runs.items()):
            style = _style(k)
            epochs, values = [p.epoch for p in members], [p.measures.get(name, math.nan) for p in members]
            ax.plot(epochs, values, label=labels[run], linewidth=1.6, markersize=4, **style)
            best = _best_epoch(run)
            before = [p for p in members if best is not None and p.epoch <= best]
            if before:
                ring = before[-1]
                ax.plot(
                    ring.epoch,
                    ring.measures.get(name, math.nan),
                    marker="o",
                    markersize=11,
                    markerfacecolor="none",
                    markeredgecolor=style["color"],
                    markeredgewidth=1.6,
                )
        _finish(ax, name, [p.measures.get(name, math.nan) for p in points], vertical=True)
        ax.set_xlabel("epoch", fontsize=9, color=INK)
    return _with_legend(
        figure,
        len(names),
        "Rings: the epoch best by robust validation accuracy (or the kept epoch before it)",
    )


def measures_against_loss(points: Sequence[Point]) -> Figure | None:
    """Return a figure with one panel a measure: robust loss against it, the last epoch of each run large.

    None without the robust loss, or without another measure.
    """
    names = [name for name in _names(points) if name != LOSS]
    runs = _runs(points)
    labels = _labels(runs)
    if not names or LOSS not in _names(points):
        return None
    figure, axes = _page(len(names), len(runs))
    for ax, name in zip(axes, names, strict=False):
        for k, (run, members) in enumerate(runs.items()):
            style = _style(k)
            x, y = ([p.measures.get(key, math.nan) for p in members] for key in (name, LOSS))
            ax.plot(x, y, linewidth=0.8, alpha=0.5, markersize=3, **style)
            ax.plot(x[-1], y[-1], markersize=9, label=labels[run], **(style | {"linestyle": "none"}))
        _finish(ax, name, [p.measures.get(name, math.nan) for p in points], vertical=False)
        ax.set_ylabel("robust loss", fontsize=9, color=INK)
    return _with_legend(figure, len(names), "Lines: through training; large: the last epoch")


def _names(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(name for point in points for name in point.measures))


def _runs(points: Sequence[Point]) -> dict[Path, list[Point]]:
    """Return the points of each run by epoch."""
    runs: dict[Path, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.epoch):
        runs.setdefault(point.run, []).append(point)
    order = list(dict.fromkeys(point.run for point in points))
    return {run: runs[run] for run in order}


def _labels(runs: Iterable[Path]) -> dict[Path, str]:
    """Return "AT, seed 0" for each run, or with the recipe's name, or the folder's."""
    short, long = {}, {}
    for run in runs:
        try:
            summary = json.loads((run / "summary.json").read_text("utf-8"))
            short[run] = f"{summary['method']}, seed {summary['seed']}"
            long[run] = f"{summary['method']} ({summary.get('group', run.name)}), seed {summary['seed']}"
        except (OSError, ValueError, KeyError):
            short[run] = long[run] = run.name
    known = list(short.values())
    return {run: long[run] if known.count(label) > 1 else label for run, label in short.items()}


def _best_epoch(run: Path) -> int | None:
    try:
        return int(json.loads((run / "summary.json").read_text("utf-8"))["best"]["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _style(k: int) -> dict[str, Any]:
    return {
        "color": COLOURS[k % len(COLOURS)],
        "marker": MARKERS[k % len(MARKERS)],
        "linestyle": ("-", "--", ":")[k // len(COLOURS) % 3],
    }


def _page(num_panels: int, num_runs: int) -> tuple[Figure, Sequence[Axes]]:
    columns = min(COLUMNS, num_panels)
    rows = math.ceil(num_panels / columns)
    figure = empty_figure(5.4 * columns, 3.4 * rows + 0.25 * math.ceil(num_runs / (2 * columns)) + 0.5)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _finish(ax: Axes, name: str, values: Sequence[float], *, vertical: bool) -> None:
    if spans_decades(values):
        (ax.set_yscale if vertical else ax.set_xscale)("log")
    (ax.set_ylabel if vertical else ax.set_xlabel)(name.replace("_", " "), fontsize=9, color=INK)
    styled(ax, 8)


def _with_legend(figure: Figure, num_panels: int, title: str) -> Figure:
    for ax in figure.axes[num_panels:]:
        ax.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2 * min(COLUMNS, num_panels),
        fontsize=8,
        frameon=False,
        title=title,
        title_fontsize=8,
    )
    return figure
