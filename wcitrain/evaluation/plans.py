"""The attacks of an evaluation by name: PGD with restarts on several losses, FGSM, and AutoAttack.

AutoAttack (Croce & Hein 2020, arXiv 2003.01690) runs part by part, through the package ``pyautoattack``, in
the order, with the settings, seeds and batches of ``AutoAttack.run_standard_evaluation``, so that every flag
is the one it would give; between batches the evaluation saves how far it is. Different:

- Target classes are at most the number of classes less one; upstream stops with an index error.
- Chosen parts run with the settings of the standard version; upstream's "custom" restarts five times.
- Parameters take no gradient meanwhile (FAB calls ``backward``, which would add to ``.grad``).

Random numbers are drawn for a batch, so flags depend on the batch size a little, upstream's too.
"""

import importlib
import logging
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wcitrain.attacks import ATTACK_LOSSES, Attack, ThreatModel
from wcitrain.attacks.ascent import ascend, input_gradient, starting_point
from wcitrain.evaluation.attacking import Stage, Victim
from wcitrain.seeding import generator_from

COMPONENTS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the DLR losses sort out the third and the fourth largest logit
NAMES = (
    "fgsm; pgd-STEPS, margin-STEPS (also cw-STEPS) or dlr-STEPS, each with xRESTARTS where there are "
    "several, such as pgd-50x10; autoattack, autoattack-plus, autoattack-rand; autoattack:PARTS with parts "
    f"of {'+'.join(COMPONENTS)}"
)


@dataclass(frozen=True)
class GradientPlan:
    """Projected gradient ascent on ``loss``; FGSM is one step of length eps from the image itself."""

    name: str
    loss: str
    num_steps: int
    num_restarts: int = 1

    def stages(self, victim: Victim, threat: ThreatModel) -> list[Stage]:
        """Return the restarts; raise ValueError where the loss needs more classes."""
        ATTACK_LOSSES[self.loss](torch.zeros(1, victim.clean.num_classes), torch.zeros(1).long())
        attacks = [partial(self._attack, victim, threat, k) for k in range(self.num_restarts)]
        return [Stage(f"restart {k + 1}", attack, attacks_all=k == 0) for k, attack in enumerate(attacks)]

    def _attack(
        self, victim: Victim, threat: ThreatModel, restart: int, x: Tensor, y: Tensor, places: Tensor
    ) -> Tensor:
        """Return x_adv of one restart; steps are ``ThreatModel.step_for`` long (Madry et al. 2018).

        Starting points are functions of seed, restart and place alone, drawn on the CPU, not of batch size,
        device, radius, steps or loss: a curve over eps has no noise of its own.
        """
        step_size, x_adv = threat.step_for(self.num_steps), x
        if self.name == "fgsm":
            step_size = threat.eps
        else:
            starts = []
            for image, place in zip(x.cpu().split(1), places.tolist(), strict=True):
                generator = generator_from("cpu", victim.seed, "evaluation", restart, place)
                starts.append(starting_point(image, threat, "uniform", generator))
            x_adv = torch.cat(starts).to(x.device)
        for _ in range(self.num_steps):
            gradient = input_gradient(lambda images: ATTACK_LOSSES[self.loss](victim.model(images), y), x_adv)
            x_adv = ascend(x, x_adv, gradient, threat, step_size, Attack(threat).l1_share)
        return x_adv


@dataclass(frozen=True)
class EnsemblePlan:
    """AutoAttack ``standard``, ``plus`` or ``rand``, or ``components`` with the standard's settings."""

    name: str
    version: str = "standard"
    components: tuple[str, ...] = ()

    def stages(self, victim: Victim, threat: ThreatModel) -> list[Stage]:
        """Return the parts; raise ValueError where one needs more classes."""
        try:
            package = importlib.import_module("pyautoattack")
        except ModuleNotFoundError as error:
            text = 'attacks: got autoattack; expected the package pyautoattack. pip install "wcitrain[eval]"'
            raise ModuleNotFoundError(text) from error
        num, seed, norm = victim.clean.num_classes, victim.seed, NORMS[threat.norm]
        settings = {"norm": norm, "eps": threat.eps, "seed": seed, "version": self.version}
        adversary: Any = package.AutoAttack(victim.model, device=victim.device, **settings)
        silent = logging.Logger("autoattack", logging.CRITICAL + 1)  # what it warns of is in preflight
        adversary.logger = adversary.apgd.logger = adversary.apgd_targeted.logger = silent
        for part in (adversary.apgd_targeted, adversary.fab):
            part.n_target_classes = min(part.n_target_classes, num - 1)
        names = self.components or tuple(adversary.attacks_to_run)
        if missing := [name for name in names if num < LEAST_CLASSES.get(name, 2)]:
            rule = "expected 3 for apgd-dlr, 4 for apgd-t. Name parts, as in autoattack:apgd-ce+fab-t+square."
            raise ValueError(f"{self.name}: got {num} classes with {' and '.join(missing)}; {rule}")
        stages = []
        for number, name in enumerate(names):
            # As upstream has it at its turn: fab after fab-t keeps its single restart.
            fab_restarts = 1 if "fab-t" in names[: number + 1] else adversary.fab.n_restarts
            stages.append(Stage(name, partial(_attack, adversary, name, fab_restarts, seed)))
        return stages


def _attack(
    adversary: Any, name: str, fab_restarts: int, seed: int, x: Tensor, y: Tensor, places: Tensor
) -> Tensor:
    """Return x_adv of one part of AutoAttack."""
    parts = {"apgd-t": adversary.apgd_targeted, "square": adversary.square}
    part = adversary.fab if name.startswith("fab") else parts.get(name, adversary.apgd)
    part.seed = seed
    if part is adversary.fab:
        part.targeted, part.n_restarts = name == "fab-t", fab_restarts
    if part is adversary.apgd:
        part.loss = name.removeprefix("apgd-")
    x_adv: Tensor = part.perturb(x, y)
    return x_adv


Plan = GradientPlan | EnsemblePlan


def parse_attack(name: str) -> Plan:
    """Return what an attack's name stands for; the plan carries its one spelling (cw-20x1 is margin-20).

    ``"pgd-20"`` is PGD with 20 steps on the cross-entropy, ``"pgd-50x10"`` has ten restarts, margin and dlr
    are other losses (``attacks.ATTACK_LOSSES``), and ``"autoattack:apgd-ce+square"`` are these parts, with
    the settings of the standard version. Raises ValueError for other names.
    """
    if name == "fgsm":
        return GradientPlan("fgsm", "ce", 1)
    if match := re.fullmatch(r"(pgd|margin|cw|dlr)-([1-9]\d*)(?:x([1-9]\d*))?", name):
        kind, steps, restarts = match[1].replace("cw", "margin"), int(match[2]), int(match[3] or 1)
        spelling = f"{kind}-{steps}" + (f"x{restarts}" if restarts > 1 else "")
        return GradientPlan(spelling, kind.replace("pgd", "ce"), steps, restarts)
    if name in ("autoattack", "autoattack-plus", "autoattack-rand"):
        return EnsemblePlan(name, name.removeprefix("autoattack").strip("-") or "standard")
    parts = tuple(name.removeprefix("autoattack:").split("+"))
    if name.startswith("autoattack:") and set(parts) <= set(COMPONENTS) and len(set(parts)) == len(parts):
        return EnsemblePlan(name, components=parts)
    raise ValueError(f"attacks: got {name!r}; expected {NAMES}. Choose from these.")
