"""The optimizer-wrapper layer: weight perturbations and penalties around any torch optimizer."""

from wcitrain.optim.ascent import ASAM, AWP, CRSAM, GSAM, SAM, GradientNorm, VaSSO, WCIAdversary
from wcitrain.optim.penalty import FrobeniusTracePenalty, WCIPenalty
from wcitrain.optim.perturbation import RWP, NoiseStability, UniformNoise, WCIPosterior, WeightPerturbation
from wcitrain.optim.schedule import StrengthSchedule
from wcitrain.optim.wrapper import RegularizedOptimizer

WCI = WCIPosterior  # the project's own rule, under its short name

__all__ = [
    "ASAM",
    "AWP",
    "CRSAM",
    "GSAM",
    "RWP",
    "SAM",
    "WCI",
    "FrobeniusTracePenalty",
    "GradientNorm",
    "NoiseStability",
    "RegularizedOptimizer",
    "StrengthSchedule",
    "UniformNoise",
    "VaSSO",
    "WCIAdversary",
    "WCIPenalty",
    "WCIPosterior",
    "WeightPerturbation",
]
