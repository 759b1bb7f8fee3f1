"""Draws of the layers' traces, chunk by chunk and stage by stage, until the index is known to a target error.

Legend: K chunks, m probes a chunk, L layers, x_kj [L] traces of chunk k by probe j, a_l = ||W_l||_F², t_l =
Tr(H_l). Near the estimate the index is linear in the traces, which splits the variance:

    Var WCI ≈ ( σ_b² + σ_w² / m ) / K,  σ_w² = Var_j Σ_l c_l x_kjl  within a chunk,  σ_b² between chunks   (1)

with c_l = ½ sqrt(a_l / t_l). A chunk costs c_a passes for its attack and forward, c_p for each probe. The
least variance for a cost has

    m* = sqrt( c_a σ_w² / (c_p σ_b²) )                                                                     (2)

For a target relative error r a *pilot* of 16 chunks with 2 probes estimates (1). m follows from (2), K from

    ( σ_b² + σ_w² / m ) / K = (r WCI)² / s,     s = ν / χ²_ν(5 %),  ν = K_pilot − 1,                       (3)

where s covers the error of the variance itself. The stage so planned is made on fresh examples with fresh
random numbers, and the pilot's samples are thrown away: adding to them until the error looks small enough
would stop where the estimate is low by chance, since the two are correlated (two stages as in Stein 1945). If
the stage misses all the same, one time in eight to forty in simulations, its variance plans a larger one. The
result is the last stage alone; what bias is left, that of taking the first stage that did not miss, was below
a tenth of a standard error there.

When fresh examples run out, a stage takes *all* examples once, those of earlier stages too, with fresh random
starts and signs: its size then depends on no estimate. From there on only probes can be added.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.estimators import choose
from wcitrain.curvature.loss import Loss, as_loss, cross_entropy
from wcitrain.curvature.passes import Passes
from wcitrain.measures.problem import Problem
from wcitrain.measures.wci_measurement import WCIMeasurement
from wcitrain.params import Layers
from wcitrain.seeding import generator_from

PILOT_CHUNKS = 16  # also the fewest of any stage: a standard error from fewer is itself too uncertain
PILOT_PROBES = 2  # the fewest that tell σ_w² from σ_b²
MAX_PROBES = 16  # m*, where σ_b² comes out near zero
MAX_PROBES_WITHOUT_EXAMPLES = 64  # where probes are all that can be added
MAX_STAGES = 4  # after the pilot
TINY = sys.float_info.min

ModelLoss = Callable[[nn.Module, Tensor, Tensor], Tensor | Loss]
Pair = tuple[Tensor, Tensor]  # images and labels


class Stages:
    """What every chunk of a measurement has in common; the derivatives are tried on the ``first`` example."""

    def __init__(
        self, problem: Problem, layers: Layers, estimator: Estimator, loss: ModelLoss | None, first: Pair
    ) -> None:
        self.problem, self.layers, self.loss = problem, layers, loss
        passes = self._passes(*self._placed(*first))
        with torch.no_grad():
            passes.loss_fn()  # wrong outputs and labels are refused as such, not as a derivative
        self.estimator = choose(estimator, passes, needs_gradient=False).estimator

    def draw(
        self, chunks: Iterable[Pair], num_probes: int, stage: int, bar: Any, **details: Any
    ) -> tuple[WCIMeasurement, Tensor]:
        """Attack every chunk once and draw its traces; return the index and the draws [K, m, L].

        Randomness depends on seed, stage and chunk alone. ``bar`` wraps the chunks, ``details`` are fields.
        """
        rows, device = [], self.layers.tensors[0].device
        for number, (x, y) in enumerate(bar(chunks, f"WCI, stage {stage}")):
            generator = generator_from(device, self.problem.seed, "measure_wci", stage, number)
            rows.append(self._chunk(x, y, num_probes, generator))
        draws, losses, sizes = zip(*rows, strict=True)
        samples, weights = torch.stack(draws).double().cpu(), torch.tensor(sizes, dtype=torch.float64)
        details["mean_loss"] = float((weights * torch.stack(losses).double().cpu()).sum() / weights.sum())
        details |= {"sizes": self.layers.sizes().cpu(), "num_probes": samples.shape[1]}
        names, a = tuple(self.layers), self.layers.squared_norms()
        return WCIMeasurement.from_samples(names, a, samples.mean(1), weights, **details), samples

    def _chunk(
        self, x: Tensor, y: Tensor, num_probes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, int]:
        """Return samples [m, L], mean loss, and the number of examples."""
        x, y = self._placed(x, y)
        if attack := self.problem.attack:
            # The attack sums over examples: N times the mean loss, whatever that is.
            x = attack.maximise(lambda z: self._loss_at(z, y).total.expand(len(z)), x, generator)
        samples, loss = self.estimator.draw(self._passes(x, y), num_probes, generator)
        if not bool(torch.isfinite(loss)):
            rule = "a finite number. Has the model diverged?"
            raise ValueError(f"wci: got a loss of {float(loss)}; expected {rule}")
        return samples, loss.detach(), len(x)

    def _passes(self, x: Tensor, y: Tensor) -> Passes:
        return Passes(self.problem.model, self.layers, lambda: self._loss_at(x, y))

    def _loss_at(self, x: Tensor, y: Tensor) -> Loss:
        """Return the mean loss at images."""
        if self.loss is not None:
            return as_loss(self.loss(self.problem.model, x, y))
        logits = self.problem.model(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            rule = f"logits [{len(x)}, C]. Flatten them."
            raise ValueError(f"wci: got outputs {got} for {len(x)} images; expected {rule}")
        _check_labels(y, logits.shape[1])
        return cross_entropy(logits, y)

    def _placed(self, x: Tensor, y: Tensor) -> Pair:
        """Return images and labels on the model's device, images in its dtype."""
        if not x.is_floating_point():
            advice = "Divide them by 255, or use ToTensor()."
            raise ValueError(f"wci: got images of dtype {x.dtype}; expected floats in [0, 1]. {advice}")
        weights = self.layers.tensors[0]
        return x.detach().to(weights.device, weights.dtype), y.to(weights.device)


def _check_labels(y: Tensor, num_classes: int) -> None:
    """Refuse labels that are no classes; soft ones are checked by ``cross_entropy``."""
    if y.ndim != 1 or y.is_floating_point():
        if y.ndim != 2 or y.shape[1] != num_classes or not y.is_floating_point():
            rule = f"classes [N] as integers, or soft targets [N, {num_classes}]. Pass loss= for others."
            raise ValueError(
                f"wci: got labels of shape {tuple(y.shape)} and dtype {y.dtype}; expected {rule}"
            )
    elif int(y.min()) < 0 or int(y.max()) >= num_classes:
        rule = f"0 to {num_classes - 1}, the model's outputs. Are model and data of the same classes?"
        raise ValueError(f"wci: got labels from {int(y.min())} to {int(y.max())}; expected {rule}")


def to_target(stages: Stages, chunks: Iterator[Pair], target: float, has_bar: bool) -> WCIMeasurement:
    """Plan and make stages until the error of one is small enough."""
    attack = stages.problem.attack
    costs = 1 + (sum(attack.passes()) if attack else 0), stages.estimator.probe_cost  # c_a, c_p
    bar = progress_bar(has_bar)
    read = list(islice(chunks, PILOT_CHUNKS))
    used, within, limited_by = len(read), 0.0, "stages"
    index, draws = stages.draw(read, PILOT_PROBES, 0, bar, target_relative_error=target)
    if used < 2:
        return replace(index, limited_by="examples")
    for stage in range(1, MAX_STAGES + 1):
        between, within = _spread(index, draws, within)
        variance = (target * float(index.per_layer.sum())) ** 2 / _safety(len(draws) - 1)
        num_chunks, num_probes = _plan(between, within, variance, *costs)
        if stage > 1:
            num_chunks = max(num_chunks, math.ceil(1.5 * len(draws)))
        read += islice(chunks, max(0, used + num_chunks - len(read)))
        if len(read) - used >= num_chunks:
            taken, used = read[used : used + num_chunks], used + num_chunks
        else:
            more = min(MAX_PROBES_WITHOUT_EXAMPLES, _probes_for(between, within, variance, len(read)))
            if limited_by == "examples" and more <= draws.shape[1]:
                break  # the probes are not what is missing
            taken, num_probes, limited_by = read, max(more, num_probes), "examples"
        index, draws = stages.draw(taken, num_probes, stage, bar, target_relative_error=target)
        if index.reached:
            return index
    return replace(index, limited_by=limited_by)


def progress_bar(is_shown: bool, total: int | None = None) -> Any:
    """Return what wraps chunks in a bar with a title, on a terminal."""
    hidden = not (is_shown and sys.stderr.isatty())
    return lambda chunks, title: tqdm(chunks, title, total, unit="chunk", leave=False, disable=hidden)


def _spread(index: WCIMeasurement, draws: Tensor, within: float) -> tuple[float, float]:
    """Return σ_b² and σ_w² of (1) from draws [K, m, L]; ``within`` is the latter for single probes."""
    t, num_probes = index.trace.mean, draws.shape[1]
    values = draws @ torch.where(t > 0, (index.squared_norms / t).sqrt() / 2, 0)  # [K, m]
    within = float(values.var(1).mean()) if num_probes > 1 else within
    return max(0.0, float(values.mean(1).var()) - within / num_probes), within


def _plan(between: float, within: float, variance: float, cost: int, probe_cost: int) -> tuple[int, int]:
    """Return K by (3) and m by (2), or fewer probes where the fewest chunks leave room for that."""
    best = math.sqrt(cost * within / (probe_cost * between)) if between > 0 else MAX_PROBES
    num_probes = min(max(1, round(best)), MAX_PROBES, _probes_for(between, within, variance, PILOT_CHUNKS))
    return max(PILOT_CHUNKS, math.ceil((between + within / num_probes) / max(variance, TINY))), num_probes


def _probes_for(between: float, within: float, variance: float, num_chunks: int) -> int:
    """Return the fewest probes with which so many chunks reach a variance, from equation (1).

    If the spread between chunks alone exceeds it: those within an eighth of the error of endless probes.
    """
    room = num_chunks * variance - between
    return max(1, math.ceil(within / (room if room > 0 else max(between / 4, TINY))))


def _safety(nu: int) -> float:
    """Return s of equation (3), at most 10; the quantile of χ² by Wilson and Hilferty's cube."""
    root = 1 - 2 / (9 * nu) - 1.645 * math.sqrt(2 / (9 * nu))
    return min(10.0, 1 / max(root, TINY) ** 3)
