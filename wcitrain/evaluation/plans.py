"""The attacks of an evaluation by name: PGD with restarts on several losses, FGSM, and AutoAttack."""

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wcitrain.attacks import ATTACK_LOSSES, Attack, ThreatModel
from wcitrain.attacks.ascent import ascend, input_gradient, starting_point
from wcitrain.evaluation.autoattack import COMPONENTS, EnsemblePlan
from wcitrain.evaluation.stages import Stage
from wcitrain.evaluation.victim import Victim
from wcitrain.seeding import generator_from


@dataclass(frozen=True)
class GradientPlan:
    """Projected gradient ascent on ``loss``; FGSM is one step of length eps from the image itself."""

    name: str
    loss: str
    num_steps: int
    num_restarts: int = 1

    def stages(self, victim: Victim, threat: ThreatModel) -> tuple[list[Stage], tuple[str, ...]]:
        """Return the restarts, and no notes; raise ValueError where the loss needs more classes."""
        ATTACK_LOSSES[self.loss](torch.zeros(1, victim.clean.num_classes), torch.zeros(1).long())
        return [
            Stage(f"restart {k + 1}", partial(self._attack, victim, threat, k), attacks_all=k == 0)
            for k in range(self.num_restarts)
        ], ()

    def includes(self, other: "GradientPlan") -> bool:
        """Tell whether this is the stronger attack: same loss, no fewer steps and restarts, not equal."""
        mine, others = (self.num_steps, self.num_restarts), (other.num_steps, other.num_restarts)
        return self.loss == other.loss and mine != others and mine[0] >= others[0] and mine[1] >= others[1]

    def _attack(
        self, victim: Victim, threat: ThreatModel, restart: int, x: Tensor, y: Tensor, places: Tensor
    ) -> Tensor:
        """Return x_adv of one restart; steps are ``ThreatModel.step_for`` long (Madry et al. 2018)."""

        def losses(images: Tensor) -> Tensor:
            return ATTACK_LOSSES[self.loss](victim.model(images), y)

        is_fgsm = self.name == "fgsm"
        attack = Attack(threat, self.num_steps, threat.eps if is_fgsm else threat.step_for(self.num_steps))
        x_adv = x if is_fgsm else _starts(x, threat, victim.seed, restart, places)
        for _ in range(self.num_steps):
            gradient = input_gradient(losses, x_adv)
            x_adv = ascend(x, x_adv, gradient, threat, attack.step_size, attack.l1_share)
        return x_adv


def _starts(x: Tensor, threat: ThreatModel, seed: int, restart: int, places: Tensor) -> Tensor:
    """Return uniform starting points, each a function of seed, restart and place alone, drawn on the CPU.

    Not of batch size, device, radius, steps or loss: a curve over eps has no noise of its own.
    """
    one, rows = torch.empty_like(x[:1], device="cpu"), []
    for image, place in zip(x.split(1), places.tolist(), strict=True):
        generator = generator_from("cpu", seed, "evaluation", restart, place)
        rows.append(starting_point(one.copy_(image), threat, "uniform", generator))
    return torch.cat(rows).to(x.device)


NAMES = (
    "fgsm; pgd-STEPS, margin-STEPS (also cw-STEPS) or dlr-STEPS, each with xRESTARTS where there are "
    "several, such as pgd-50x10; autoattack, autoattack-plus, autoattack-rand; autoattack:PARTS with parts "
    f"of {'+'.join(COMPONENTS)}"
)
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
