"""Scatter plots of measures against what they are to predict."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wcitrain.report.runs import COLOURS, MARKERS

DPI = 130
INK = "#333333"
COLUMNS = 4
LOG_DECADES = 1.5  # a positive measure that spans more is drawn on a logarithmic axis


def scatter_page(
    panels: Mapping[str, Sequence[float]],
    notes: Mapping[str, str],
    target: Sequence[float],
    target_name: str,
    groups: Sequence[str],
) -> Figure:
    """Return a figure with one panel a measure: target against measure, one colour and marker a group.

    Args:
        panels: Values [M] by measure; what is not finite is left out.
        notes: A line under each panel's title.
        target: [M].
        target_name: Of the vertical axis.
        groups: The group of each model [M].
    """
    rows = math.ceil(len(panels) / COLUMNS)
    kinds = list(dict.fromkeys(groups))
    legend_rows = math.ceil(len(kinds) / COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 2.9 * rows + 0.3 * legend_rows + 0.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True).flat
    y = np.asarray(target, dtype=float)
    which = np.array([kinds.index(group) for group in groups])
    for ax, (name, values) in zip(axes, panels.items(), strict=False):
        x = np.asarray(values, dtype=float)
        for k, kind in enumerate(kinds):
            style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k // len(COLOURS) % len(MARKERS)]}
            ax.scatter(x[which == k], y[which == k], s=22, alpha=0.85, linewidths=0, label=kind, **style)
        finite = x[np.isfinite(x)]
        if len(finite) and finite.min() > 0 and math.log10(finite.max() / finite.min()) > LOG_DECADES:
            ax.set_xscale("log")
        ax.set_title(f"{name.replace('_', ' ')}\n{notes.get(name, '')}", fontsize=9, color=INK)
        ax.tick_params(labelsize=8, colors=INK)
        ax.grid(color="#E6E6E6", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#BBBBBB")
    for ax in figure.axes[len(panels) :]:
        ax.set_visible(False)
    figure.supylabel(target_name, fontsize=10, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(COLUMNS, len(labels)), fontsize=8, frameon=False
    )
    return figure
