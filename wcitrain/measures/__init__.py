"""What is monitored: quantities measured on a trained model, each with its error."""

from wcitrain.measures import derivatives, flatness, losses, norms, pac_bayes_sharpness, sharpness
from wcitrain.measures.correlation import Correlation, correlate
from wcitrain.measures.landscape import Landscape, take_landscape
from wcitrain.measures.problem import Measure, Measurement, Problem
from wcitrain.measures.wci import HessianTrace, WeightCurvatureIndex, measure_wci
from wcitrain.measures.wci_measurement import PACBayesBound, WCIMeasurement, pac_bayes_bound

MEASURES: dict[str, type[Measure]] = {
    "wci": WeightCurvatureIndex,
    "hessian_trace": HessianTrace,
    "lambda_max": derivatives.LambdaMax,
    "average_flatness": flatness.AverageFlatness,
    "worst_flatness": flatness.WorstFlatness,
    "relative_flatness": derivatives.RelativeFlatness,
    "sam_sharpness": sharpness.SAMSharpness,
    "asam_sharpness": sharpness.ASAMSharpness,
    "awp_sharpness": sharpness.AWPSharpness,
    "average_sharpness": sharpness.AverageSharpness,
    "worst_sharpness": sharpness.WorstSharpness,
    "pac_bayes_sharpness": pac_bayes_sharpness.PACBayesSharpness,
    "magnitude_aware_sharpness": pac_bayes_sharpness.MagnitudeAwareSharpness,
    "gradient_norm": derivatives.LossGradientNorm,
    "input_gradient_norm": derivatives.InputGradientNorm,
    "input_curvature": derivatives.InputCurvature,
    "margins": losses.Margins,
    "normalised_margin": losses.NormalisedMargin,
    "frobenius_norms": norms.FrobeniusNorms,
    "spectral_norms": norms.SpectralNorms,
    "path_norm": norms.PathNorm,
    "distance_from_initialisation": norms.DistanceFromInitialisation,
    "robust_loss": losses.RobustLoss,
    "clean_loss": losses.CleanLoss,
    "robust_gap": losses.RobustGap,
}
