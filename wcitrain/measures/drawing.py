"""The bar chart of a measurement: the WCI of every layer with its error."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wcitrain.measures.wci import WCIMeasurement

DPI = 150
INK, BLUE = "#333333", "#0072B2"


def layer_bars(measurement: WCIMeasurement, title: str) -> Figure:
    """Return a figure with one bar a layer, input on top: length WCI_l, whisker ± one standard error.

    Beside the bars stands each layer's share of the sum. pyplot knows nothing about the figure.
    """
    values, errors = measurement.per_layer.numpy(), measurement.per_layer_stderr.numpy()
    height = 0.24 * len(values)
    figure = Figure(figsize=(10, 1.7 + max(height, 1.0)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK, wrap=True)
    ax = figure.subplots()
    places = np.arange(len(values))
    whiskers = np.where(np.isfinite(errors), errors, 0.0)
    ax.barh(places, values, height=0.72, color=BLUE)
    # A bar ends at zero: the index has no negative values.
    ax.errorbar(
        values, places, xerr=[np.minimum(whiskers, values), whiskers], fmt="none", ecolor=INK, elinewidth=1.2
    )
    for place, end, share in zip(places, values + whiskers, measurement.shares.tolist(), strict=True):
        text = f"{100 * share:.1f} %" if np.isfinite(share) else ""
        ax.annotate(
            text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9, color="#666666"
        )
    ax.set_yticks(places, short_names(measurement.layers))
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.set_xlim(0, 1.12 * max(float((values + whiskers).max()), 1e-9))
    ax.set_xlabel("WCI of the layer ± standard error, and its share", fontsize=11, color=INK)
    ax.tick_params(labelsize=9, colors=INK, length=0)
    ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
    return figure


def short_names(names: Sequence[str]) -> list[str]:
    """Drop what all the names share at their start, and ``.weight`` where it says nothing."""
    paths = [name.replace(".weight[", "[").removesuffix(".weight").split(".") for name in names]
    while all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    return [".".join(path) for path in paths]
