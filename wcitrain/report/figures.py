"""The figures: curves over epochs, the clean-robust trade-off, and the WCI of every layer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from wcitrain.report.axes import INK, empty_figure, styled
from wcitrain.report.runs import KINDS, MARKERS, Row, measured
from wcitrain.report.series import band, layer_series, short_names, spans_decades
from wcitrain.report.table import attacks

MAX_LAYER_ROWS = 6  # groups drawn in wci_layers.png
FEW_EPOCHS = 12  # up to here every epoch has a marker


def _figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure, in inches, with a title."""
    figure = empty_figure(width, height)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold", color=INK)
    return figure


def _style(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=12, color=INK)
    ax.set_xlabel(xlabel, fontsize=11, color=INK)
    ax.set_ylabel(ylabel, fontsize=11, color=INK)
    styled(ax, 10)


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    ncols = max(1, min(len(handles), 120 // (8 + max(len(str(handle.get_label())) for handle in handles))))
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize=11)


def curves(rows: Sequence[Row]) -> Figure:
    """Draw accuracies, gap and WCI over the epochs: mean over the seeds in a min-max band.

    The WCI of a single run has a band of its standard error.
    """
    figure = _figure(12, 8.6, "Training curves: mean and range over seeds")
    panels = (  # title, y label, factor, keys (the first solid, the second dashed)
        ("Clean accuracy", "accuracy (%)", 100, ("val/clean_accuracy", "train/clean_accuracy")),
        ("Robust accuracy", "accuracy (%)", 100, ("val/robust_accuracy", "train/robust_accuracy")),
        ("Robust generalisation gap (train − validation)", "percentage points", 100, ("robust_gap",)),
        ("Weight-Curvature Index (one run: ± standard error)", "WCI, sum over layers", 1, ("wci/total",)),
    )
    has_markers = max(len(run.metrics) for row in rows for run in row.runs) <= FEW_EPOCHS
    for ax, (title, ylabel, factor, keys) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _style(ax, title, "epoch", ylabel)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        drawn: list[float] = []
        for row in rows:
            for key, line in zip(keys, ("-", "--"), strict=False):
                epochs, mean, low, high = band(
                    row.runs, key, "wci/total_stderr" if key == "wci/total" else ""
                )
                if not epochs:
                    continue
                mean, low, high = factor * mean, factor * low, factor * high
                ax.fill_between(epochs, low, high, color=row.colour, alpha=0.15, linewidth=0)
                style = _line_style(row, has_markers or len(epochs) == 1)
                ax.plot(epochs, mean, line, markerfacecolor="white" if line == "--" else row.colour, **style)
                drawn += mean.tolist()
        if max(run.metrics[-1]["epoch"] for row in rows for run in row.runs) == 1:
            ax.set_xlim(0.5, 1.5)
        if keys == ("robust_gap",) and drawn:
            ax.axhline(0, color="#999999", linewidth=1)
        if keys == ("wci/total",) and spans_decades(drawn):
            ax.set_yscale("log")
        if not drawn:
            ax.text(
                0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="#888888", fontsize=12
            )
            ax.set(xticks=[], yticks=[])
    handles = [Line2D([], [], label=row.label, **_line_style(row, has_markers)) for row in rows]
    handles += [
        Line2D([], [], color=INK, label="validation"),
        Line2D([], [], color=INK, linestyle="--", label="train"),
    ]
    _legend(figure, handles)
    return figure


def _line_style(row: Row, has_markers: bool) -> dict[str, Any]:
    """Return how a row's line looks; a marker also tells apart two groups that share a colour."""
    return {
        "color": row.colour,
        "linewidth": 2.0 if row.is_finished else 1.0,
        "marker": row.marker if has_markers or row.marker != MARKERS[0] else "",
        "markersize": 5,
        "markevery": 1 if has_markers else 3,
    }


# Row, values [runs, 2], mean [2], low [2] and high [2] of the bars, in percent; 0 is clean, 1 is robust.
_Point = tuple[Row, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def tradeoff(rows: Sequence[Row]) -> Figure | None:
    """Clean against robust test accuracy at the last epoch; None with fewer than two groups to compare."""
    points: list[_Point] = []
    figure = _figure(8, 6.2, "Clean and robust test accuracy, last epoch")
    ax = figure.subplots()
    for row in rows:
        numbers = [
            n for n in (measured(run, "last") for run in row.runs) if math.isfinite(n["clean"] + n["robust"])
        ]
        if not row.is_finished or not numbers:
            continue
        values = 100 * np.array([[n[kind] for kind in KINDS] for n in numbers])  # [runs, 2]
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        if len(values) == 1:
            low, high = (
                100 * np.array([numbers[0][f"{kind}/{end}"] for kind in KINDS]) for end in ("low", "high")
            )
            low, high = np.where(np.isfinite(low), low, mean), np.where(np.isfinite(high), high, mean)
        points.append((row, values, mean, low, high))
        style: dict[str, Any] = {"color": row.colour, "marker": row.marker, "linestyle": ""}
        ax.hlines(mean[1], low[0], high[0], color=row.colour, linewidth=1.5, alpha=0.6)
        ax.vlines(mean[0], low[1], high[1], color=row.colour, linewidth=1.5, alpha=0.6)
        if len(values) > 1:
            ax.plot(*values.T, **style, markersize=5, alpha=0.45, markeredgewidth=0)
        ax.plot(*mean, **style, markersize=11, markeredgecolor="white", markeredgewidth=1.2)
    if len(points) < 2:
        return None
    _style(
        ax,
        "",
        "clean test accuracy (%)",
        f"robust test accuracy (%), {attacks([row for row, *_ in points])}".rstrip(", "),
    )
    reading = "Large: mean over seeds. Bars: min to max over seeds; one run: 95 % interval."
    ax.set_title(reading, loc="left", fontsize=10, color=INK)
    ax.margins(0.14)
    _label_points(figure, ax, points)
    return figure


def _label_points(figure: Figure, ax: Axes, points: Sequence[_Point]) -> None:
    """Name each mean beside its marker, at the place that covers the least of what is already there."""
    figure.canvas.draw()  # fixes the layout, so that text can be measured in pixels
    to_pixels = ax.transData.transform
    taken = [Bbox(to_pixels([mean, mean])).padded(12) for _, _, mean, _, _ in points]
    for _, values, mean, low, high in points:
        taken += [Bbox(to_pixels([value, value])).padded(6) for value in values]
        taken.append(Bbox(to_pixels([[low[0], mean[1]], [high[0], mean[1]]])).padded(3))
        taken.append(Bbox(to_pixels([[mean[0], low[1]], [mean[0], high[1]]])).padded(3))
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    halo = [withStroke(linewidth=3, foreground="white")]
    for row, _, mean, _, _ in points:
        style: dict[str, Any] = {
            "color": row.colour,
            "fontsize": 11,
            "fontweight": "bold",
            "path_effects": halo,
        }
        text = ax.annotate(row.label, (mean[0], mean[1]), xytext=(0, 0), textcoords="offset points", **style)
        text.set_in_layout(False)

        def covered(place: tuple[int, int], text: Any = text) -> float:
            text.set(
                position=place, ha="left" if place[0] > 0 else "right", va="bottom" if place[1] > 0 else "top"
            )
            box = text.get_window_extent(renderer).padded(2)
            overlaps = (Bbox.intersection(box, other) for other in taken)
            outside = box.width * box.height - _area(Bbox.intersection(box, ax.bbox))
            return sum(_area(overlap) for overlap in overlaps) + 2 * outside

        places = [(dx * r, dy * r) for r in (7, 12, 20, 30) for dy in (1, -1) for dx in (1, -1)]
        covered(min(places, key=covered))
        taken.append(text.get_window_extent(renderer))


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else box.width * box.height


def wci_layers(rows: Sequence[Row]) -> Figure | None:
    """Each layer's share of the WCI at the last measured epoch, and its WCI; None without WCI."""
    maps = []  # row, epochs, {layer: WCI [epochs], mean over the seeds}
    for row in [row for row in rows if row.is_finished] or rows:
        epochs, values = layer_series(row)
        if epochs:
            maps.append((row, epochs, values))
    if not maps:
        return None
    note = f" (first {MAX_LAYER_ROWS} of {len(maps)} methods)" if len(maps) > MAX_LAYER_ROWS else ""
    maps = maps[:MAX_LAYER_ROWS]
    layers = list(dict.fromkeys(key for _, _, values in maps for key in values))
    figure = _figure(12, 2.6 + 0.26 * max(8, len(layers)), f"Weight-Curvature Index by layer{note}")
    heat = maps if max(len(epochs) for _, epochs, _ in maps) > 1 else []
    widths = [3.2, *[1] * len(heat)]
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]

    for i, (row, _, values) in enumerate(maps):
        last = np.array([values[key][-1] if key in values else np.nan for key in layers])
        share = 100 * last / np.nansum(last) if np.nansum(last) > 0 else np.full(len(layers), np.nan)
        style: dict[str, Any] = {
            "color": row.colour,
            "markersize": 6.5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }
        offset = 0.6 * ((i + 0.5) / len(maps) - 0.5)  # so that equal shares do not hide each other
        axes[0].plot(share, np.arange(len(layers)) + offset, row.marker, label=row.label, **style)
    _style(axes[0], "Share at the last measured epoch", "share of the network's WCI (%)", "")
    axes[0].set_yticks(range(len(layers)), short_names(layers))
    axes[0].set_ylim(len(layers) - 0.5, -0.5)  # the input layer on top
    if spans_decades(x for line in axes[0].lines for x in line.get_xdata()):
        axes[0].set_xscale("log")
        axes[0].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    _legend(figure, axes[0].get_lines())

    every = (
        np.concatenate([curve for _, _, values in heat for curve in values.values()])
        if heat
        else np.array([])
    )
    low, high = (np.nanmin(every), np.nanmax(every)) if heat else (0, 1)
    norm = LogNorm(low, high) if spans_decades(every) else Normalize(low, high)
    for ax, (row, epochs, values) in zip(axes[1:], heat, strict=True):
        _style(ax, textwrap.fill(row.label, max(10, 60 // len(heat))), "epoch", "")
        ax.grid(False)
        middles = (np.array(epochs[1:]) + epochs[:-1]) / 2
        edges = np.concatenate([[epochs[0] - 0.5], middles, [epochs[-1] + 0.5]])
        grid = np.array([values.get(key, np.full(len(epochs), np.nan)) for key in layers])
        mesh = ax.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, grid, norm=norm, cmap="viridis")
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    if heat:
        figure.colorbar(mesh, ax=axes[1:], label="WCI of the layer", aspect=40, pad=0.02)
    return figure
