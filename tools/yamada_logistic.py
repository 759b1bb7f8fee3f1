"""Adversarial training sharpens the loss landscape, in linear logistic regression.

    python tools/yamada_logistic.py recipes/yamada_logistic.yaml [--out FOLDER]

Writes results.json and results.png, in under a minute. After Yamada et al. 2021 (arXiv 2102.02950): for every
data set, norm and radius eps, weights are trained to the end on the closed-form robust loss, and as a control
on random noise of the same norm. Measured at the end, on the training loss: the largest eigenvalue and the
trace of the Hessian, WCI = sqrt(‖w‖² Tr H), the rise of the loss at the normalised distance ‖w‖; and the
clean and robust test error. Images are centred between the class means, so that no bias is needed; the attack
ignores the pixels' range.
"""

import argparse
import functools
import gzip
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from logistic import RobustLogistic
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from pydantic import AfterValidator, Field
from sklearn.datasets import load_digits
from torch import Tensor

from wcitrain.method import NonNegative, Positive, PositiveCount, Text
from wcitrain.recipe.reading import read_yaml
from wcitrain.recipe.sections import Section
from wcitrain.report.drawing import MARKERS, SERIES
from wcitrain.seeding import generator_from

INK = "#333333"
NORMS = {"l2": "L2", "linf": "L∞"}
QUANTITIES = {
    "lambda_max": "λ_max",
    "trace": "Tr H",
    "wci": "WCI",
    "rise": "rise at ‖w‖",
    "test_error": "test error",
}
SIZE = 28  # of the images in idx files


def _ascending(grid: list[float]) -> list[float]:
    if not grid or grid[0] != 0 or any(a >= b for a, b in pairwise(grid)):
        raise ValueError("radii that start at 0 and ascend. Zero is what the others are compared with")
    return grid


Radii = Annotated[list[NonNegative], AfterValidator(_ascending)]
Classes = Annotated[list[int], Field(min_length=2, max_length=2)]


class DataSet(Section):
    """What every data set has: radii under both norms, numbers of examples."""

    l2: Radii = Field([0.0, 0.1], description="Radii of the l2 threat.")
    linf: Radii = Field([0.0, 0.01], description="Radii of the linf threat.")
    num_train: PositiveCount = Field(300, description="Training examples.")
    num_test: PositiveCount = Field(2000, description="Test examples, at most.")


class Gaussian(DataSet):
    """Two Gaussian classes with means ±mu e_1."""

    kind: Literal["gaussian"]
    mu: Positive = Field(3.0, description="Half the distance of the means.")
    sd: Positive = Field(0.8, description="Standard deviation in every direction.")
    d: PositiveCount = Field(20, description="Dimensions.")
    num_train: PositiveCount = Field(400, description="Training examples.")


class Digits(DataSet):
    """Two classes of scikit-learn's digits, 8x8 pixels in [0, 1]."""

    kind: Literal["digits"]
    classes: Classes = Field([3, 8], description="The two digits; the first is +1.")
    num_train: PositiveCount = Field(200, description="Training examples.")


class Idx(DataSet):
    """Two classes of MNIST or Fashion-MNIST from its idx.gz files, averaged to 14x14 pixels in [0, 1]."""

    kind: Literal["idx"]
    classes: Classes = Field([5, 7], description="The two classes; the first is +1.")
    folder: Text = Field("data", description="Where train-images-idx3-ubyte.gz and its like are.")


class Study(Section):
    """The whole study; data sets stand under the name they are drawn by."""

    weight_decay: Positive = Field(1e-3, description="λ of (λ/2) ‖w‖².")
    seeds: Annotated[list[int], Field(min_length=1)] = Field([0, 1, 2], description="Of everything random.")
    noise_draws: PositiveCount = Field(10, description="Copies of every example in the control.")
    directions: PositiveCount = Field(100, description="Of the normalised rise.")
    datasets: dict[str, Annotated[Gaussian | Digits | Idx, Field(discriminator="kind")]] = Field(min_length=1)


class Examples(NamedTuple):
    """Training and test examples of one data set and seed."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(data: Gaussian | Digits | Idx, seed: int) -> Examples:
    """Return the examples of one seed, float64, centred between the class means of the training set."""
    generator = generator_from("cpu", seed, "examples")
    if isinstance(data, Gaussian):
        parts = []
        for num in (data.num_train, data.num_test):
            y = torch.ones(num, dtype=torch.float64)
            y[num // 2 :] = -1
            x = data.sd * torch.randn(num, data.d, generator=generator, dtype=torch.float64)
            x[:, 0] += data.mu * y
            parts += [x, y]
        return Examples(*parts)
    if isinstance(data, Digits):
        x, labels = load_digits(return_X_y=True)
        sets = [(torch.from_numpy(x) / 16, torch.from_numpy(labels))]
    else:
        sets = [_read_idx(Path(data.folder), part) for part in ("train", "t10k")]
    pools = []
    for x, labels in sets:
        chosen = (labels == data.classes[0]) | (labels == data.classes[1])
        order = torch.randperm(int(chosen.sum()), generator=generator)
        y = torch.where(labels == data.classes[0], 1.0, -1.0).double()
        pools.append((x[chosen][order].double(), y[chosen][order]))
    (x, y), n = pools[0], data.num_train
    test = pools[1] if len(pools) > 1 else (x[n:], y[n:])
    x, y = x[:n], y[:n]
    if len(y) < n or not len(test[1]) or not ((y > 0).any() and (y < 0).any()):
        raise ValueError(
            f"num_train: got {n} of {len(pools[0][1])} images of classes {data.classes}; expected both "
            "classes and some images left to test on. Lower it."
        )
    centre = (x[y > 0].mean(0) + x[y < 0].mean(0)) / 2
    return Examples(x - centre, y, test[0][: data.num_test] - centre, test[1][: data.num_test])


@functools.cache
def _read_idx(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images [N, 196] in [0, 1], averages of 2x2 pixels, and labels [N]."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, SIZE // 2, 2, SIZE // 2, 2)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    pooled = images.mean((2, 4)).reshape(len(images), -1) / 255
    return torch.from_numpy(pooled), torch.from_numpy(labels.astype(np.int64))


def measure(
    examples: Examples, eps: float, norm: Any, training: str, study: Study, seed: int
) -> dict[str, float]:
    """Train and measure once."""
    problem = RobustLogistic(examples.x, examples.y, eps, norm)
    if training == "noise":
        problem = problem.noisy(num_draws=study.noise_draws, seed=seed)
    w = problem.fit(weight_decay=study.weight_decay)
    ahead = examples.y_test * (examples.x_test @ w)
    reach = eps * float(w.norm() if norm == "l2" else w.abs().sum())
    return {
        **asdict(problem.curvature(w)),
        "rise": problem.rise(w, num_directions=study.directions, seed=seed),
        "test_error": float((ahead <= 0).double().mean()),
        "robust_test_error": float((ahead <= reach).double().mean()),
        "num_weights": int((w != 0).sum()),
    }


def largest_eps(examples: Examples, norm: Any) -> float:
    """Return the radius from which on no weights are best."""
    return RobustLogistic(examples.x, examples.y, norm=norm).largest_eps()


def run(study: Study) -> list[dict[str, Any]]:
    """Return one row for each data set, norm, training, eps and seed; all radii are checked first."""
    loaded: dict[str, list[Examples]] = {}
    for name, data in study.datasets.items():
        if isinstance(data, Idx) and not (Path(data.folder) / "train-images-idx3-ubyte.gz").is_file():
            print(f"{name}: left out, no idx files in {data.folder}")
            continue
        loaded[name] = [load(data, seed) for seed in study.seeds]
        for norm in NORMS:
            limit = min(largest_eps(examples, norm) for examples in loaded[name])
            if getattr(data, norm)[-1] >= limit:
                raise ValueError(
                    f"{name}.{norm}: got eps={getattr(data, norm)[-1]:g}; expected less than {limit:.4g}, "
                    "from where on w = 0 is best. Shorten the grid."
                )
    rows = []
    for name, sets in loaded.items():
        for norm in NORMS:
            for examples, seed in zip(sets, study.seeds, strict=True):
                limit = largest_eps(examples, norm)
                for eps in getattr(study.datasets[name], norm):
                    for training in ("adversarial", "noise"):
                        if eps == 0 and training == "noise":  # the same problem
                            numbers = rows[-1]["numbers"]
                        else:
                            numbers = measure(examples, eps, norm, training, study, seed)
                        key = {"dataset": name, "norm": norm, "training": training, "eps": eps, "seed": seed}
                        rows.append({**key, "share": eps / limit, "numbers": numbers})
    return rows


def select(rows: Sequence[dict[str, Any]], key: str, **wanted: Any) -> np.ndarray:
    """Return the values [eps, seeds] of a quantity (or of ``"share"``) over the rows that are wanted."""
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    grid = sorted({row["eps"] for row in chosen})
    return np.array(
        [
            [row[key] if key in row else row["numbers"][key] for row in chosen if row["eps"] == eps]
            for eps in grid
        ]
    )


def draw(rows: Sequence[dict[str, Any]], num_seeds: int) -> Figure:
    """Return the figure: a row a norm, a column a quantity, a colour a data set, the control dashed."""
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    figure = Figure(figsize=(15.5, 7), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.suptitle(
        "Training against an adversary sharpens the landscape of linear logistic regression",
        x=0.012, ha="left", fontsize=15, fontweight="bold", color=INK,
    )  # fmt: skip
    axes = figure.subplots(len(NORMS), len(QUANTITIES), sharex="row", sharey="col")
    for line, norm in zip(axes, NORMS, strict=True):
        for ax, (key, label) in zip(line, QUANTITIES.items(), strict=True):
            is_error = key == "test_error"
            for number, name in enumerate(names):
                for training, style in (("noise", "--"), ("adversarial", "-")):
                    where = {"dataset": name, "norm": norm, "training": training}
                    x, values = select(rows, "share", **where).mean(1), select(rows, key, **where)
                    values = 100 * values if is_error else values / values[0]
                    colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
                    ax.fill_between(x, values.min(1), values.max(1), color=colour, alpha=0.15, linewidth=0)
                    face = colour if training == "adversarial" else "white"
                    ax.plot(
                        x, values.mean(1), style, color=colour, marker=marker, markersize=4.5, linewidth=1.8,
                        markerfacecolor=face,
                    )  # fmt: skip
            ax.tick_params(labelsize=10, colors=INK, length=0, which="both")
            ax.grid(color="#E6E6E6", linewidth=0.8)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            ax.spines[["left", "bottom"]].set_color("#BBBBBB")
            if norm == next(iter(NORMS)):
                title = f"{label} (%)" if is_error else f"{label}, relative to eps = 0"
                ax.set_title(title, loc="left", fontsize=11, color=INK)
            if not is_error:
                ax.set_yscale("log")
                if key in ("lambda_max", "wci"):  # little more than a decade
                    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                ax.yaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel("eps / largest useful eps", fontsize=11, color=INK)
        line[0].set_ylabel(f"{NORMS[norm]} threat", fontsize=13, color=INK)
    styles = [(SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)], name) for i, name in enumerate(names)]
    handles = [
        *(Line2D([], [], color=c, marker=m, label=name, linewidth=1.8) for c, m, name in styles),
        Line2D([], [], color=INK, label=f"adversarial training (mean and range of {num_seeds} seeds)"),
        Line2D([], [], color=INK, linestyle="--", label="random noise of the same norm"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10.5)
    return figure


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return markdown: means over the seeds at the first, a middle and the last radius."""
    lines = [
        "| data | threat | training | eps | λ_max | Tr H (fixed δ) | WCI | rise | test error % | robust % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["dataset"] for row in rows):
        for norm, label in NORMS.items():
            grid = sorted({row["eps"] for row in rows if row["dataset"] == name and row["norm"] == norm})
            for training in ("adversarial", "noise"):
                for place in sorted({0, len(grid) // 2, len(grid) - 1}):
                    if training == "noise" and grid[place] == 0:
                        continue
                    where = {"dataset": name, "norm": norm, "training": training}
                    mean = {
                        key: float(select(rows, key, **where)[place].mean()) for key in rows[0]["numbers"]
                    }
                    lines.append(
                        f"| {name} | {label} | {training if grid[place] else 'plain'} | {grid[place]:g} | "
                        f"{mean['lambda_max']:.3g} | {mean['trace']:.3g} ({mean['fixed_trace']:.3g}) | "
                        f"{mean['wci']:.3g} | {mean['rise']:.3g} | {100 * mean['test_error']:.2f} | "
                        f"{100 * mean['robust_test_error']:.2f} |"
                    )
    return "\n".join(lines)


def main() -> int:
    """Run the study; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("runs/yamada_logistic"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        study = Study.model_validate(read_yaml(options.recipe.read_text("utf-8")))
        rows = run(study)
    except (OSError, ValueError) as error:
        print(f"yamada_logistic: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    document = {"settings": study.model_dump(), "rows": rows}
    (options.out / "results.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", "utf-8")
    draw(rows, len(study.seeds)).savefig(options.out / "results.png")
    print(table(rows))
    seconds = time.perf_counter() - began
    print(f"\n{len(rows)} rows in {seconds:.0f} s. Written: {options.out}/results.json, results.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
