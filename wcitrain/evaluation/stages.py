"""Attacks as stages: each attacks the examples that are still robust, and says which it broke.

Legend: N examples, B a batch of them. A restart of PGD is a stage, and so is a part of AutoAttack. An example
is robust when the model is right on it and after every stage: broken by any final iterate, not only by that
of the highest loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from wcitrain.attacks import ThreatModel
from wcitrain.evaluation.evaluation import save_arrays
from wcitrain.evaluation.victim import Victim, is_right
from wcitrain.seeding import seed_from


@dataclass(frozen=True)
class Stage:
    """One pass over examples: ``attack(x, y, places)`` returns x_adv [B, *dims]; places are those in the set.

    ``attacks_all``: also those that are misclassified already, because the losses of all examples are wanted.
    """

    name: str
    attack: Callable[[Tensor, Tensor, Tensor], Tensor]
    attacks_all: bool = False


class AttackState:
    """How far an attack on N examples is, kept in the file ``path``: after a kill it goes on from there.

    ``is_clean`` [N]: right without an attack. Without a path nothing is kept.
    """

    def __init__(self, is_clean: Tensor, path: Path | None) -> None:
        self._path = path
        self.is_robust = is_clean.clone()  # [N] right at the start and after all that was tried
        self.todo = is_clean.clone()  # [N] what the stage under way attacks
        self.losses = torch.full(is_clean.shape, torch.nan)  # [N] cross-entropies after the first restart
        self.after: list[float] = []  # robust accuracy after each finished stage
        self.batch = 0  # finished batches of the stage under way
        self.furthest = 0.0  # longest perturbation that fooled the model, in the threat's norm
        if path is not None and path.is_file():
            with np.load(path, allow_pickle=False) as saved:
                for name in ("is_robust", "todo", "losses"):
                    setattr(self, name, torch.from_numpy(saved[name]))
                for name in ("after", "batch", "furthest"):
                    setattr(self, name, saved[name].tolist())

    def save(self) -> None:
        """Write the file, if there is one."""
        if self._path is not None:
            save_arrays(self._path, {name: value for name, value in vars(self).items() if name != "_path"})


@torch.no_grad()
def run_stages(
    stages: Sequence[Stage], victim: Victim, threat: ThreatModel, state: AttackState, title: str
) -> None:
    """Run what ``state`` has not seen yet, and save it after every batch.

    The batches of a stage are cut from what was robust at its start, in the order of the set. The global
    random state is seeded for each batch: a randomised model meets the same numbers after an interruption.
    """
    with tqdm(unit=" images", desc=title, disable=None) as bar:
        for stage in stages[len(state.after) :]:
            if state.batch == 0:
                state.todo = state.is_robust | stage.attacks_all
            places = state.todo.nonzero().flatten()
            if not len(places):
                break
            for batch, chosen in list(enumerate(places.split(victim.batch_size)))[state.batch :]:
                images, labels = victim.batch(chosen)
                torch.manual_seed(seed_from(victim.seed, stage.name, batch))
                x_adv = stage.attack(images, labels, chosen)
                logits = victim.model(x_adv)
                if stage.attacks_all:
                    state.losses[chosen] = F.cross_entropy(logits.float(), labels, reduction="none").cpu()
                is_fooled = ~is_right(logits, labels).cpu()
                lengths = _lengths(x_adv - images, threat).cpu()[is_fooled & state.is_robust[chosen]]
                state.furthest = max([state.furthest, *lengths.tolist()])
                state.is_robust[chosen[is_fooled]] = False
                state.batch = batch + 1
                state.save()
                bar.set_postfix_str(f"{stage.name}, {int(state.is_robust.sum())} robust", refresh=False)
                bar.update(len(chosen))
            state.after.append(float(state.is_robust.double().mean()))
            state.batch = 0
            state.save()


def _lengths(delta: Tensor, threat: ThreatModel) -> Tensor:
    """Return the norm of every perturbation [B]."""
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm]
    return torch.linalg.vector_norm(delta.double().flatten(1), order, dim=1)
