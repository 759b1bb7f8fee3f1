"""The names of attacks, and what they stand for: ``parse_attack``."""

import re
from dataclasses import dataclass

from wcitrain.attacks import ThreatModel

COMPONENTS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")  # of AutoAttack

NAMES = (
    "fgsm; pgd-STEPS, margin-STEPS (also cw-STEPS) or dlr-STEPS, each with xRESTARTS where there are "
    "several, such as pgd-50x10; autoattack, autoattack-plus, autoattack-rand; autoattack:PARTS with parts "
    f"of {'+'.join(COMPONENTS)}"
)
_LOSSES = {"pgd": "ce", "margin": "margin", "cw": "margin", "dlr": "dlr"}


@dataclass(frozen=True)
class GradientPlan:
    """Projected gradient ascent on ``loss``; FGSM is one step of length eps from the image itself."""

    name: str
    loss: str
    num_steps: int
    num_restarts: int = 1

    @property
    def is_fgsm(self) -> bool:
        """Whether it starts at the image."""
        return self.name == "fgsm"

    def step_size(self, threat: ThreatModel) -> float:
        """Return the length of a step: ``ThreatModel.step_for`` (Madry et al. 2018), eps for FGSM."""
        return threat.eps if self.is_fgsm else threat.step_for(self.num_steps)

    def includes(self, other: "GradientPlan") -> bool:
        """Tell whether this is the stronger attack: same loss, no fewer steps and restarts, not equal."""
        mine, others = (self.num_steps, self.num_restarts), (other.num_steps, other.num_restarts)
        return self.loss == other.loss and mine != others and mine[0] >= others[0] and mine[1] >= others[1]


@dataclass(frozen=True)
class EnsemblePlan:
    """AutoAttack ``standard``, ``plus`` or ``rand``, or ``components`` with the standard's settings."""

    name: str
    version: str = "standard"
    components: tuple[str, ...] = ()


Plan = GradientPlan | EnsemblePlan


def parse_attack(name: str) -> Plan:
    """Return what an attack's name stands for; the plan carries its one spelling (cw-20x1 is margin-20).

    Args:
        name: ``"pgd-20"``: PGD with 20 steps on the cross-entropy; ``"pgd-50x10"``: ten restarts;
            ``"margin-100x5"``, ``"dlr-20"``: on another loss (``attacks.ATTACK_LOSSES``); ``"fgsm"``;
            ``"autoattack"`` with ``"-plus"`` or ``"-rand"``; ``"autoattack:apgd-ce+square"``: these parts of
            it, with the settings of the standard version.

    Raises:
        ValueError: Not such a name; the message lists what there is.

    Example:
        >>> parse_attack("cw-100x5")
        GradientPlan(name='margin-100x5', loss='margin', num_steps=100, num_restarts=5)
    """
    if name == "fgsm":
        return GradientPlan("fgsm", "ce", 1)
    if found := re.fullmatch(r"(pgd|margin|cw|dlr)-([1-9]\d*)(?:x([1-9]\d*))?", name):
        kind, steps, restarts = found[1].replace("cw", "margin"), int(found[2]), int(found[3] or 1)
        return GradientPlan(
            f"{kind}-{steps}" + (f"x{restarts}" if restarts > 1 else ""), _LOSSES[kind], steps, restarts
        )
    if name == "autoattack" or name in ("autoattack-plus", "autoattack-rand"):
        return EnsemblePlan(name, name.removeprefix("autoattack").strip("-") or "standard")
    parts = tuple(name.removeprefix("autoattack:").split("+"))
    if name.startswith("autoattack:") and set(parts) <= set(COMPONENTS) and len(set(parts)) == len(parts):
        return EnsemblePlan(name, components=parts)
    raise ValueError(f"attacks: got {name!r}; expected {NAMES}. Choose from these.")
