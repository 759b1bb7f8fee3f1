"""The optimizer-wrapper layer: weight perturbations and penalties around any torch optimizer."""

from wcitrain.optim.ascent import ASAM, AWP, CRSAM, GSAM, SAM, GradientNorm, VaSSO, WCIAdversary
from wcitrain.optim.gaussian_noise import RWP, NoiseStability
from wcitrain.optim.penalty import (
    PENALTIES,
    FrobeniusPenalty,
    FrobeniusTracePenalty,
    Penalty,
    TracePenalty,
    WCIPenalty,
)
from wcitrain.optim.perturbation import StrengthSchedule, WeightPerturbation
from wcitrain.optim.random_directions import UniformNoise, WCIPosterior
from wcitrain.optim.wrapper import RegularizedOptimizer

WCI = WCIPosterior  # the project's own rule, under its short name

PERTURBATIONS: dict[str, type[WeightPerturbation]] = {
    "sam": SAM,
    "asam": ASAM,
    "awp": AWP,
    "vasso": VaSSO,
    "gsam": GSAM,
    "gradient_norm": GradientNorm,
    "cr_sam": CRSAM,
    "wci_adversary": WCIAdversary,
    "wci": WCIPosterior,
    "noise": UniformNoise,
    "noise_stability": NoiseStability,
    "rwp": RWP,
}
