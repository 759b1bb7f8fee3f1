"""``wcitrain list``: what can be named in recipes and options, with meaning, settings, cost and source."""

import argparse
from collections.abc import Mapping
from typing import Any

from wcitrain.attacks import APGD, ATTACK_LOSSES, fgsm
from wcitrain.curvature import ESTIMATORS
from wcitrain.evaluation.plans import EnsemblePlan
from wcitrain.listing import describe, describe_recipes
from wcitrain.measures import MEASURES
from wcitrain.objectives import INPUT_REGULARIZERS, OBJECTIVES
from wcitrain.optim import PENALTIES, PERTURBATIONS

LOSSES = {"pgd": "ce", "margin": "margin", "dlr": "dlr"}
ATTACKS: dict[str, Any] = {f"{name}-STEPS[xRESTARTS]": ATTACK_LOSSES[loss] for name, loss in LOSSES.items()}
ATTACKS = {
    "fgsm": fgsm,
    **ATTACKS,
    "apgd-{ce,dlr,t}": APGD,
    "autoattack": EnsemblePlan,
}  # as `evaluate --attacks` names them
TABLES: dict[str, Mapping[Any, Any]] = {
    "objectives": OBJECTIVES | INPUT_REGULARIZERS,
    "perturbations": PERTURBATIONS,
    "penalties": PENALTIES,
    "estimators": ESTIMATORS,
    "measures": MEASURES,
    "attacks": ATTACKS,
}


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    entries = describe_recipes() if options.kind == "recipes" else describe(TABLES[options.kind])
    print(*entries, sep="\n")
    return 0
