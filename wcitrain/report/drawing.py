"""What figures share: quiet axes, panels of lines, looks that differ without colour, and SVG for the page.

A figure is drawn once, in the colours of the light theme. As PNG it stays so; ``svg`` turns its colours into
variables of the page, which has values for both themes.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

DPI = 150
LOG_RATIO = 30.0  # an axis is logarithmic when its largest value exceeds its smallest by more than this
MAX_MARKERS = 12  # along a line
# Of the page's figures: texts stay texts, equal figures give equal bytes, a dollar in a name is no formula.
SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "wcitrain", "text.parse_math": False}

# Okabe and Ito's colours, shifted to a contrast of 3 on either paper; text has 4.5 (WCAG 2.2).
SERIES = ("#0072b2", "#d04f00", "#00875f", "#b5538f", "#b07800", "#2a93cf", "#3a4048", "#7d858e")
ON_DARK = ("#4da3e0", "#ff8a4c", "#2fc296", "#e093bf", "#ecb23e", "#8ccdf5", "#d0d6dc", "#929ba5")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, SOFT, AXIS, GRID, PAPER = "#1b1f24", "#57606a", "#c5cbd2", "#e8ebef", "#ffffff"
LIGHT = {"ink": INK, "soft": SOFT, "line": AXIS, "grid": GRID, "paper": PAPER, "raised": "#f6f7f9"}
LIGHT |= {"accent": "#0b5cad"} | {f"c{i}": colour for i, colour in enumerate(SERIES)}
DARK = {"ink": "#e8ebee", "soft": "#a3adb8", "line": "#414954", "grid": "#292f37", "paper": "#14171b"}
DARK |= {"raised": "#1d2228", "accent": "#7db8f5"}
DARK |= {f"c{i}": colour for i, colour in enumerate(ON_DARK)}
VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}


def look(index: int) -> dict[str, Any]:
    """Return colour and marker of a series: 56 pairs, neighbours differ in both."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}


def grid(
    title: str, num_panels: int = 1, columns: int = 3, size: tuple[float, float] = (4.0, 3.0)
) -> tuple[Figure, list[Axes]]:
    """Return a figure outside of pyplot and the axes of its panels, each of ``size`` inches."""
    columns = min(columns, num_panels)
    rows = math.ceil(num_panels / columns)
    shape = (max(5.6, size[0] * columns), size[1] * rows + 0.7)
    figure = Figure(figsize=shape, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK, wrap=True)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[num_panels:]:
        ax.remove()
    return figure, axes[:num_panels]


def styled(ax: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> Axes:
    """Return the axes made quiet: a grid behind the data, no frame, no ticks."""
    lines = "\n".join(short(line, 48) for line in title.split("\n"))
    ax.set_title(lines, loc="left", fontsize=10, color=INK)
    ax.set_xlabel(short(xlabel, 64), fontsize=9, color=INK)
    ax.set_ylabel(short(ylabel, 64), fontsize=9, color=INK)
    ax.tick_params(which="both", labelsize=8, colors=SOFT, length=0)
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(AXIS)
    return ax


def scaled(ax: Axes, which: Literal["x", "y"], values: Iterable[float]) -> bool:
    """Make an axis of positive values that span decades logarithmic, with plain numbers; return whether."""
    finite = [value for value in values if math.isfinite(value)]
    is_log = bool(finite) and min(finite) > 0 and max(finite) > LOG_RATIO * min(finite)
    if is_log:
        ax.set(**{f"{which}scale": "log"})
        axis = ax.xaxis if which == "x" else ax.yaxis
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    return is_log


def legend(figure: Figure, note: str = "") -> None:
    """Put one legend of all labels under the panels, in as many columns as fit, and make room for it."""
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(short(label, 64), handle)
    width, height = figure.get_size_inches()
    columns = max(1, min(len(handles), int(width / (0.65 + 0.08 * max(map(len, handles))))))
    figure.set_size_inches(width, height + 0.2 * math.ceil(len(handles) / columns))
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK, "title_fontsize": 9}
    place: Any = "outside lower center"
    drawn = figure.legend(handles.values(), handles, loc=place, ncols=columns, title=note or None, **style)
    drawn.get_title().set_color(SOFT)


class Line(NamedTuple):
    """A curve with its range; ``series`` decides its look, a dashed one has hollow markers."""

    label: str
    series: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dash: str = "-"
    width: float = 1.8


class Panel(NamedTuple):
    """Axes of lines; those that may be logarithmic are so where the values span decades."""

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    may_be_log: bool = False


def panels_figure(
    title: str, panels: Sequence[Panel], note: str = "", *, has_whiskers: bool = False, **shape: Any
) -> Figure:
    """Return the panels over one legend; ranges are bands, or whiskers: always for a single point.

    ``shape``: columns and size, as for ``grid``.
    """
    figure, axes = grid(title, len(panels), **shape)
    for ax, panel in zip(axes, panels, strict=True):
        styled(ax, panel.title, panel.xlabel, panel.ylabel)
        for line in panel.lines:
            style = look(line.series) | {"linewidth": line.width, "markersize": 4.5, "linestyle": line.dash}
            style |= {"label": line.label, "markevery": math.ceil(len(line.x) / MAX_MARKERS)}
            style |= {"markerfacecolor": PAPER} if line.dash == "--" else {}
            if has_whiskers or (len(line.x) == 1 and line.low):
                y, low, high = map(np.array, (line.y, line.low, line.high))
                ax.errorbar(line.x, y, yerr=np.maximum(np.stack([y - low, high - y]), 0), capsize=3, **style)
                continue
            ax.plot(line.x, line.y, **style)
            if list(line.low) != list(line.high):
                ax.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.16, linewidth=0)
        places = {place for line in panel.lines for place in line.x}
        if all(float(place).is_integer() for place in places):
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if len(places) == 1:
            ax.set_xlim(min(places) - 0.5, min(places) + 0.5)
        if panel.may_be_log:
            scaled(ax, "y", (value for line in panel.lines for value in line.y))
    legend(figure, note)
    return figure


def short_names(keys: Sequence[str]) -> list[str]:
    """Drop what all layers' names share: the metric, a leading module path, a trailing ``.weight``."""
    names = [key.removeprefix("wci/").replace(".weight[", "[").removesuffix(".weight") for key in keys]
    paths = [name.split(".") for name in names]
    while all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    return [short(".".join(path), 32) for path in paths]


def short(text: str, most: int) -> str:
    """Return a name of at most ``most`` characters: a longer one would leave no room for what it names."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 + most // 2 - most :]}"


def svg(figure: Figure, name: str) -> str:
    """Return the figure as an <svg> that follows the page's theme; its ids begin with ``name``.

    What a screen reader says is titles and axes.
    """
    stream = io.StringIO()
    metadata: Mapping[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    head, _, body = stream.getvalue().partition("</defs>")  # before it a style for all elements: the page's
    box = head.split('viewBox="')[1].split('"')[0]
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"(fill|stroke): (#\w{6})", lambda m: f"{m[1]}: {VARIABLES.get(m[2], m[2])}", body)
    texts = [figure.get_suptitle()]
    for ax in figure.axes:
        texts += [ax.get_title("left"), " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))]
    label = escape(". ".join(filter(None, texts)).replace("\n", " "))
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{body}'
