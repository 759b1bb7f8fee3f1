"""Training objectives: what the adversary does with a batch, and the differentiable loss at its images."""

from wcitrain.objectives.input_regularizers import CURE, InputGradient, InputRegularizer, WithInputRegularizer
from wcitrain.objectives.objective import PGDAT, Objective, Standard, UnionAT, UnionThreat
from wcitrain.objectives.pairing import ALP, MART, TRADES, RotationAT
from wcitrain.objectives.single_step import FGSMRS, CatastrophicOverfittingGuard, FreeAT, GradAlign

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
