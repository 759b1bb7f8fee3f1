"""What is monitored: quantities measured on a trained model, each with its error."""

from wcitrain.measures.correlation import Correlation, Estimate, correlate
from wcitrain.measures.flatness import AverageFlatness, WorstFlatness
from wcitrain.measures.gradients import InputCurvature, InputGradientNorm, LossGradientNorm
from wcitrain.measures.landscape import Landscape, landscape_1d, landscape_2d
from wcitrain.measures.losses import CleanLoss, Margins, NormalisedMargin, RobustGap, RobustLoss
from wcitrain.measures.norms import DistanceFromInitialisation, FrobeniusNorms, PathNorm, SpectralNorms
from wcitrain.measures.pac_bayes import PACBayesBound, pac_bayes_bound
from wcitrain.measures.pac_bayes_sharpness import MagnitudeAwareSharpness, PACBayesSharpness
from wcitrain.measures.problem import Measure, Measurement, Problem
from wcitrain.measures.relative_flatness import RelativeFlatness
from wcitrain.measures.sharpness import (
    ASAMSharpness,
    AverageSharpness,
    AWPSharpness,
    SAMSharpness,
    WorstSharpness,
)
from wcitrain.measures.spectrum import LambdaMax
from wcitrain.measures.wci import HessianTrace, WeightCurvatureIndex, measure_wci
from wcitrain.measures.wci_measurement import WCIMeasurement

MEASURES: dict[str, type[Measure]] = {
    "wci": WeightCurvatureIndex,
    "hessian_trace": HessianTrace,
    "lambda_max": LambdaMax,
    "average_flatness": AverageFlatness,
    "worst_flatness": WorstFlatness,
    "relative_flatness": RelativeFlatness,
    "sam_sharpness": SAMSharpness,
    "asam_sharpness": ASAMSharpness,
    "awp_sharpness": AWPSharpness,
    "average_sharpness": AverageSharpness,
    "worst_sharpness": WorstSharpness,
    "pac_bayes_sharpness": PACBayesSharpness,
    "magnitude_aware_sharpness": MagnitudeAwareSharpness,
    "gradient_norm": LossGradientNorm,
    "input_gradient_norm": InputGradientNorm,
    "input_curvature": InputCurvature,
    "margins": Margins,
    "normalised_margin": NormalisedMargin,
    "frobenius_norms": FrobeniusNorms,
    "spectral_norms": SpectralNorms,
    "path_norm": PathNorm,
    "distance_from_initialisation": DistanceFromInitialisation,
    "robust_loss": RobustLoss,
    "clean_loss": CleanLoss,
    "robust_gap": RobustGap,
}
