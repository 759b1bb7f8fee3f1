"""Threat models and gradient attacks: pure functions on images in [0, 1] that return ``x_adv``."""

from wcitrain.attacks.apgd import APGD
from wcitrain.attacks.ascent import Attack, fgsm, pgd
from wcitrain.attacks.losses import ATTACK_LOSSES
from wcitrain.attacks.threat import Norm, ThreatModel, project, steepest_step, uniform_in_ball
from wcitrain.attacks.union import msd
