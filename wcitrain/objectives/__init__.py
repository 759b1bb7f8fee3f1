"""Training objectives: what the adversary does with a batch, and the differentiable loss at its images."""

from wcitrain.objectives.free import FreeAT
from wcitrain.objectives.input_regularizers import CURE, InputGradient, InputRegularizer, WithInputRegularizer
from wcitrain.objectives.objective import Objective
from wcitrain.objectives.pairing import ALP, MART, TRADES, trades
from wcitrain.objectives.plain import PGDAT, Standard
from wcitrain.objectives.rotation import RotationAT
from wcitrain.objectives.single_step import FGSMRS, CatastrophicOverfittingGuard, GradAlign
from wcitrain.objectives.union import UnionAT, UnionThreat

OBJECTIVES: dict[str, type] = {
    "standard": Standard,
    "pgd_at": PGDAT,
    "trades": TRADES,
    "mart": MART,
    "alp": ALP,
    "fgsm_rs": FGSMRS,
    "grad_align": GradAlign,
    "free": FreeAT,
    "rotation": RotationAT,
    "union": UnionAT,
}
INPUT_REGULARIZERS: dict[str, type] = {"cure": CURE, "input_gradient": InputGradient}
