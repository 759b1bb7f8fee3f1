"""Figures of evaluations, measures and studies: plain data in, a figure out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wcitrain.attacks import Norm
from wcitrain.evaluation.evaluation import WORST, Evaluation
from wcitrain.evaluation.intervals import wilson_interval
from wcitrain.measures.landscape import Landscape
from wcitrain.measures.wci import WCIMeasurement
from wcitrain.report import drawing
from wcitrain.report.drawing import INK, Line, Panel, grid, legend, look, panels_figure, scaled, styled

DASHES = ("-", "--", "-.", ":")
NUM_LEVELS = 16  # of a landscape's contours
NORMALISED = {"random": "filter-normalised", "layer": "layer-normalised"}  # directions of a landscape
WIDE = (7.0, 4.2)  # inches of a single panel


def accuracy_curve(evaluation: Evaluation, norm: Norm, title: str) -> Figure:
    """Return a figure of the accuracies within the balls of one norm, from the clean one at radius 0.

    Bars are 95 % intervals. With several attacks the worst case of each radius is dark. Points at one radius
    are drawn beside each other.
    """
    threats = sorted((t for t in evaluation.threats if t.norm == norm and t.eps > 0), key=lambda t: t.eps)
    attacks = list(dict.fromkeys(r.attack for r in evaluation.attacks if r.threat in threats))
    radii = np.array([0.0, *(threat.eps for threat in threats)])
    names = [*attacks, *([WORST] if len(attacks) > 1 else [])]
    apart = min(0.008 * radii.max(), 0.5 * np.diff(radii).min(initial=1.0) / len(names))
    lines = []
    for k, name in enumerate(names):
        is_worst = name == WORST
        robust = [evaluation.worst(t) if is_worst else evaluation.result(t, name).is_robust for t in threats]
        shares = [float(flags.double().mean()) for flags in (evaluation.is_clean, *robust)]
        ends = [wilson_interval(share, evaluation.num_examples) for share in shares]
        y, low, high = (100 * np.array([shares, *zip(*ends, strict=True)])).tolist()
        x = (radii + (k - (len(names) - 1) / 2) * apart).tolist()
        lines.append(Line(name, 6 if is_worst else k, x, y, low, high, DASHES[k % len(DASHES)]))
    xlabel, ylabel = f"{norm} radius (images in [0, 1])", "accuracy in % ± 95 % interval"
    figure = panels_figure(title, [Panel("", xlabel, ylabel, lines, has_whiskers=True)], size=WIDE)
    shown = {0.0: "0"}
    for threat in threats:
        if threat.eps - max(shown) > 0.08 * radii.max():  # a label takes less than 8 % of the axis
            shown[threat.eps] = str(threat).removeprefix(f"{norm} ")
    figure.axes[0].set_xticks(list(shown), list(shown.values()))
    figure.axes[0].set_ylim(0, 100)
    return figure


def layer_bars(measurement: WCIMeasurement, title: str) -> Figure:
    """Return a figure with one bar a layer, input on top: length WCI_l, whisker ± one standard error.

    Beside the bars stands each layer's share of the sum.
    """
    values, errors = measurement.per_layer.numpy(), measurement.per_layer_stderr.numpy()
    figure = drawing.empty_figure(10, 1.7 + max(0.24 * len(values), 1.0), title)
    ax = styled(figure.subplots(), xlabel="WCI of the layer ± standard error, and its share")
    places, whiskers = np.arange(len(values)), np.where(np.isfinite(errors), errors, 0.0)
    ax.barh(places, values, height=0.72, color=drawing.SERIES[0])
    # A bar ends at zero: the index has no negative values.
    reach = [np.minimum(whiskers, values), whiskers]
    ax.errorbar(values, places, xerr=reach, fmt="none", ecolor=INK, elinewidth=1.2)
    style: Any = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": drawing.SOFT}
    for place, end, share in zip(places, values + whiskers, measurement.shares.tolist(), strict=True):
        ax.annotate(f"{100 * share:.1f} %" if math.isfinite(share) else "", (end, place), (4, 0), **style)
    ax.set_yticks(places, drawing.short_names(measurement.layers))
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.set_xlim(0, 1.12 * max(float((values + whiskers).max()), 1e-9))
    return figure


def landscape(losses: Landscape, title: str = "") -> Figure:
    """Return sections as curves with the range over directions, or two planes on one colour scale."""
    kind = NORMALISED.get(losses.directions, losses.directions)
    protocol = f"{kind} directions, {losses.attack}, {losses.num_examples} examples"
    title = f"{title}\n{protocol}" if title else protocol
    kinds = ("clean",) if losses.attack == "clean" else ("clean", "robust")
    values = {f"{kind} loss": getattr(losses, kind) for kind in kinds}  # [D, P] or [P, P]
    if losses.is_plane:
        return _planes(values, losses.alphas, title)
    lines = []
    for i, (name, array) in enumerate(values.items()):
        numbers = (array.mean(0).tolist(), array.min(0).tolist(), array.max(0).tolist())
        lines.append(Line(name, i, losses.alphas.tolist(), *numbers, dash=("--", "-")[i]))
    num = len(losses.clean)
    over = "one direction" if num == 1 else f"mean and range over {num} directions"
    panel = Panel("", "distance α, relative to the weights’ norm", f"cross-entropy ({over})", lines)
    figure = panels_figure(title, [panel], size=WIDE)
    figure.axes[0].set_ylim(bottom=0)
    return figure


def _planes(planes: Mapping[str, np.ndarray], alphas: np.ndarray, title: str) -> Figure:
    figure, axes = grid(title, len(planes), 2, (4.6, 4.4))
    every = np.concatenate([values.ravel() for values in planes.values()])
    # Equal steps of the square root: the basin shows beside walls ten times as high.
    low, high = np.sqrt(every.min()), np.sqrt(max(every.max(), every.min() + 1e-9))
    levels = np.linspace(low, high, NUM_LEVELS) ** 2
    for ax, (name, values) in zip(axes, planes.items(), strict=True):
        styled(ax, name, "first direction, α / ‖W‖", "second direction, α / ‖W‖").grid(False)
        place: Any = (alphas, alphas, values.T)  # the first direction runs to the right
        drawn = ax.contourf(*place, levels=levels, cmap="cividis", extend="both")
        ax.contour(*place, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        ax.plot(0, 0, "o", color="white", markeredgecolor=INK, markersize=7)
        ax.set_aspect("equal")
    bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.02, ticks=levels[::3], format="%.3g")
    bar.outline.set_visible(False)
    styled(bar.ax, ylabel="cross-entropy (steps of its root)").grid(False)
    return figure


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
    figure, axes = grid("", len(panels), 4, (3.4, 2.9))
    kinds = list(dict.fromkeys(groups))
    y, which = np.asarray(target, dtype=float), np.array([kinds.index(group) for group in groups])
    for ax, (name, values) in zip(axes, panels.items(), strict=True):
        x = np.asarray(values, dtype=float)
        styled(ax, "\n".join(filter(None, (name.replace("_", " "), notes.get(name)))))
        for k, kind in enumerate(kinds):
            ax.plot(x[which == k], y[which == k], linestyle="", markersize=4.5, label=kind, **look(k))
        if not scaled(ax, "x", values):
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.ticklabel_format(axis="x", scilimits=(-3, 4))
    figure.supylabel(target_name, fontsize=9, color=INK)
    legend(figure)
    return figure


@dataclass(frozen=True)
class Point:
    """One run at one epoch: its folder, the epoch, and measures by name."""

    run: Path
    epoch: int
    measures: Mapping[str, float]


def measures_through_training(points: Sequence[Point]) -> Figure | None:
    """Return measures at every kept epoch (Stutz et al. 2021, figure 5), a panel a measure; None without.

    A ring is where early stopping would have stopped, where that epoch was kept; else at the kept epoch
    before it.
    """
    panels: list[Panel] = []
    rings: list[tuple[int, str, float, float]] = []
    for name in dict.fromkeys(name for point in points for name in point.measures):
        lines = []
        for k, run in enumerate(dict.fromkeys(point.run for point in points)):
            members = sorted((point for point in points if point.run == run), key=lambda point: point.epoch)
            epochs, values = [p.epoch for p in members], [p.measures.get(name, math.nan) for p in members]
            lines.append(Line(run.name, k, epochs, values))
            best = _best_epoch(run)
            before = [place for place in zip(epochs, values, strict=True) if place[0] <= best]
            rings += [(len(panels), look(k)["color"], *place) for place in before[-1:]]
        panels.append(Panel("", "epoch", name.replace("_", " "), lines, may_be_log=True))
    if not panels:
        return None
    note = "Rings: the epoch best by robust validation accuracy (or the kept epoch before it)"
    figure = panels_figure("", panels, note, columns=2, size=(5.4, 3.4))
    style: dict[str, Any] = {
        "marker": "o",
        "markersize": 11,
        "markerfacecolor": "none",
        "markeredgewidth": 1.6,
    }
    for place, colour, epoch, value in rings:
        figure.axes[place].plot(epoch, value, markeredgecolor=colour, **style)
    return figure


def _best_epoch(run: Path) -> float:
    """Return the best epoch by validation; -inf while nobody knows it."""
    try:
        return float(json.loads((run / "summary.json").read_text("utf-8"))["best"]["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf


def measures_against_loss(points: Sequence[Point]) -> Figure | None:
    """Return the robust loss against every other measure at all kept epochs (Stutz et al. 2021, figure 1)."""
    names = dict.fromkeys(name for point in points for name in point.measures)
    values = {name: [point.measures.get(name, math.nan) for point in points] for name in names}
    losses = values.pop("robust_loss", [])
    return scatter_page(values, {}, losses, "robust loss", [p.run.name for p in points]) if losses else None
