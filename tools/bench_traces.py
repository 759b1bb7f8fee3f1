"""How well each source of traces shapes the noise of `WCIPosterior`: inflation of its bound at equal weights.

    python tools/bench_traces.py recipes/bases/cifar10_small.yaml data.root=DATA --seeds 0 1 2 --out all.json
    python tools/bench_traces.py 0.json 1.json 2.json --out all.json    # join what single seeds gave

One rule trains (one pass, Gauss–Newton traces, attacked at W); shadows see its weights and adversarial images
and keep averages of their own, without touching the training. A shadow draws u from its own posterior, by
its average of the default decay; other decays fold the same estimates. Gauss–Newton estimates are the
driver's, at W + u: their law is that of two passes too. Floor 0.1 with two passes takes the estimates of
floor 0.01, to save time.

At some steps true traces t_l are the mean of many draws on fresh batches, in training mode, at W. Variances
s_l, up to a common factor, cost against the optimum sqrt(a_l / t_l) of the bound

    I = sqrt( Σ s_l t_l · Σ a_l / s_l ) / Σ sqrt(a_l t_l)  >=  1.                                          (1)

``smoothed`` is (1) against what a difference measures: the mean two-point curvature at the shadow's own σ
(that of floor 0.01). A truth there below its standard error counts as that error. ``within 2 se``: averages
within two errors (their own and the truth's) of the smoothed truth, for Gauss–Newton of its own.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from docs import table
from torch import Tensor

from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.loss import LossFn
from wcitrain.curvature.passes import Passes
from wcitrain.data import Batch
from wcitrain.optim import WCIPosterior, record
from wcitrain.optim.random_directions import counted_products, posterior_shape
from wcitrain.preserve import undisturbed
from wcitrain.recipe import load_recipe
from wcitrain.run import Run, start_run
from wcitrain.seeding import generator_from, seed_from

DRIVER = "{name: wci, passes: 1, traces: gauss_newton, attack_at: weights}"
DECAYS, FLOORS, OWN = (0.9, 0.98, 0.995), (1e-4, 1e-2, 1e-1), {1: 0.98, 2: 0.9}
SMOOTHED = {passes: f"difference {passes} {FLOORS[1]:g}" for passes in OWN}
HEADER = ["traces", "passes", "decay", "floor", "inflation", "without the cap", "smoothed"]
HEADER += ["noise at the floor, %", "negative, %", "within 2 se, %"]


@dataclass
class Shadow:
    """A source of traces with a record a decay."""

    rule: WCIPosterior
    records: dict[float, dict[str, Any]]
    negative: list[float] = field(default_factory=list)  # share of layers, every step

    def passes(self, run: Run, loss_fn: LossFn, *place: object) -> Passes:
        """Return the passes of a step, under the shadow's own average."""
        own, name = self.records[OWN[self.rule.passes]], f"{self.rule}{self.rule.floor}"
        traces = record.averages(own)[0] if own["is_measured"] else None
        numbers = {"key": (run.recipe.seed, name, *place), "draw": (f"{run.recipe.seed} {name}", place[-1])}
        parameters = list(run.bare.parameters())
        layers = run.regularizer.layers
        return Passes(run.model, layers, loss_fn, parameters=parameters, traces=traces, **numbers)

    def fold(self, estimate: Tensor) -> None:
        """Fold an estimate into all averages; two make one where u turns."""
        self.negative.append(float((estimate < 0).double().mean()))
        for decay, own in self.records.items():
            record.fold(own, estimate, decay, self.rule.is_paired)
            own["draws"] += 1


def trained(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Train to the last moment; return what every moment gave."""
    layers, recipe, number, moments = run.regularizer.layers, run.recipe, 0, []
    rules = {f"difference 1 {floor:g}": WCIPosterior(passes=1, floor=floor) for floor in FLOORS}
    rules |= {f"difference 2 {floor:g}": WCIPosterior(floor=floor) for floor in FLOORS[:2]}
    rules["gauss_newton"] = recipe.perturbation
    shadows = {key: Shadow(rule, {c: record.fresh(layers) for c in DECAYS}) for key, rule in rules.items()}
    run.model.train()
    for epoch in count():
        for x, y, _ in batches(run, seed_from(recipe.seed, "data"), epoch):
            if number in options.moments:
                moments.append(moment(run, number, shadows, options))
                print(f"seed {recipe.seed}, step {number}", flush=True)
            if number == max(options.moments):
                return {"seed": recipe.seed, "moments": moments}
            loss_fn = attacked(run, x, y, number)
            for shadow in list(shadows.values())[:-1]:
                shadow.fold(estimated(shadow.rule, shadow.passes(run, loss_fn, number)))
            own, decay = run.regularizer.param_groups[0][record.KEY], run.regularizer.trace_decay
            before = own["trace_sum"].clone()
            run.regularizer.backward(loss_fn)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.scheduler.step()
            shadows["gauss_newton"].fold((own["trace_sum"] - decay * before) / (1 - decay))
            number += 1
    raise AssertionError


def batches(run: Run, seed: int, epoch: int) -> Iterator[Batch]:
    """Return an epoch's batches, as the trainer draws them."""
    data, own = run.recipe.data, {"augmentation": run.recipe.augment, "device": run.device}
    own |= {"crop_padding": data.crop_padding, "flip": data.flip, "seed": seed, "epoch": epoch}
    return run.train_set.batches(run.micro_size, shuffle=True, drop_last=True, **own)


def attacked(run: Run, x: Tensor, y: Tensor, *place: object) -> LossFn:
    """Return the loss at images that are adversarial to W."""
    generator = generator_from(run.device, run.recipe.seed, "attack", *place)
    x_adv = run.objective.perturb(run.attack_model, x, y, generator)
    return partial(run.objective.loss, run.model, x, x_adv, y)


def estimated(rule: WCIPosterior, passes: Passes) -> Tensor:
    """Return the rule's estimate of the traces; gradients, buffers and random state stay."""
    with passes.undone(on_success=True):
        return rule.gradient(passes, 1.0, None).traces


def moment(run: Run, number: int, shadows: dict[str, Shadow], options: argparse.Namespace) -> dict[str, Any]:
    """Return the truths at W [L], with errors over batches, and what every shadow says."""
    layers, found = run.regularizer.layers, {"gauss_newton": []}
    for place, (x, y, _) in enumerate(islice(batches(run, 1, number), options.batches)):
        loss_fn, two_passes = attacked(run, x, y, "truth", number, place), WCIPosterior(floor=FLOORS[1])
        with undisturbed(run.bare, training=None):
            draws = gauss_newton_samples(loss_fn(), layers, num_probes=options.draws)
        found["gauss_newton"].append(draws.mean(0))
        for key in SMOOTHED.values():
            passes = partial(shadows[key].passes, run, loss_fn, "truth", number, place)
            many = torch.stack([estimated(two_passes, passes(pair)) for pair in range(options.pairs)])
            found.setdefault(key, []).append(many.mean(0))
    truths = {key: torch.stack(values).double() for key, values in found.items()}
    return {
        "step": number,
        "sizes": rounded(layers.squared_norms(), layers.sizes()),
        "truths": {key: rounded(t.mean(0), t.std(0) / len(t) ** 0.5) for key, t in truths.items()},
        "shadows": {
            key: {str(decay): rounded(*record.averages(own)) for decay, own in shadow.records.items()}
            for key, shadow in shadows.items()
        },
        "negative": {key: fmean(shadow.negative) for key, shadow in shadows.items()},
    }


def rounded(*columns: Tensor) -> list[list[float]]:
    """Return columns [L] as JSON holds them."""
    return [[float(f"{value:.4g}") for value in column.tolist()] for column in columns]


def judged(one: dict[str, Any], t: Tensor | None, floor: float, smoothed: str) -> list[float]:
    """Return inflations by averages ``t`` [L] at a moment, and the noise at the floor in percent."""
    a, d = torch.tensor(one["sizes"])
    truth, (mean, error) = (torch.tensor(one["truths"][key]) for key in ("gauss_newton", smoothed))
    variance = WCIPosterior(floor=floor).posterior(a, d, t, 1.0).sigma.square()
    free, energy = posterior_shape(a, d, t, floor)[0], variance * d
    is_lifted = torch.zeros_like(a) if t is None else counted_products(a, t, floor, a > 0)[0] > a * t * 1.0001
    found = [inflation(variance, a, truth[0]), inflation(free, a, truth[0])]
    found.append(inflation(variance, a, torch.maximum(mean, error)))
    return [*found, float(100 * (energy * is_lifted).sum() / energy.sum())]


def inflation(s: Tensor, a: Tensor, t: Tensor) -> float:
    """Return (1)."""
    return float(((s * t).sum() * (a / s).sum()).sqrt() / (a * t).sqrt().sum())


def row(seeds: list[dict[str, Any]], kind: str, decay: float | None, floor: float) -> list[str]:
    """Return a row of the table: of medians over moments the middle seed and the range over seeds."""
    source, _, num_passes = kind.partition(" ")
    smoothed = SMOOTHED[int(num_passes)] if num_passes else SMOOTHED[2]
    stream = source if not num_passes else f"{kind} {min(floor, FLOORS[1]) if num_passes == '2' else floor:g}"

    def numbers(one: dict[str, Any]) -> list[float]:
        if decay is None:
            t = torch.tensor(one["truths"]["gauss_newton"][0]) if source == "exact" else None
            return judged(one, t, floor, smoothed)
        t, stderr = torch.tensor(one["shadows"][stream][str(decay)])
        mean, error = torch.tensor(one["truths"][smoothed if num_passes else source])
        is_within = (t - mean).abs() <= 2 * (stderr.square() + error.square()).sqrt()
        shares = [one["negative"][stream], float(is_within.double().mean())]
        return [*judged(one, t, floor, smoothed), *(100 * share for share in shares)]

    seen = [zip(*map(numbers, seed["moments"]), strict=True) for seed in seeds]
    cells = []
    for place, values in enumerate(zip(*([median(v) for v in columns] for columns in seen), strict=True)):
        middle, low, high = (f"{v:.{2 * (place < 3)}f}" for v in (median(values), min(values), max(values)))
        cells.append(f"{middle} ({low} to {high})")
    label = num_passes or ("1, 2" if decay else "")
    first = [source, label, f"{decay:g}" if decay else "", "" if kind == "uniform" else f"{floor:g}"]
    return [*first, *cells, *[""] * (len(HEADER) - len(first) - len(cells))]


def main() -> None:
    """Run or read the seeds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="recipes and settings, or what single seeds gave")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--moments", type=int, nargs="+", default=[20, 60, 120, 200, 280, 360])
    parser.add_argument("--batches", type=int, default=12, help="of a truth")
    parser.add_argument("--draws", type=int, default=6, help="of the Gauss–Newton truth, a batch")
    parser.add_argument("--pairs", type=int, default=3, help="of a smoothed truth, a batch")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_intermixed_args()
    if all(name.endswith(".json") for name in options.files):
        seeds = [one for name in options.files for one in json.loads(Path(name).read_text())["seeds"]]
    else:
        recipes = [name for name in options.files if "=" not in name]
        settings = [f"perturbation={DRIVER}", *(name for name in options.files if "=" in name)]
        seeds, folder = [], options.out.with_suffix("")
        for seed in options.seeds:
            run = start_run(load_recipe(recipes, [*settings, f"seed={seed}"]), folder=folder)
            seeds.append(trained(run, options))
    kinds = ["gauss_newton", "difference 1", "difference 2"]
    rows = [row(seeds, kind, decay, floor) for kind in kinds for decay in DECAYS for floor in FLOORS]
    rows += [row(seeds, "exact", None, floor) for floor in FLOORS] + [row(seeds, "uniform", None, 1.0)]
    options.out.write_text(json.dumps({"columns": HEADER, "texts": 2, "rows": rows, "seeds": seeds}))
    print(table([HEADER, *rows], texts=2))


if __name__ == "__main__":
    main()
