"""Estimators of the layer-wise curvature ``t_l = Tr(H_l)``, one method a file."""

from wcitrain.curvature.dense import dense_hessian, exact_gauss_newton_trace, exact_trace
from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.estimators import ESTIMATORS, Auto
from wcitrain.curvature.gauss_newton import GaussNewton, gauss_newton_trace
from wcitrain.curvature.hutchinson import Hutchinson, hutchinson_trace
from wcitrain.curvature.loss import Loss, Output, binary_cross_entropy, cross_entropy, mean_squared_error
from wcitrain.curvature.top_layer import TopLayer, top_layer_trace
