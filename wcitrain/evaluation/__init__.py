"""Clean, robust and corrupted accuracy, example by example, with intervals, tests and checks of the model."""

from wcitrain.evaluation.accuracy import AccuracyMeasurement, measure_accuracy
from wcitrain.evaluation.corruptions import CORRUPTIONS, corrupt
from wcitrain.evaluation.evaluating import evaluate
from wcitrain.evaluation.evaluation import AttackResult, Comparison, Evaluation, compare
from wcitrain.evaluation.findings import Finding, PreflightWarning
from wcitrain.evaluation.intervals import McNemar, bootstrap_interval, mcnemar, wilson_interval
from wcitrain.evaluation.naming import parse_attack

__all__ = [
    "CORRUPTIONS",
    "AccuracyMeasurement",
    "AttackResult",
    "Comparison",
    "Evaluation",
    "Finding",
    "McNemar",
    "PreflightWarning",
    "bootstrap_interval",
    "compare",
    "corrupt",
    "evaluate",
    "mcnemar",
    "measure_accuracy",
    "parse_attack",
    "wilson_interval",
]
