"""Landscapes drawn: curves along directions with their range, and planes as filled contours."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wcitrain.measures.landscape import Landscape

DPI = 150
INK = "#333333"
COLOURS = {"clean": "#0072B2", "robust": "#D55E00"}
NUM_LEVELS = 16
CHOICE = {
    "random": "filter-normalised directions",
    "layer": "layer-normalised directions",
    "adversarial": "adversarial directions",
}


def draw(landscape: Landscape, title: str = "") -> Figure:
    """Return it drawn: curves with the range over directions, or two planes side by side."""
    return (draw_plane if landscape.is_plane else draw_curves)(landscape, title)


def draw_curves(landscape: Landscape, title: str = "") -> Figure:
    """Return both losses against α: the mean over directions in a band from the least to the largest."""
    figure = _figure(7.2, 4.8, title, landscape)
    ax = figure.subplots()
    _style(ax)
    for kind in _kinds(landscape):
        values, colour = getattr(landscape, kind), COLOURS[kind]
        ax.fill_between(landscape.alphas, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        style = "-" if kind == "robust" else "--"
        ax.plot(landscape.alphas, values.mean(0), style, color=colour, linewidth=2, label=f"{kind} loss")
    num = len(landscape.clean)
    how = "one direction" if num == 1 else f"mean and range over {num} directions"
    ax.set_xlabel("distance α, relative to the weights’ norm", fontsize=11, color=INK)
    ax.set_ylabel(f"cross-entropy ({how})", fontsize=11, color=INK)
    ax.set_xlim(landscape.alphas[0], landscape.alphas[-1])
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=11, loc="upper center")
    return figure


def draw_plane(landscape: Landscape, title: str = "") -> Figure:
    """Return both losses over the plane, one colour scale for both, so that they can be compared."""
    kinds = _kinds(landscape)
    figure = _figure(4.6 * len(kinds) + 1.4, 5.2, title, landscape)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    every = np.concatenate([getattr(landscape, kind).ravel() for kind in kinds])
    # Equal steps of the square root: the basin shows beside walls ten times as high.
    low, high = np.sqrt(every.min()), np.sqrt(max(every.max(), every.min() + 1e-9))
    levels = np.linspace(low, high, NUM_LEVELS) ** 2
    for ax, kind in zip(axes, kinds, strict=True):
        _style(ax)
        ax.grid(visible=False)
        values = getattr(landscape, kind).T  # the first direction runs to the right
        drawn = ax.contourf(
            landscape.alphas, landscape.alphas, values, levels=levels, cmap="cividis", extend="both"
        )
        ax.contour(
            landscape.alphas,
            landscape.alphas,
            values,
            levels=levels,
            colors="white",
            linewidths=0.4,
            alpha=0.6,
        )
        ax.plot(0, 0, "o", color="white", markeredgecolor=INK, markersize=7)
        ax.set_title(f"{kind} loss", loc="left", fontsize=12, color=INK)
        ax.set_aspect("equal")
        ax.set_xlabel("first direction, α / ‖W‖", fontsize=11, color=INK)
    axes[0].set_ylabel("second direction, α / ‖W‖", fontsize=11, color=INK)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.02, ticks=levels[::3], format="%.3g")
    bar.set_label("cross-entropy (steps of its root)", fontsize=11, color=INK)
    bar.ax.tick_params(labelsize=10, colors=INK)
    return figure


def _kinds(landscape: Landscape) -> tuple[str, ...]:
    return ("clean",) if landscape.attack == "clean" else ("clean", "robust")


def _figure(width: float, height: float, title: str, landscape: Landscape) -> Figure:
    """Return an empty figure, in inches, with the title and how the landscape was measured."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    how = f"{CHOICE[landscape.directions]}, {landscape.attack}, {landscape.num_examples} examples"
    text = f"{title}\n{how}" if title else how
    figure.suptitle(text, x=0.02, ha="left", fontsize=11, color=INK)
    return figure


def _style(ax: Axes) -> None:
    ax.tick_params(labelsize=10, colors=INK, length=0)
    ax.grid(color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
