"""Clean and robust accuracy with their intervals."""

from wcitrain.evaluation.accuracy import AccuracyMeasurement, measure_accuracy
from wcitrain.evaluation.intervals import wilson_interval

__all__ = ["AccuracyMeasurement", "measure_accuracy", "wilson_interval"]
