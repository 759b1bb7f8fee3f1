"""Clean, robust and corrupted accuracy, example by example, with intervals, tests and checks of the model."""

from wcitrain.evaluation.accuracy import AccuracyMeasurement, measure_accuracy
from wcitrain.evaluation.checks import PreflightWarning
from wcitrain.evaluation.corruptions import Corruptions
from wcitrain.evaluation.evaluating import evaluate
from wcitrain.evaluation.plans import parse_attack
from wcitrain.evaluation.results import AttackResult, Comparison, Evaluation, Finding, compare
