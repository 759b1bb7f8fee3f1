"""The curve of an evaluation: robust accuracy against the radius, one line an attack."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wcitrain.attacks import Norm
from wcitrain.evaluation.evaluation import WORST, Evaluation
from wcitrain.evaluation.intervals import wilson_interval

DPI = 150
INK = "#333333"
MARKERS, LINES = "osD^vP", ("-", "--", "-.", ":")
# Okabe and Ito: told apart by everybody.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def accuracy_curve(evaluation: Evaluation, norm: Norm, title: str) -> Figure:
    """Return a figure of the accuracies within the balls of one norm, from the clean one at radius 0.

    Bars are 95 % intervals. With several attacks the worst case of each radius is black. Points at one radius
    are drawn beside each other. pyplot knows nothing about the figure.
    """
    threats = sorted(
        (t for t in evaluation.threats if t.norm == norm and t.eps > 0), key=lambda threat: threat.eps
    )
    attacks = list(dict.fromkeys(r.attack for r in evaluation.attacks if r.threat in threats))
    figure = Figure(figsize=(7, 4.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK, wrap=True)
    ax = figure.subplots()
    radii = np.array([0.0, *(threat.eps for threat in threats)])
    names = [*attacks, *([WORST] if len(attacks) > 1 else [])]
    apart = min(0.008 * radii.max(), 0.5 * np.diff(radii).min(initial=1.0) / len(names))
    for k, name in enumerate(names):
        flags = [
            evaluation.worst(t) if name == WORST else evaluation.result(t, name).is_robust for t in threats
        ]
        shares = np.array([float(values.double().mean()) for values in (evaluation.is_clean, *flags)])
        ends = np.array([wilson_interval(float(share), evaluation.num_examples) for share in shares])
        reach = np.abs(ends.T - shares)
        colour = INK if name == WORST else COLOURS[k % len(COLOURS)]
        ax.errorbar(
            radii + (k - (len(names) - 1) / 2) * apart,
            100 * shares,
            yerr=100 * reach,
            label=name,
            color=colour,
            marker=MARKERS[k % len(MARKERS)],
            markersize=4.5,
            linestyle=LINES[k % len(LINES)],
            capsize=3,
            linewidth=1.4,
        )
    shown = {0.0: "0"}
    for threat in threats:
        if threat.eps - max(shown) > 0.08 * radii.max():  # a label takes less than 8 % of the axis
            shown[threat.eps] = str(threat).removeprefix(f"{norm} ")
    ax.set_xticks(list(shown), list(shown.values()))
    ax.set_ylim(0, 100)
    ax.set_xlabel(f"{norm} radius (images in [0, 1])", fontsize=11, color=INK)
    ax.set_ylabel("accuracy in % ± 95 % interval", fontsize=11, color=INK)
    ax.tick_params(labelsize=9, colors=INK, length=0)
    ax.grid(color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
    ax.legend(frameon=False, fontsize=9)
    return figure
