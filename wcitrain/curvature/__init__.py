"""Estimators of the layer-wise curvature ``t_l = Tr(H_l)``, one method a file, all returning a ``TraceEstimate``."""

from wcitrain.curvature.estimate import TraceEstimate
from wcitrain.curvature.gauss_newton import gauss_newton_trace

__all__ = ["TraceEstimate", "gauss_newton_trace"]
