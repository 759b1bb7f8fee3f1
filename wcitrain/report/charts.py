"""Charts as inline SVG: lines against epochs, dots by name, heat maps.

A chart is a <figure> with its title as caption and real text; its label for screen readers says the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colormaps

from wcitrain.report.svg import (
    BOTTOM,
    CHARACTER,
    HEIGHT,
    LEFT,
    MAX_LABEL,
    RIGHT,
    TOP,
    WIDTH,
    Entry,
    Scale,
    Series,
    coordinate,
    figure,
    marker,
    path,
    plain,
    scale,
    series_group,
    summary,
    text_at,
    tick_text,
    ticks,
)

ROW_HEIGHT, CELL_HEIGHT = 20, 14
MAX_MARKERS = 10  # along a line
LEVELS = 48  # colours of a heat map


def line_chart(
    title: str,
    series: Sequence[Series],
    legend: Sequence[Entry],
    *,
    unit: str = "",
    x_label: str = "epoch",
    text: Callable[[float], str] = plain,
    is_log: bool = False,
    has_zero: bool = False,
    note: str = "",
) -> str:
    """Return lines in their bands; a single point has a whisker. ``has_zero`` draws the line at zero."""
    bottom, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    y = scale([v for s in series for v in (*s.y, *s.low, *s.high)] + [0.0] * has_zero, bottom, TOP, is_log)
    places = [v for s in series for v in s.x]
    first, last = min(places), max(places)
    around = 0 if last > first else 1
    x = Scale(first - around, last + around, LEFT + 8, end)
    body = []
    for tick in y.ticks():
        body.append(path("grid", f"M{LEFT},{coordinate(y(tick))}H{end}"))
        body.append(text_at(LEFT - 6, y(tick) + 4, tick_text(tick), anchor="end"))
    are_whole = all(float(place).is_integer() for place in places)
    for tick in ticks(first, last) if last > first else [first]:
        if not are_whole or float(tick).is_integer():
            body.append(text_at(x(tick), bottom + 17, tick_text(tick)))
    body.append(text_at(end, HEIGHT - 4, x_label, anchor="end"))
    body.append(path("axis", f"M{LEFT},{bottom}H{end}"))
    if has_zero:
        body.append(path("zero", f"M{LEFT},{coordinate(y(0))}H{end}"))
    said = []
    for s in series:
        points = [(x(a), y(b)) for a, b in zip(s.x, s.y, strict=True)]
        lows, highs = [y(v) for v in s.low], [y(v) for v in s.high]
        inner = ""
        if len(points) == 1 and lows:
            inner += path(
                "whisker", f"M{coordinate(points[0][0])},{coordinate(lows[0])}V{coordinate(highs[0])}"
            )
        elif lows != highs:
            outline = [(a, low) for (a, _), low in zip(points, lows, strict=True)]
            outline += [(a, high) for (a, _), high in zip(points[::-1], highs[::-1], strict=True)]
            inner += path(
                "band", "M" + "L".join(f"{coordinate(a)},{coordinate(b)}" for a, b in outline) + "z"
            )
        inner += '<polyline class="line" points="POINTS"/>'
        marked = points[:: -max(1, math.ceil(len(points) / MAX_MARKERS))]  # from the last one back
        inner += path("dot", "".join(marker(legend[s.entry].marker, a, b) for a, b in marked))
        at = [f"{x_label} {plain(v)}" for v in s.x]
        body.append(series_group(s, legend, points, inner, at, [text(v) for v in s.y]))
        said.append(f"{s.title(legend)} {text(s.y[-1])} at {at[-1]}")
    return figure(title, unit, WIDTH, HEIGHT, summary(title, unit, said), body, note)


def dot_chart(
    title: str,
    names: Sequence[str],
    series: Sequence[Series],
    legend: Sequence[Entry],
    *,
    unit: str = "",
    text: Callable[[float], str] = plain,
    is_log: bool = False,
    from_zero: bool = False,
    note: str = "",
) -> str:
    """Return one line a name, on it a dot with whiskers for each series; ``Series.x`` are places of names."""
    left, end = _name_width(names), WIDTH - RIGHT
    height = ROW_HEIGHT * (1.0 if len(series) <= 2 * len(names) else 1.3)
    bottom = TOP + height * len(names)
    x = scale([v for s in series for v in (*s.y, *s.low, *s.high)], left + 4, end - 6, is_log, from_zero)
    body = []
    for tick in x.ticks():
        body.append(path("grid", f"M{coordinate(x(tick))},{TOP}V{coordinate(bottom)}"))
        body.append(text_at(x(tick), bottom + 16, tick_text(tick)))
    for i, name in enumerate(names):
        body.append(text_at(left - 6, TOP + height * (i + 0.5) + 4, name, "name", "end"))
        body.append(path("grid", f"M{coordinate(left)},{coordinate(TOP + height * (i + 1))}H{end}"))
    said = []
    sharing = [sum(i in s.x for s in series) for i in range(len(names))]
    drawn = [0] * len(names)
    for s in series:
        points, whiskers = [], ""
        for j, (i, value) in enumerate(zip(map(int, s.x), s.y, strict=True)):
            # None hides another.
            middle = TOP + height * (i + 0.5 + 0.6 * ((drawn[i] + 0.5) / sharing[i] - 0.5))
            drawn[i] += 1
            points.append((x(value), middle))
            if len(s.low) and s.low[j] < s.high[j]:  # false for NaN
                whiskers += f"M{coordinate(x(s.low[j]))},{coordinate(middle)}H{coordinate(x(s.high[j]))}"
        inner = path("whisker", whiskers) if whiskers else ""
        inner += '<polyline class="none" points="POINTS"/>'
        inner += path("dot", "".join(marker(legend[s.entry].marker, a, b, 3.8) for a, b in points))
        at, values = [names[int(i)] for i in s.x], [text(v) for v in s.y]
        body.append(series_group(s, legend, points, inner, at, values))
        said += [
            f"{name} {s.name or s.title(legend)} {value}" for name, value in zip(at, values, strict=True)
        ]
    return figure(title, unit, WIDTH, bottom + 24, summary(title, unit, said), body, note)


def heat_map(
    title: str,
    names: Sequence[str],
    epochs: Sequence[int],
    values: np.ndarray,
    low: float,
    high: float,
    is_log: bool,
) -> str:
    """Return ``values`` [names, epochs] as colours from dark ``low`` to bright ``high``; empty: missing."""
    left, end = _name_width(names), WIDTH - RIGHT
    width = (end - left) / len(epochs)
    bottom = TOP + CELL_HEIGHT * len(names)
    cells: dict[int, str] = {}  # one path a colour
    for (i, j), value in np.ndenumerate(values):
        if math.isfinite(value):
            level = _level(value, low, high, is_log)
            corner = f"M{coordinate(left + j * width)},{TOP + CELL_HEIGHT * i}"
            cells[level] = cells.get(level, "") + f"{corner}h{width:.2f}v{CELL_HEIGHT}h-{width:.2f}z"
    body = [
        f'<path class="cell" fill="{_colour(level)}" d="{squares}"/>'
        for level, squares in sorted(cells.items())
    ]
    for i, name in enumerate(names):
        body.append(text_at(left - 6, TOP + CELL_HEIGHT * (i + 0.5) + 4, name, "name small", "end"))
    for j in range(0, len(epochs), max(1, math.ceil(30 / width))):
        body.append(text_at(left + (j + 0.5) * width, bottom + 16, str(epochs[j])))
    body.append(text_at(end, bottom + 32, "epoch", anchor="end"))
    label = (
        f"{title}: {len(names)} layers, epochs {epochs[0]} to {epochs[-1]}, values {plain(low)} to "
        f"{plain(high)}"
    )
    return figure(title, "", WIDTH, bottom + 38, label, body)


def colour_key(low: float, high: float, is_log: bool) -> str:
    """Return the scale of the heat maps: a strip between its ends."""
    stops = ", ".join(_colour(level) for level in range(0, LEVELS, 4))
    strip = f'<span class="strip" style="background:linear-gradient(90deg, {stops})"></span>'
    kind = "logarithmic" if is_log else "linear"
    ends = f"<span>{plain(low)}</span>{strip}<span>{plain(high)}</span>"
    return f'<p class="key">{ends}<span>({kind})</span></p>\n'


def _name_width(names: Sequence[str]) -> float:
    return 12 + CHARACTER * min(MAX_LABEL, max(len(name) for name in names))


def _level(value: float, low: float, high: float, is_log: bool) -> int:
    if high <= low:
        return LEVELS // 2
    share = math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def _colour(level: int) -> str:
    red, green, blue, _ = colormaps["viridis"](level / (LEVELS - 1), bytes=True)
    return f"#{red:02x}{green:02x}{blue:02x}"
