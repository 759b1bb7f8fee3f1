"""The optimizer-wrapper layer: weight perturbations and penalties around any torch optimizer."""

from wcitrain.optim.ascent import ASAM, ASCENTS, AWP, CRSAM, GSAM, SAM, GradientNorm, VaSSO, WCIAdversary
from wcitrain.optim.penalty import (
    PENALTIES,
    FrobeniusPenalty,
    FrobeniusTracePenalty,
    Penalty,
    TracePenalty,
    WCIPenalty,
)
from wcitrain.optim.perturbation import WeightPerturbation
from wcitrain.optim.random_directions import (
    RANDOM_DIRECTIONS,
    RWP,
    NoiseStability,
    UniformNoise,
    WCIPosterior,
)
from wcitrain.optim.schedule import StrengthSchedule
from wcitrain.optim.wrapper import RegularizedOptimizer

WCI = WCIPosterior  # the project's own rule, under its short name

PERTURBATIONS: dict[str, type[WeightPerturbation]] = ASCENTS | RANDOM_DIRECTIONS
