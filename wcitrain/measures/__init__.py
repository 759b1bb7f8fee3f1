"""What is monitored: quantities measured on a trained model, each with its error."""

from wcitrain.measures.by_name import MEASURES, Shared, measure
from wcitrain.measures.correlation import Correlation, Estimate, correlate
from wcitrain.measures.flatness import average_flatness, worst_flatness
from wcitrain.measures.gradients import gradient_norm, input_curvature, input_gradient_norm
from wcitrain.measures.landscape import Landscape, landscape_1d, landscape_2d
from wcitrain.measures.losses import robust_gap, robust_loss
from wcitrain.measures.m_sharpness import average_sharpness, worst_sharpness
from wcitrain.measures.margins import margins, normalised_margin
from wcitrain.measures.measurement import Measurement
from wcitrain.measures.measuring import measure_wci
from wcitrain.measures.norms import distance_from_initialisation, frobenius_norms, path_norm, spectral_norms
from wcitrain.measures.pac_bayes import PACBayesBound, pac_bayes_bound
from wcitrain.measures.pac_bayes_sharpness import pac_bayes_sharpness
from wcitrain.measures.relative_flatness import relative_flatness
from wcitrain.measures.sharpness import asam_sharpness, awp_sharpness, sam_sharpness
from wcitrain.measures.spectrum import hessian_spectrum, lambda_max
from wcitrain.measures.wci import WCIMeasurement

__all__ = [
    "MEASURES",
    "Correlation",
    "Estimate",
    "Landscape",
    "Measurement",
    "PACBayesBound",
    "Shared",
    "WCIMeasurement",
    "asam_sharpness",
    "average_flatness",
    "average_sharpness",
    "awp_sharpness",
    "correlate",
    "distance_from_initialisation",
    "frobenius_norms",
    "gradient_norm",
    "hessian_spectrum",
    "input_curvature",
    "input_gradient_norm",
    "lambda_max",
    "landscape_1d",
    "landscape_2d",
    "margins",
    "measure",
    "measure_wci",
    "normalised_margin",
    "pac_bayes_bound",
    "pac_bayes_sharpness",
    "path_norm",
    "relative_flatness",
    "robust_gap",
    "robust_loss",
    "sam_sharpness",
    "spectral_norms",
    "worst_flatness",
    "worst_sharpness",
]
