"""The smallest radius at which attacks break an example, by bisection, and the accuracy curve that follows.

Legend: N examples, K = 255 levels, eps_k = k/K times the largest radius, B a batch.

A success at a radius is one at every larger radius, whose ball holds the image too: so an example keeps the
smallest level at which it fell, and the accuracy at eps is the share whose smallest radius is larger. Found
by any attacks it is an upper bound of the true one, as robust accuracies are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wcitrain import files
from wcitrain.attacks import ThreatModel
from wcitrain.evaluation.attacking import Stage, Victim, is_right
from wcitrain.evaluation.intervals import median_interval, wilson_interval
from wcitrain.evaluation.plans import Plan
from wcitrain.params import logits_of
from wcitrain.seeding import seed_from

NUM_ROUNDS = 8
NUM_LEVELS = 2**NUM_ROUNDS - 1
NUM_POINTS = 21  # of a curve in JSON
MINIMAL = ("smallest radius", "attacks", "median", "95 % interval", "wrong at once", "never broken")


@dataclass(frozen=True, eq=False)
class MinimalEps:
    """The smallest radius in one norm that breaks each example, to 1/255 of the largest one tried."""

    largest: ThreatModel
    attacks: str  # the names joined by "+": they attack in this order, and any of them counts
    eps: Tensor  # float64 [N]; 0: wrong without an attack, inf: not broken within the largest radius

    def accuracy(self, eps: float) -> tuple[float, float, float]:
        """Return the share still right at a radius, with its Wilson 95 % interval."""
        share = float((self.eps > eps * (1 + 1e-9)).double().mean())  # equal up to rounding: broken
        return share, *wilson_interval(share, len(self.eps))

    def curve(self, num_points: int = NUM_POINTS) -> dict[str, list[float]]:
        """Return accuracies and the ends of their intervals at equally spaced radii from 0 to the largest."""
        radii = [self.largest.eps * k / (num_points - 1) for k in range(num_points)]
        shares, low, high = (list(column) for column in zip(*map(self.accuracy, radii), strict=True))
        return {"eps": radii, "accuracy": shares, "low": low, "high": high}

    def header(self) -> dict[str, Any]:
        """Return what a file says of it beside the radii."""
        return {"largest": asdict(self.largest), "attacks": self.attacks}

    @classmethod
    def read(cls, eps: Tensor, header: Mapping[str, Any]) -> "MinimalEps":
        """Return what ``header`` and the radii describe."""
        return cls(ThreatModel(**header["largest"]), header["attacks"], eps)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a median or end of its interval beyond the largest radius is null."""
        median, low, high = median_interval(self.eps)
        interval = [max(low, 0.0), high]
        counts = {"num_wrong_at_once": int((self.eps == 0).sum()), "num_never": int(self.eps.isinf().sum())}
        numbers = {"median": median, "median_interval": interval, **counts, "curve": self.curve()}
        return {**self.header(), "resolution": self.largest.eps / NUM_LEVELS, **numbers}


def minimal_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return as texts what ``as_dict`` or its JSON says, the columns of ``MINIMAL``."""
    largest = entry["largest"]["eps"]
    median, low, high = (
        f"> {largest:.4g}" if eps is None or eps > largest else f"{eps:.4g}"
        for eps in (entry["median"], *entry["median_interval"])
    )
    counts = map(str, (entry["num_wrong_at_once"], entry["num_never"]))
    return (
        f"{entry['largest']['norm']} up to {largest:.4g}",
        entry["attacks"],
        median,
        f"{low} to {high}",
        *counts,
    )


@torch.no_grad()
def minimal_eps(
    victim: Victim,
    plans: Sequence[Plan],
    largest: ThreatModel,
    path: Path | None = None,
    known: Sequence[tuple[float, Tensor]] = (),
) -> MinimalEps:
    """Bisect for every example of ``victim`` the radius in ``largest.norm`` at which the attacks break it.

    Every example has 256 possible results, the levels and "never", so 8 rounds of all attacks, each on
    what the one before left, decide. ``path`` keeps what is known after every batch, to go on from a kill.
    ``known`` are radii and truth values [N] of what attacks broke within them, which counts too.
    """
    is_clean = victim.clean.is_right
    # Fell at ``high`` (256: nowhere) and not at ``low``.
    low, high = torch.zeros(len(is_clean)).long(), torch.where(is_clean, NUM_LEVELS + 1, 0)
    if path is not None and path.is_file():
        with np.load(path, allow_pickle=False) as saved:
            low, high = torch.from_numpy(saved["low"]), torch.from_numpy(saved["high"])
    with tqdm(
        total=NUM_ROUNDS * int(is_clean.sum()), desc=f"smallest {largest.norm} radius", disable=None
    ) as bar:
        for width in (2**k for k in range(NUM_ROUNDS, 0, -1)):
            middle = (low + high) // 2
            is_open = (high - low == width) & is_clean
            for level in middle[is_open].unique().tolist():
                threat = replace(largest, eps=largest.eps * level / NUM_LEVELS)
                stages = [stage for plan in plans for stage in plan.stages(victim, threat)]
                # Batches that are done have left the level, whole and from its front: the cuts stay.
                for places in (is_open & (middle == level)).nonzero().flatten().split(victim.batch_size):
                    is_left = _survives(stages, victim, places, level)
                    low[places[is_left]], high[places[~is_left]] = level, level
                    if path is not None:
                        files.save_arrays(path, {"low": low, "high": high})
                    bar.update(len(places))
    eps = torch.where(high > NUM_LEVELS, math.inf, high.double() * largest.eps / NUM_LEVELS)
    for radius, is_broken in known:
        if radius <= largest.eps:
            eps = torch.where(is_broken, eps.clamp_max(radius), eps)
    return MinimalEps(largest, "+".join(plan.name for plan in plans), eps)


def _survives(stages: Sequence[Stage], victim: Victim, places: Tensor, level: int) -> Tensor:
    """Return truth values [B]: right after every stage; each attacks what is left."""
    is_left = torch.ones(len(places), dtype=torch.bool)
    for number, stage in enumerate(stages):
        if len(chosen := places[is_left]):
            torch.manual_seed(
                seed_from(victim.seed, stage.name, f"minimal {number} {level} {int(places[0])}")
            )
            images, labels = victim.batch(chosen)
            x_adv = stage.attack(images, labels, chosen)
            is_left[is_left.clone()] = is_right(logits_of(victim.model(x_adv)), labels).cpu()
    return is_left
