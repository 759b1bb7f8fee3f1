"""Estimators of the layer-wise curvature ``t_l = Tr(H_l)``, one method a file, all returning a ``TraceEstimate``."""

from wcitrain.curvature.dense import dense_hessian, exact_gauss_newton_trace, exact_trace
from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.gauss_newton import gauss_newton_trace
from wcitrain.curvature.hutchinson import hutchinson_trace
from wcitrain.curvature.hutchpp import hutchpp_trace
from wcitrain.curvature.loss import Loss, Output, binary_cross_entropy, cross_entropy, mean_squared_error
from wcitrain.curvature.top_layer import top_layer_trace
from wcitrain.curvature.two_point import two_point_trace

__all__ = [
    "Loss",
    "Output",
    "TraceEstimate",
    "binary_cross_entropy",
    "cross_entropy",
    "dense_hessian",
    "exact_gauss_newton_trace",
    "exact_trace",
    "gauss_newton_trace",
    "hutchinson_trace",
    "hutchpp_trace",
    "mean_squared_error",
    "top_layer_trace",
    "two_point_trace",
]
