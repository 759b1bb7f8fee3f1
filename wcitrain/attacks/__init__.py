"""Threat models and gradient attacks: pure functions on images in [0, 1] that return ``x_adv``."""

from wcitrain.attacks.ascent import PerExampleLoss, Start
from wcitrain.attacks.attack import Attack, L1Share, NumRestarts, Threat, fgsm, msd, pgd
from wcitrain.attacks.losses import ATTACK_LOSSES, LabelLossName, LossName
from wcitrain.attacks.threat import Norm, ThreatModel, project, sparse_step, steepest_step, uniform_in_ball
