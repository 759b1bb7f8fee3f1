"""Figures of evaluations, measures, studies and images: plain data in, a figure out."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from wcitrain.attacks import Attack, Norm
from wcitrain.evaluation.intervals import wilson_interval
from wcitrain.evaluation.results import WORST, Evaluation
from wcitrain.measures.landscape import Landscape
from wcitrain.measures.wci import WCIMeasurement
from wcitrain.preserve import full_precision, undisturbed
from wcitrain.report import drawing
from wcitrain.report.drawing import INK, SOFT, Line, Panel, grid, legend, look, panels_figure, scaled, styled
from wcitrain.seeding import generator_from

DASHES = ("-", "--", "-.", ":")
NUM_LEVELS = 16  # of a landscape's contours
NORMALISED = {"random": "filter-normalised", "layer": "layer-normalised"}  # directions of a landscape
WIDE = (7.0, 4.2)  # inches of a single panel
NUM_IMAGES = 8
MAX_PIXELS = 96  # of an edge; larger images are drawn smaller
Points = Sequence[tuple[Path, int, Mapping[str, float]]]  # one run at one epoch, and measures by name


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
        found = {
            r.threat.eps: r.is_robust for r in evaluation.attacks if r.threat in threats and r.attack == name
        }
        robust = {t.eps: evaluation.worst(t) for t in threats} if is_worst else dict(sorted(found.items()))
        shares = [float(flags.double().mean()) for flags in (evaluation.is_clean, *robust.values())]
        ends = [wilson_interval(share, evaluation.num_examples) for share in shares]
        y, low, high = (100 * np.array([shares, *zip(*ends, strict=True)])).tolist()
        x = (np.array([0.0, *robust]) + (k - (len(names) - 1) / 2) * apart).tolist()
        lines.append(Line(name, 6 if is_worst else k, x, y, low, high, DASHES[k % len(DASHES)]))
    panel = Panel("", f"{norm} radius (images in [0, 1])", "accuracy in % ± 95 % interval", lines)
    figure = panels_figure(title, [panel], size=WIDE, has_whiskers=True)
    shown = {0.0: "0"}
    for threat in threats:
        if threat.eps - max(shown) > 0.08 * radii.max():  # a label takes less than 8 % of the axis
            shown[threat.eps] = str(threat).removeprefix(f"{norm} ")
    figure.axes[0].set_xticks(list(shown), list(shown.values()))
    figure.axes[0].set_ylim(0, 100)
    return figure


def minimal_curves(curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], title: str) -> Figure:
    """Return a figure of accuracies against the radius, see ``MinimalEps.curve``, by norm and name."""
    panels = []
    for norm, by_name in curves.items():
        lines = []
        for k, (name, curve) in enumerate(by_name.items()):
            y, low, high = ([100 * share for share in curve[key]] for key in ("accuracy", "low", "high"))
            lines.append(Line(name, k, curve["eps"], y, low, high))
        panels.append(Panel("", f"{norm} radius (images in [0, 1])", "accuracy in %, 95 % interval", lines))
    figure = panels_figure(title, panels, columns=2, size=WIDE)
    for ax in figure.axes:
        ax.set_ylim(0, 100)
    return figure


def layer_bars(measurement: WCIMeasurement, title: str) -> Figure:
    """Return a figure with one bar a layer, input on top: length WCI_l, whisker ± one standard error.

    Beside the bars stands each layer's share of the sum, or that its trace is negative: then it has no bar.
    """
    names, columns = measurement.shown()
    values, errors = np.nan_to_num(columns["wci"].numpy()), columns["wci_stderr"].numpy()
    notes = [f"{100 * share:.1f} %" if math.isfinite(share) else "" for share in columns["share"].tolist()]
    notes = [note if x == x else "negative trace" for note, x in zip(notes, columns["wci"], strict=True)]
    figure, (ax,) = grid(title, size=(10, 1.0 + max(0.24 * len(values), 1.0)))
    styled(ax, xlabel="WCI of the layer ± standard error, and its share")
    places, whiskers = np.arange(len(values)), np.where(np.isfinite(errors), errors, 0.0)
    ax.barh(places, values, height=0.72, color=drawing.SERIES[0])
    # A bar ends at zero: the index has no negative values.
    reach = [np.minimum(whiskers, values), whiskers]
    ax.errorbar(values, places, xerr=np.stack(reach), fmt="none", ecolor=INK, elinewidth=1.2)
    style: Any = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": SOFT}
    for place, end, note in zip(places, values + whiskers, notes, strict=True):
        ax.annotate(note, (end, place), (4, 0), **style)
    ax.set_yticks(places, drawing.short_names(names))
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
    over = f"cross-entropy (mean and range over directions: {len(losses.clean)})"
    panel = Panel("", "distance α, relative to the weights’ norm", over, lines)
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
    """Return a figure of target [M] against measures [M], a panel each, a marker a group [M]; None without.

    ``notes`` are lines under the titles.
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


def measures_through_training(points: Points, best: Mapping[Path, float]) -> Figure | None:
    """Return measures at every kept epoch (Stutz et al. 2021, figure 5), a panel a measure; None without.

    A ring is at the ``best`` epoch of a run, where that was kept; else at the kept epoch before it.
    """
    panels: list[Panel] = []
    rings: list[tuple[int, str, int, float]] = []
    for name in dict.fromkeys(name for *_, values in points for name in values):
        lines = []
        for k, run in enumerate(dict.fromkeys(run for run, *_ in points)):
            curve = {epoch: values.get(name, math.nan) for one, epoch, values in points if one == run}
            curve = dict(sorted(curve.items()))
            lines.append(Line(run.name, k, [*curve], [*curve.values()]))
            before = [epoch for epoch in curve if epoch <= best.get(run, math.nan)]
            rings += [(len(panels), look(k)["color"], epoch, curve[epoch]) for epoch in before[-1:]]
        panels.append(Panel("", "epoch", name.replace("_", " "), lines, may_be_log=True))
    if not panels:
        return None
    note = "Rings: the epoch best by robust validation accuracy (or the kept epoch before it)"
    figure = panels_figure("", panels, note, columns=2, size=(5.4, 3.4))
    style: Any = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.6}
    for place, colour, epoch, value in rings:
        figure.axes[place].plot(epoch, value, markeredgecolor=colour, **style)
    return figure


def measures_against_loss(points: Points) -> Figure | None:
    """Return the robust loss against every other measure at all kept epochs (Stutz et al. 2021, figure 1)."""
    names = dict.fromkeys(name for *_, values in points for name in values)
    panels = {name: [values.get(name, math.nan) for *_, values in points] for name in names}
    losses, runs = panels.pop("robust_loss", []), [run.name for run, *_ in points]
    return scatter_page(panels, {}, losses, "robust loss", runs) if losses else None


def strip(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, title: str = "", *, seed: int = 0
) -> Figure:
    """Attack up to ``NUM_IMAGES`` images and draw them: clean, adversarial, and the magnified difference.

    Over the columns stand the labels, over the images the model's predictions, in colour where wrong.

    ``x`` [N, C, H, W] in [0, 1] and ``y`` [N] are on the model's device; ``seed`` is of the random starts.
    """
    x, y = x[:NUM_IMAGES], y[:NUM_IMAGES]
    with undisturbed(model, training=False), full_precision(model):
        generator = generator_from(x.device, seed, "report images")
        x_adv = attack(model, x, y, generator)
        with torch.no_grad():
            predictions = [model(images).argmax(1).tolist() for images in (x, x_adv)]
    factor = 0.5 / max(float((x_adv - x).abs().max()), 1e-12)
    images = {"clean": x, "adversarial": x_adv, f"difference\n× {factor:.3g}": 0.5 + factor * (x_adv - x)}
    figure, axes = grid(f"{title}, {attack.threat}".removeprefix(", "), 3 * len(x), len(x), (0.85, 0.87))
    for i, (name, batch) in enumerate(images.items()):
        if max(batch.shape[2:]) > MAX_PIXELS:
            batch = F.interpolate(batch, scale_factor=MAX_PIXELS / max(batch.shape[2:]), mode="area")
        pixels = batch.float().clamp(0, 1).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()
        axes[i * len(x)].set_ylabel(name, fontsize=8, color=INK)
        for k, label in enumerate(y.tolist()):
            ax = axes[i * len(x) + k]
            ax.imshow(pixels[k], interpolation="none")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if i < 2:
                text = f"label {label}\n" * (i == 0) + f"→ {predictions[i][k]}"
                colour = SOFT if predictions[i][k] == label else drawing.SERIES[1]
                ax.set_title(text, fontsize=8, color=colour)
    return figure
