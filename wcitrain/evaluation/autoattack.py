"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) part by part, through the package ``pyautoattack``.

The parts run in the order, with the settings, seeds and batches of ``AutoAttack.run_standard_evaluation``, so
that every flag is the one it would give; between batches the evaluation saves how far it is. Different:

- Target classes are at most the number of classes less one; upstream stops with an index error.
- Parts that few classes make impossible are left out and named: ``apgd-dlr`` needs three, ``apgd-t`` four.
- Chosen parts run with the settings of the standard version; upstream's "custom" restarts five times.
- Parameters take no gradient meanwhile (FAB calls ``backward``, which would add to ``.grad``).

Random numbers are drawn for a batch, so flags depend on the batch size a little, upstream's too.
"""

import importlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from wcitrain.attacks import ThreatModel
from wcitrain.evaluation.stages import Stage
from wcitrain.evaluation.victim import Victim

COMPONENTS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the DLR losses sort out the third and the fourth largest logit


def require_autoattack() -> Any:
    """Return the package; ModuleNotFoundError says how to install it."""
    try:
        return importlib.import_module("pyautoattack")
    except ModuleNotFoundError as error:
        if error.name != "pyautoattack":
            raise
        text = 'attacks: got autoattack; expected the package pyautoattack. pip install "wcitrain[eval]"'
        raise ModuleNotFoundError(text, name="pyautoattack") from error


@dataclass(frozen=True)
class EnsemblePlan:
    """AutoAttack ``standard``, ``plus`` or ``rand``, or ``components`` with the standard's settings."""

    name: str
    version: str = "standard"
    components: tuple[str, ...] = ()

    def stages(self, victim: Victim, threat: ThreatModel) -> tuple[list[Stage], tuple[str, ...]]:
        """Return the parts, and one sentence for each that was left out; ValueError where none is left."""
        adversary, num = self.adversary(victim, threat), victim.clean.num_classes
        wanted = self.components or tuple(adversary.attacks_to_run)
        kept = [name for name in wanted if num >= LEAST_CLASSES.get(name, 2)]
        left_out = [name for name in wanted if name not in kept]
        notes = [f"{k} left out: it needs {LEAST_CLASSES[k]} classes, here are {num}" for k in left_out]
        if not kept:
            raise ValueError(f"{self.name}: {'; '.join(notes)}; expected a part that can run. Add apgd-ce.")
        stages = []
        for number, name in enumerate(kept):
            # As upstream has it at its turn: fab after fab-t keeps its single restart.
            fab_restarts = 1 if "fab-t" in kept[: number + 1] else adversary.fab.n_restarts
            stages.append(Stage(name, partial(_attack, adversary, name, fab_restarts, victim.seed)))
        return stages, tuple(notes)

    def adversary(self, victim: Victim, threat: ThreatModel) -> Any:
        """Return upstream's ``AutoAttack`` of this version, silent, with targets there are."""
        settings: dict[str, Any] = {"norm": NORMS[threat.norm], "eps": threat.eps, "seed": victim.seed}
        settings |= {"version": self.version, "device": victim.device}
        adversary = require_autoattack().AutoAttack(victim.model, **settings)
        silent = logging.Logger("autoattack", logging.CRITICAL + 1)  # what it warns of is in preflight
        adversary.logger = adversary.apgd.logger = adversary.apgd_targeted.logger = silent
        for part in (adversary.apgd_targeted, adversary.fab):
            part.n_target_classes = min(part.n_target_classes, victim.clean.num_classes - 1)
        return adversary


def _attack(
    adversary: Any, name: str, fab_restarts: int, seed: int, x: Tensor, y: Tensor, places: Tensor
) -> Tensor:
    """Return x_adv of one part."""
    parts = {"apgd-t": adversary.apgd_targeted, "square": adversary.square}
    part = adversary.fab if name.startswith("fab") else parts.get(name, adversary.apgd)
    part.seed = seed
    if part is adversary.fab:
        part.targeted, part.n_restarts = name == "fab-t", fab_restarts
    if part is adversary.apgd:
        part.loss = name.removeprefix("apgd-")
    x_adv: Tensor = part.perturb(x, y)
    return x_adv
