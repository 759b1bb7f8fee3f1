"""Adversarial training with an auxiliary task: which of four ways was the image turned?

Legend: B batch, r_n ∈ {0, 1, 2, 3} quarter turns of image n, R_r the rotation by r quarter turns, f the class
head, g the rotation head of one network.
"""

import torch
from torch import Generator, Tensor, nn

from wcitrain.attacks import ATTACK_LOSSES, LabelLossName
from wcitrain.attacks.losses import ce
from wcitrain.curvature.loss import Loss, Output, cross_entropy
from wcitrain.method import NonNegative, method, setting
from wcitrain.objectives.objective import PGDAttacked, attack_mode
from wcitrain.objectives.terms import with_term
from wcitrain.params import precise


@method
class RotationAT(PGDAttacked):
    """Adversarial training with self-supervision by rotations.

        CE( f(x + δ), y ) + weight · CE( g(R_r(x + δ)), r ),   δ maximises the sum                         (1)

    The authors' code turns every image all four ways, each copy with a perturbation of its own (five passes a
    step; in their attack the rotation term has weight 1/8 a copy). Here one δ serves both terms and image n
    is turned n mod 4 times. Gauss–Newton: exact. The model must answer ``model(x, head="rotation")``.
    """

    attack_loss: LabelLossName = "ce"  # for the classes
    weight: NonNegative = setting(0.5, "Weight of the rotation term in loss and attack.")
    label = "AT + rotations {weight:g}"
    source = "Hendrycks et al., arXiv 1906.12340, eq. 1"
    cost = "2 forward and 2 backward passes, and the attack's, whose steps cost as much"
    needs_rotation_head = True
    passes = (2, 2)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None) -> Tensor:
        """Return PGD examples against the sum in (1); the model is left exactly as it was."""

        def both(x_adv: Tensor) -> Tensor:
            turned, turns = quarter_turns(x_adv)
            rotation = ce(rotation_logits(model, turned), turns)
            return ATTACK_LOSSES[self.attack_loss](model(x_adv), y) + self.weight * rotation

        with attack_mode(model, self.attack_bn):
            return self.attack.maximise(both, x, generator)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (1) with ``x_adv`` held fixed."""
        turned, turns = quarter_turns(x_adv)
        classes = cross_entropy(model(x_adv), y, label_smoothing=self.label_smoothing)
        logits = precise(rotation_logits(model, turned))
        rotation = cross_entropy(logits, turns).total
        return with_term(classes, self.weight, "rotation", rotation, Output(logits, weight=self.weight))

    def attack_passes(self) -> tuple[int, int]:
        """Twice those of ``PGDAT``: one pass for each head."""
        forward, backward = super().attack_passes()
        return 2 * forward, 2 * backward


def quarter_turns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return image n turned n mod 4 times by 90 degrees, and the numbers of turns [B]."""
    if x.ndim != 4 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"RotationAT: got images {tuple(x.shape)}; expected [B, C, H, W], H = W. Crop them.")
    if len(x) < 4:
        raise ValueError(f"RotationAT: got a micro-batch of {len(x)}; expected 4 or more. Use larger ones.")
    turned = x.clone()
    for turns in (1, 2, 3):
        turned[turns::4] = torch.rot90(x[turns::4], turns, (-2, -1))
    return turned, torch.arange(len(x), device=x.device) % 4


def rotation_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the four logits of the rotation head for every image."""
    advice = "Use create_model(..., rotation_head=True), or a model whose forward takes head='rotation'."
    try:
        logits = model(x, head="rotation")
    except TypeError as error:
        raise ValueError(f"RotationAT: model(x, head='rotation') failed: {error}. {advice}") from error
    got, expected = tuple(logits.shape), (len(x), 4)
    if got != expected:
        raise ValueError(f"RotationAT: got rotation logits of shape {got}; expected {expected}. {advice}")
    return logits
