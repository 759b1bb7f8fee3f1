"""Threat models and gradient attacks: pure functions on images in [0, 1] that return ``x_adv``."""

from wcitrain.attacks.ascent import PerExampleLoss, Start, fgsm, msd, pgd
from wcitrain.attacks.attack import Attack
from wcitrain.attacks.losses import ATTACK_LOSSES, AttackLoss, attack_loss
from wcitrain.attacks.threat import (
    Norm,
    ThreatModel,
    project,
    project_in_box,
    sparse_step,
    steepest_step,
    uniform_in_ball,
)  # fmt: skip

__all__ = [
    "ATTACK_LOSSES",
    "Attack",
    "AttackLoss",
    "Norm",
    "PerExampleLoss",
    "Start",
    "ThreatModel",
    "attack_loss",
    "fgsm",
    "msd",
    "pgd",
    "project",
    "project_in_box",
    "sparse_step",
    "steepest_step",
    "uniform_in_ball",
]
