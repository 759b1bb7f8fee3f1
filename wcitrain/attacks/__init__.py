"""Threat models and gradient attacks: pure functions on images in [0, 1] that return ``x_adv``."""

from wcitrain.attacks.ascent import ATTACK_LOSSES, Attack, fgsm, msd, pgd
from wcitrain.attacks.threat import Norm, ThreatModel, project, steepest_step, uniform_in_ball
