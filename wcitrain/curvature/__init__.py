"""Estimators of the layer-wise curvature ``t_l = Tr(H_l)``, one method a file."""

from wcitrain.curvature.estimator import Estimator, TraceEstimate
from wcitrain.curvature.estimators import ESTIMATORS, Auto
from wcitrain.curvature.gauss_newton import GaussNewton
from wcitrain.curvature.hutchinson import Hutchinson
from wcitrain.curvature.loss import Loss, Output, binary_cross_entropy, cross_entropy, mean_squared_error
from wcitrain.curvature.top_layer import TopLayer, top_layer_trace
