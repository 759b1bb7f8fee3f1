"""Robust training with the Weight-Curvature Index as a training knob."""

from wcitrain.attacks import ThreatModel, fgsm, pgd
from wcitrain.curvature import TraceEstimate, gauss_newton_trace
from wcitrain.evaluation import Evaluation, evaluate
from wcitrain.models import create_model, load_exported
from wcitrain.objectives import PGDAT, Loss, Standard
from wcitrain.optim import (
    AWP,
    FrobeniusTracePenalty,
    RegularizedOptimizer,
    StrengthSchedule,
    UniformNoise,
    WCIPenalty,
    WCIPosterior,
)  # fmt: skip
from wcitrain.params import select_layers
from wcitrain.recipe import Recipe, RecipeError, load_recipe, recipe_from_dict
from wcitrain.train import fit

__version__ = "0.1.0"

__all__ = [
    "AWP",
    "PGDAT",
    "Evaluation",
    "FrobeniusTracePenalty",
    "Loss",
    "Recipe",
    "RecipeError",
    "RegularizedOptimizer",
    "Standard",
    "StrengthSchedule",
    "ThreatModel",
    "TraceEstimate",
    "UniformNoise",
    "WCIPenalty",
    "WCIPosterior",
    "create_model",
    "evaluate",
    "fgsm",
    "fit",
    "gauss_newton_trace",
    "load_exported",
    "load_recipe",
    "pgd",
    "recipe_from_dict",
    "select_layers",
]
