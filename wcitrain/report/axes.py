"""What the PNG figures share: an empty figure, and axes in the project's style."""

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 150
INK = "#333333"


def empty_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that pyplot knows nothing about."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def styled(ax: Axes, size: float) -> None:
    """Draw quiet axes: a grid behind the data, no frame, tick labels of ``size`` points."""
    ax.tick_params(labelsize=size, colors=INK, length=0)
    ax.grid(color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
