"""The attacks of an evaluation by name: PGD with restarts on several losses, FGSM, APGD, and AutoAttack.

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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wcitrain.attacks import APGD, ATTACK_LOSSES, ThreatModel
from wcitrain.attacks.ascent import climb, starting_point
from wcitrain.evaluation.attacking import Stage, Victim
from wcitrain.seeding import generator_from

APGDS = ("apgd-ce", "apgd-dlr", "apgd-t")
COMPONENTS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the DLR losses sort out the third and the fourth largest logit
NAMES = (
    "fgsm; pgd-STEPS, margin-STEPS (also cw-STEPS) or dlr-STEPS, apgd-ce-STEPS, apgd-dlr-STEPS or "
    "apgd-t-STEPS (without: 100), each with xRESTARTS where there are several, such as pgd-50x10; "
    f"autoattack, autoattack-plus, autoattack-rand; autoattack:PARTS with parts of {'+'.join(COMPONENTS)}"
)


@dataclass(frozen=True)
class GradientPlan:
    """Projected gradient ascent on ``loss``; FGSM is one step of length eps from the image itself.

    In l1 later restarts are those of APGD, which come from wider balls: from its own starts PGD finds the
    same few coordinates again, and ten restarts leave 2 points more.
    """

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
        device, radius (later ones in l1 are), steps or loss: a curve over eps has no noise of its own.
        """
        if threat.norm == "l1" and restart:
            other = AdaptivePlan(self.name, f"apgd-{self.loss}", self.num_steps)
            return other.climb(victim, other.attack(threat), 0, restart, x, y, places)
        step_size, x_adv = threat.step_for(self.num_steps), x
        if self.name == "fgsm":
            step_size = threat.eps
        else:
            start = partial(starting_point, threat=threat, start="uniform")
            x_adv = _starts(victim, ("evaluation", restart), x, places, start)
        loss = victim.expected(lambda z: ATTACK_LOSSES[self.loss](victim.model(z), y))
        return climb(loss, x, x_adv, threat, self.num_steps, step_size)


@dataclass(frozen=True)
class AdaptivePlan:
    """``attacks.APGD``, native: no package, starts and flags that do not depend on the batch size."""

    name: str
    loss: str  # of COMPONENTS: apgd-ce, apgd-dlr, apgd-t
    num_steps: int = 100
    num_restarts: int = 1

    def attack(self, threat: ThreatModel) -> APGD:
        """Return the attack; the targeted one has AutoAttack's 9 targets, 5 in l1."""
        loss: Any = {"apgd-t": "targeted-dlr"}.get(self.loss, self.loss.removeprefix("apgd-"))
        num_targets = 5 if threat.norm == "l1" else 9
        return APGD(threat, self.num_steps, self.num_restarts, loss, num_targets)

    def stages(self, victim: Victim, threat: ThreatModel) -> list[Stage]:
        """Return the restarts, for each target; raise ValueError where the loss needs more classes."""
        apgd = self.attack(threat)
        places = [(k, r) for k in apgd.targets(victim.clean.num_classes) for r in range(self.num_restarts)]
        names = [f"target {k}, restart {r + 1}" if k else f"restart {r + 1}" for k, r in places]
        attacks = [partial(self.climb, victim, apgd, *place) for place in places]
        return [Stage(name, attack) for name, attack in zip(names, attacks, strict=True)]

    def climb(
        self, victim: Victim, apgd: APGD, target: int, restart: int, x: Tensor, y: Tensor, places: Tensor
    ) -> Tensor:
        """Return x_adv of one restart; starts are functions of seed, target, restart and place alone."""
        starts = _starts(victim, ("apgd", target, restart), x, places, apgd.start)
        judge = apgd.judge(victim.model, victim.model(x), y, target)
        if victim.eot == 1:
            return apgd.climb(judge, x, starts)[0]
        mean = victim.expected(lambda z: judge(z)[0])
        return apgd.climb(lambda z: (mean(z), judge(z)[1]), x, starts)[0]


def _starts(
    victim: Victim, key: tuple[object, ...], x: Tensor, places: Tensor, start: Callable[..., Tensor]
) -> Tensor:
    """Return ``start(image, generator=...)`` of every image, drawn on the CPU for its place in the set."""
    generators = (generator_from("cpu", victim.seed, *key, place) for place in places.tolist())
    drawn = [start(z, generator=g) for z, g in zip(x.cpu().split(1), generators, strict=True)]
    return torch.cat(drawn).to(x.device)


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
        if victim.eot > 1:  # as upstream's "rand" has it, with 20; FAB and Square go without
            adversary.apgd.eot_iter = adversary.apgd_targeted.eot_iter = victim.eot
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
    x_adv: Tensor = part.perturb(x.contiguous(), y)  # its l1 refuses other strides
    return x_adv


Plan = GradientPlan | AdaptivePlan | EnsemblePlan


def parse_attack(name: str) -> Plan:
    """Return what an attack's name stands for; the plan carries its one spelling (cw-20x1 is margin-20).

    ``"pgd-20"`` is PGD with 20 steps on the cross-entropy, ``"pgd-50x10"`` has ten restarts, margin and dlr
    are other losses (``attacks.ATTACK_LOSSES``). ``"apgd-t"`` and ``"apgd-ce-50x5"`` are APGD, and
    ``"autoattack:apgd-ce+square"`` are these parts of the package, with the settings of the standard version.
    Raises ValueError for other names.
    """
    if name == "fgsm":
        return GradientPlan("fgsm", "ce", 1)
    pattern = rf"(pgd|margin|cw|dlr|{'|'.join(APGDS)})-([1-9]\d*)(?:x([1-9]\d*))?"
    if match := re.fullmatch(pattern, f"{name}-100" if name in APGDS else name):
        kind, steps, restarts = match[1].replace("cw", "margin"), int(match[2]), int(match[3] or 1)
        spelling = f"{kind}-{steps}" + (f"x{restarts}" if restarts > 1 else "")
        if kind in APGDS:
            return AdaptivePlan(spelling, kind, steps, restarts)
        return GradientPlan(spelling, kind.replace("pgd", "ce"), steps, restarts)
    if name in ("autoattack", "autoattack-plus", "autoattack-rand"):
        return EnsemblePlan(name, name.removeprefix("autoattack").strip("-") or "standard")
    parts = tuple(name.removeprefix("autoattack:").split("+"))
    if name.startswith("autoattack:") and set(parts) <= set(COMPONENTS) and len(set(parts)) == len(parts):
        return EnsemblePlan(name, components=parts)
    raise ValueError(f"attacks: got {name!r}; expected {NAMES}. Choose from these.")
