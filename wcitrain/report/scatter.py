"""Scatter plots of measures against what they are to predict."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wcitrain.report.axes import INK, empty_figure, styled
from wcitrain.report.runs import COLOURS, MARKERS
from wcitrain.report.series import spans_decades

COLUMNS = 4


def scatter_page(
    panels: Mapping[str, Sequence[float]],
    notes: Mapping[str, str],
    target: Sequence[float],
    target_name: str,
    groups: Sequence[str],
) -> Figure | None:
    """Return a figure of target against measure, one panel a measure, one marker a group; None without any.

    Args:
        panels: Values [M] by measure; what is not finite is left out.
        notes: A line under each panel's title.
        target: [M].
        target_name: Of the vertical axis.
        groups: The group of each model [M].
    """
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    kinds = list(dict.fromkeys(groups))
    figure = empty_figure(3.4 * columns, 2.9 * rows + 0.3 * math.ceil(len(kinds) / columns) + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    y = np.asarray(target, dtype=float)
    which = np.array([kinds.index(group) for group in groups])
    for ax, (name, values) in zip(axes, panels.items(), strict=False):
        x = np.asarray(values, dtype=float)
        for k, kind in enumerate(kinds):
            style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k // len(COLOURS) % len(MARKERS)]}
            ax.scatter(x[which == k], y[which == k], s=22, alpha=0.85, linewidths=0, label=kind, **style)
        if spans_decades(values):
            ax.set_xscale("log")
        else:
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.ticklabel_format(axis="x", scilimits=(-3, 4))
        ax.set_title(f"{name.replace('_', ' ')}\n{notes.get(name, '')}", fontsize=9, color=INK)
        styled(ax, 8)
    for ax in figure.axes[len(panels) :]:
        ax.set_visible(False)
    figure.supylabel(target_name, fontsize=10, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure
