"""Clean, robust and corrupted accuracy, example by example, with intervals, tests and checks of the model."""

from wcitrain.evaluation.accuracy import AccuracyMeasurement, measure_accuracy
from wcitrain.evaluation.checks import PreflightWarning
from wcitrain.evaluation.comparison import Comparison, compare
from wcitrain.evaluation.corruptions import Corruptions
from wcitrain.evaluation.evaluating import evaluate
from wcitrain.evaluation.images import Transfer, save_images
from wcitrain.evaluation.minimal import MinimalEps
from wcitrain.evaluation.plans import parse_attack
from wcitrain.evaluation.results import AttackResult, Evaluation, Finding
