"""Robust training with the Weight-Curvature Index as a training knob."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {  # by the room it lives in
    "attacks": "APGD ATTACK_LOSSES Attack ThreatModel fgsm msd pgd project",
    "curvature": "Loss Output TraceEstimate binary_cross_entropy cross_entropy mean_squared_error "
    "top_layer_trace",
    "data": "Augmentation Mixing",
    "evaluation": "Corruptions Evaluation compare evaluate",
    "measures": "MEASURES Measure Measurement Problem WCIMeasurement correlate measure_wci",
    "models": "create_model load_exported",
    "objectives": "ALP CURE FGSMRS MART PGDAT TRADES CatastrophicOverfittingGuard FreeAT GradAlign "
    "InputGradient RotationAT Standard UnionAT UnionThreat WithInputRegularizer",
    "optim": "ASAM AWP CRSAM GSAM RWP SAM WCI FrobeniusTracePenalty GradientNorm NoiseStability VaSSO "
    "RegularizedOptimizer StrengthSchedule UniformNoise WCIAdversary WCIPenalty WCIPosterior",
    "params": "select_layers",
    "recipe": "Recipe RecipeError load_recipe recipe_from_dict",
    "train": "fit",
}
_PLACES = {name: f"wcitrain.{room}" for room, names in _PUBLIC.items() for name in names.split()}

if TYPE_CHECKING:
    from wcitrain.attacks import *  # noqa: F403
    from wcitrain.curvature import *  # noqa: F403
    from wcitrain.data import *  # noqa: F403
    from wcitrain.evaluation import *  # noqa: F403
    from wcitrain.measures import *  # noqa: F403
    from wcitrain.models import create_model, load_exported
    from wcitrain.objectives import *  # noqa: F403
    from wcitrain.optim import *  # noqa: F403
    from wcitrain.params import select_layers
    from wcitrain.recipe import *  # noqa: F403
    from wcitrain.train import fit


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module 'wcitrain' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(["__version__", *_PLACES])
