"""The parts of a chart as inline SVG: legend entries, series, scales, ticks, markers, the figure around them.

Colours are CSS classes, so that they follow the theme. In a series ``points`` holds its pixels and ``data-x``
and ``data-y`` its values as text, so that a script can show the value under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from wcitrain.report.runs import MISSING

WIDTH, HEIGHT = 480, 270  # of the drawing area in SVG units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 38
CHARACTER = 7.4  # width of a character of the axis labels, on the wide side
MAX_LABEL = 30  # longer names on an axis are cut in the middle


@dataclass(frozen=True)
class Entry:
    """One entry of the legend: a label and how its series look."""

    label: str
    colour: int  # of the classes c0 to c7
    marker: int  # below NUM_MARKERS
    is_finished: bool = True


@dataclass(frozen=True)
class Series:
    """Values of one legend entry: against epochs, or against the places of names (whole ``x``).

    ``low`` and ``high`` bound a band or whiskers. An entry's second series is dashed with hollow markers.
    """

    entry: int
    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    is_second: bool = False

    def title(self, legend: Sequence[Entry]) -> str:
        """Return the label of its entry and its own name."""
        return f"{legend[self.entry].label}, {self.name}" if self.name else legend[self.entry].label


def plain(value: float) -> str:
    """Return a value with four significant digits."""
    return f"{value:.4g}" if math.isfinite(value) else MISSING


def ticks(low: float, high: float, is_log: bool = False, count: int = 6) -> list[float]:
    """Return round numbers inside [low, high]: at most ``count`` + 1 multiples of 1, 2 or 5 times 10^k."""
    if is_log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        decades = math.log10(high / low)
        factors = (1, 2, 5) if decades < 1.2 else (1, 3) if decades < 3 else (1,)
        skip = max(1, math.ceil((last - first) / 6))
        places = [f * 10.0**e for e in range(first, last + 1, skip) for f in factors]
    else:
        rough = (high - low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
        places = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [p for p in places if low * (1 - 1e-9) - 1e-300 <= p <= high * (1 + 1e-9)] if is_log else places


def tick_text(value: float) -> str:
    """Return an axis number: 0.25, 1000, 2e5."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Return round numbers on the scale."""
        return ticks(self.low, self.high, self.is_log, count)


def scale(values: Sequence[float], start: float, end: float, is_log: bool, from_zero: bool = False) -> Scale:
    """Return a scale with a margin around the finite values."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not is_log)] or [0.5]
    low, high = min(finite), max(finite)
    if is_log:
        margin = max((high / low) ** 0.05, 1.05)
        return Scale(low / margin, high * margin, start, end, True)
    low, high = (min(low, 0.0), max(high, 0.0)) if from_zero else (low, high)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    is_floor = from_zero and low == 0
    return Scale(low - margin * (not is_floor), high + margin, start, end)


def coordinate(value: float) -> str:
    """Return a pixel with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


_ARM = ((0.45, -1.2), (0.45, -0.45), (1.2, -0.45))  # a quarter of the cross, turned by right angles
_CORNERS = (  # in radii; of all markers but the circle
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    ((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
    (*_ARM, *((-y, x) for x, y in _ARM), *((-x, -y) for x, y in _ARM), *((y, -x) for x, y in _ARM)),
)
NUM_MARKERS = 1 + len(_CORNERS)


def marker(kind: int, x: float, y: float, r: float = 3.4) -> str:
    """Return one marker as a subpath: circle, square, triangle, diamond, triangle down, cross."""
    if kind == 0:
        half = f"a{r},{r} 0 1 0"
        return (
            f"M{coordinate(x - r)},{coordinate(y)}{half} {coordinate(2 * r)},0{half} {coordinate(-2 * r)},0z"
        )
    return (
        "M"
        + "L".join(f"{coordinate(x + r * a)},{coordinate(y + r * b)}" for a, b in _CORNERS[kind - 1])
        + "z"
    )


def swatch(entry: Entry) -> str:
    """Return the drawing of a legend entry."""
    line = f'<path class="line{" thin" * (not entry.is_finished)}" d="M1,7H25"/>'
    dot = f'<path class="dot" d="{marker(entry.marker, 13, 7, 4)}"/>'
    return f'<svg class="swatch c{entry.colour}" viewBox="0 0 26 14" aria-hidden="true">{line}{dot}</svg>'


def path(class_: str, commands: str) -> str:
    """Return a path of a class."""
    return f'<path class="{class_}" d="{commands}"/>'


def series_group(
    series: Series,
    legend: Sequence[Entry],
    points: Sequence[tuple[float, float]],
    inner: str,
    x: Sequence[str],
    y: Sequence[str],
) -> str:
    """Return a series: ``inner`` with its pixels for POINTS, and its values for the script."""
    entry = legend[series.entry]
    pixels = " ".join(f"{coordinate(a)},{coordinate(b)}" for a, b in points)
    second = " second" if series.is_second else ""
    thin = "" if entry.is_finished else " thin"
    return (
        f'<g class="series c{entry.colour}{second}{thin}" data-entry="{series.entry}" '
        f'data-name="{escape(series.title(legend))}" '
        f'data-x="{escape("|".join(x))}" data-y="{escape("|".join(y))}">{inner.replace("POINTS", pixels)}</g>'
    )


def figure(
    title: str, unit: str, width: float, height: float, label: str, body: Sequence[str], note: str = ""
) -> str:
    """Return the <figure>; ``label`` is what a screen reader says."""
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{unit}</figcaption>'
        f'<svg viewBox="0 0 {coordinate(width)} {coordinate(height)}" role="img" '
        f'aria-label="{escape(label)}">{"".join(body)}</svg>{note}</figure>\n'
    )


def summary(title: str, unit: str, parts: Sequence[str]) -> str:
    """Return the text that stands for a chart: its title and its last values."""
    shown = "; ".join(parts[:8]) + (f"; and {len(parts) - 8} more" if len(parts) > 8 else "")
    return f"{title}{f', {unit}' if unit else ''}: {shown}"


def text_at(x: float, y: float, text: str, class_: str = "tick", anchor: str = "middle") -> str:
    """Return text at a place; a name too long for an axis is cut in the middle and whole in its title."""
    title = f"<title>{escape(text)}</title>" if len(text) > MAX_LABEL else ""
    place = f'x="{coordinate(x)}" y="{coordinate(y)}" text-anchor="{anchor}"'
    return f'<text class="{class_}" {place}>{title}{escape(shortened(text))}</text>'


def shortened(name: str) -> str:
    """Return a name of at most ``MAX_LABEL`` characters."""
    half = (MAX_LABEL - 1) // 2
    return name if len(name) <= MAX_LABEL else f"{name[:half]}…{name[-half:]}"
