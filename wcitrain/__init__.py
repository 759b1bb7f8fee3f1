"""Robust training with the Weight-Curvature Index as a training knob."""

from wcitrain.attacks import ThreatModel, fgsm, pgd
from wcitrain.curvature import (
    Loss,
    Output,
    TraceEstimate,
    binary_cross_entropy,
    cross_entropy,
    dense_hessian,
    exact_gauss_newton_trace,
    exact_trace,
    gauss_newton_trace,
    hutchinson_trace,
    hutchpp_trace,
    mean_squared_error,
    top_layer_trace,
    two_point_trace,
)
from wcitrain.evaluation import Evaluation, evaluate
from wcitrain.measures import WCIMeasurement, measure_wci
from wcitrain.models import create_model, load_exported
from wcitrain.objectives import PGDAT, Standard
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
    "Output",
    "Recipe",
    "RecipeError",
    "RegularizedOptimizer",
    "Standard",
    "StrengthSchedule",
    "ThreatModel",
    "TraceEstimate",
    "UniformNoise",
    "WCIMeasurement",
    "WCIPenalty",
    "WCIPosterior",
    "binary_cross_entropy",
    "create_model",
    "cross_entropy",
    "dense_hessian",
    "evaluate",
    "exact_gauss_newton_trace",
    "exact_trace",
    "fgsm",
    "fit",
    "gauss_newton_trace",
    "hutchinson_trace",
    "hutchpp_trace",
    "load_exported",
    "load_recipe",
    "mean_squared_error",
    "measure_wci",
    "pgd",
    "recipe_from_dict",
    "select_layers",
    "top_layer_trace",
    "two_point_trace",
]
