"""Draw every trace estimator against its number of probes, with its error band, around the exact value.

    PYTHONPATH=tests python tools/draw_estimators.py [--out recipes/results/estimators]

Two networks, trained for 150 steps on 256 of scikit-learn's digits in float64 by mean cross-entropy: ReLU,
where the Hessian's and the Gauss–Newton trace agree, and GELU, where they do not. The trace is that of the
first layer, exact values are the dense oracle's. A band is the estimate ± one standard error as reported. The
x axis counts products with the Hessian (hutchinson) or draws of signs (gauss_newton).
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from oracles import exact_gauss_newton_trace, exact_trace
from sklearn.datasets import load_digits
from torch import Tensor, nn

from wcitrain.curvature import TraceEstimate, cross_entropy
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.hutchinson import hutchinson_samples
from wcitrain.params import select_layers
from wcitrain.seeding import generator_from

BUDGETS = [6, 12, 24, 48, 96, 192, 384, 768]
COLORS = {
    "hutchinson": "#0072B2",
    "hutchinson, block probes": "#56B4E9",
    "gauss_newton": "#D55E00",
}


def trained(activation: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a small network that fits the digits well, and the digits."""
    torch.manual_seed(0)
    x = torch.tensor(load_digits().data[:256] / 16)
    y = torch.tensor(load_digits().target[:256])
    parts = nn.Linear(64, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 10)
    model = nn.Sequential(*parts).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, x, y


def estimates(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[TraceEstimate]]:
    """Return every estimator's result at every budget, independent of the others."""
    layers = select_layers(model)

    def loss() -> object:
        return cross_entropy(model(x), y)

    found: dict[str, list[TraceEstimate]] = {name: [] for name in COLORS}
    for budget in BUDGETS:
        g = generator_from("cpu", "figure", budget)
        probes = {"num_probes": budget, "generator": g}
        samples = {
            "hutchinson": hutchinson_samples(loss(), layers, **probes),
            "hutchinson, block probes": torch.cat(
                [hutchinson_samples(loss(), {n: t}, **probes) for n, t in layers.items()], 1
            ),
            "gauss_newton": gauss_newton_samples(loss(), layers, **probes),
        }
        for name, draws in samples.items():
            found[name].append(TraceEstimate.from_samples(draws))
    return found


def main() -> None:
    """Compute, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("recipes/results/estimators"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2)
    record: dict[str, object] = {"budgets": BUDGETS}
    line = {"color": "#333333", "linewidth": 1.2}
    for ax, activation in zip(axes, (nn.ReLU, nn.GELU), strict=True):
        model, x, y = trained(activation)
        layers = select_layers(model)
        hessian = float(exact_trace(cross_entropy(model(x), y), layers)[0])
        gauss_newton = float(exact_gauss_newton_trace(cross_entropy(model(x), y), layers)[0])
        found = {}
        for name, results in estimates(model, x, y).items():
            mean = torch.tensor([float(e.mean[0]) for e in results])
            stderr = torch.tensor([float(e.stderr[0]) for e in results])
            found[name] = {"mean": mean.tolist(), "stderr": stderr.tolist()}
            ax.plot(BUDGETS, mean, color=COLORS[name], marker="o", markersize=3, label=name)
            low, high = mean - stderr, mean + stderr
            ax.fill_between(BUDGETS, low, high, color=COLORS[name], alpha=0.18, linewidth=0)
        record[activation.__name__] = {"hessian": hessian, "gauss_newton": gauss_newton, "estimates": found}
        ax.axhline(hessian, label="exact: Hessian", **line)
        if abs(gauss_newton - hessian) > 1e-6 * abs(hessian):
            ax.axhline(gauss_newton, linestyle="--", label="exact: Gauss–Newton", **line)
        ax.set_xscale("log")
        ax.set_title(f"{activation.__name__} network, first layer", loc="left", fontsize=11)
        ax.set_xlabel("probes")
        ax.set_ylabel("trace")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#E6E6E6", linewidth=0.8)
        last = [found[name]["mean"][-1] for name in COLORS]
        ax.set_ylim(0, 1.35 * max(hessian, gauss_newton, *last))
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out.with_suffix(".png"))
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1))
    print(f"Written: {options.out.with_suffix('.png')}, {options.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
