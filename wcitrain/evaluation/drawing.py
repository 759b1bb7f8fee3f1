"""The curve of an evaluation: robust accuracy against the radius, one line an attack."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wcitrain.attacks import Norm
from wcitrain.evaluation.evaluation import WORST, Evaluation
from wcitrain.evaluation.intervals import wilson_interval

DPI = 150
INK = "#333333"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by everybody


def accuracy_curve(evaluation: Evaluation, norm: Norm, title: str) -> Figure:
    """Return a figure of the accuracies within the balls of one norm, from the clean one at radius 0; bars are 95 % intervals.

    With several attacks the worst case of each radius is black. pyplot knows nothing about the figure.
    """
    threats = sorted((t for t in evaluation.threats if t.norm == norm), key=lambda threat: threat.eps)
    attacks = list(dict.fromkeys(r.attack for r in evaluation.attacks if r.threat in threats))
    figure = Figure(figsize=(7, 4.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=INK, wrap=True)
    ax = figure.subplots()
    radii = np.array([0.0, *(threat.eps for threat in threats)])
    for k, name in enumerate([*attacks, *([WORST] if len(attacks) > 1 else [])]):
        flags = [evaluation.worst(t) if name == WORST else evaluation.result(t, name).is_robust for t in threats]
        shares = np.array([float(values.double().mean()) for values in (evaluation.is_clean, *flags)])
        ends = np.array([wilson_interval(float(share), evaluation.num_examples) for share in shares])
        reach = np.abs(ends.T - shares)
        colour = INK if name == WORST else COLOURS[k % len(COLOURS)]
        ax.errorbar(
            radii,
            100 * shares,
            yerr=100 * reach,
            label=name,
            color=colour,
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.4,
        )
    ax.set_xticks(radii, ["0", *(str(threat).removeprefix(f"{norm} ") for threat in threats)])
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
