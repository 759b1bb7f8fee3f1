"""The optimizer-wrapper layer: weight perturbations and penalties around any torch optimizer."""

from wcitrain.optim.penalty import FrobeniusTracePenalty, WCIPenalty
from wcitrain.optim.perturbation import AWP, UniformNoise, WCIPosterior
from wcitrain.optim.schedule import StrengthSchedule
from wcitrain.optim.wrapper import RegularizedOptimizer

__all__ = [
    "AWP",
    "FrobeniusTracePenalty",
    "RegularizedOptimizer",
    "StrengthSchedule",
    "UniformNoise",
    "WCIPenalty",
    "WCIPosterior",
]
