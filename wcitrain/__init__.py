"""Robust training with the Weight-Curvature Index as a training knob."""

from wcitrain.attacks import ATTACK_LOSSES, Attack, ThreatModel, fgsm, msd, pgd, project
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
    mean_squared_error,
    top_layer_trace,
    two_point_trace,
)
from wcitrain.data import Augmentation, Mixing
from wcitrain.evaluation import Evaluation, compare, evaluate
from wcitrain.measures import Measurement, WCIMeasurement, correlate, measure, measure_wci
from wcitrain.models import create_model, load_exported
from wcitrain.objectives import (
    ALP,
    CURE,
    FGSMRS,
    MART,
    PGDAT,
    TRADES,
    CatastrophicOverfittingGuard,
    FreeAT,
    GradAlign,
    InputGradient,
    RotationAT,
    Standard,
    UnionAT,
    UnionThreat,
    WithInputRegularizer,
    alp,
    mart,
    pgd_at,
    trades,
)
from wcitrain.optim import (
    ASAM,
    AWP,
    CRSAM,
    GSAM,
    RWP,
    SAM,
    WCI,
    FrobeniusTracePenalty,
    GradientNorm,
    NoiseStability,
    RegularizedOptimizer,
    StrengthSchedule,
    UniformNoise,
    VaSSO,
    WCIAdversary,
    WCIPenalty,
    WCIPosterior,
)
from wcitrain.params import select_layers
from wcitrain.recipe import Recipe, RecipeError, load_recipe, recipe_from_dict
from wcitrain.train import fit

__version__ = "0.1.0"
