"""Adversarial training with an auxiliary task: which of four ways was the image turned?

Legend: B batch, r_n ∈ {0, 1, 2, 3} quarter turns of image n, R_r the rotation by r quarter turns, f the class head, g the
rotation head of one network.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wcitrain.attacks import attack_loss, pgd
from wcitrain.curvature.loss import Loss, Output
from wcitrain.objectives.objective import PGDAttacked, attacked
from wcitrain.objectives.terms import class_loss, precise


@dataclass(frozen=True)
class RotationAT(PGDAttacked):
    """Adversarial training with self-supervision by rotations (Hendrycks et al. 2019, arXiv 1906.12340, eq. 1).

        CE( f(x + δ), y ) + weight · CE( g(R_r(x + δ)), r ),   δ maximises the sum                                      (1)

    What differs: the authors' code turns every image all four ways, each copy with a perturbation of its own (five copies of
    the batch a step; the rotation term enters their attack with weight 1/8 a copy). Here one δ serves both terms and image n is
    turned r_n = n mod 4 times, which is balanced and costs two passes instead of five.

    Cost of the loss: (2, 2) passes, of an attack step as much. Gauss–Newton: exact.

    The model must answer ``model(x, head="rotation")`` with four logits an image: ``create_model(..., rotation_head=True)``.

    Args:
        weight: Of the rotation term in loss and attack; 0.5 in the paper; >= 0.
        attack_loss: Of the class term in the attack: "ce", "margin" or "dlr".

    The other arguments: see ``PGDAttacked``.

    Example:
        >>> from wcitrain.models import create_model
        >>> _ = torch.manual_seed(0)
        >>> model = create_model("preact_resnet18", num_classes=3, in_chans=1, width=4, rotation_head=True)
        >>> x, y = torch.rand(8, 1, 8, 8), torch.randint(0, 3, (8,))
        >>> sorted(RotationAT(num_steps=1)(model, x, y).parts)
        ['cross_entropy', 'rotation']
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack_loss == "kl":
            raise ValueError("RotationAT.attack_loss: got 'kl'; expected 'ce', 'margin' or 'dlr'. Choose one of them.")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return PGD examples against the sum in (1); the model is left exactly as it was."""
        check_square(x)
        classes = attack_loss(self.attack_loss)

        def both(x_adv: Tensor) -> Tensor:
            turned, turns = quarter_turns(x_adv)
            rotation = attack_loss("ce")(rotation_logits(model, turned), turns)
            return classes(model(x_adv), y) + self.weight * rotation

        with attacked(model, self.attack_bn):
            return pgd(
                both,
                x,
                threat=self.threat,
                num_steps=self.num_steps,
                step_size=self.step_size,
                random_start=self.random_start,
                num_restarts=self.num_restarts,
                l1_share=self.l1_share,
                generator=generator,
            )

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Loss:
        """Return (1) with ``x_adv`` held fixed."""
        check_square(x_adv)
        turned, turns = quarter_turns(x_adv)
        classes = class_loss(model(x_adv), y, self.label_smoothing)
        logits = precise(rotation_logits(model, turned))
        rotation = class_loss(logits, turns).total
        return Loss(
            classes.total + self.weight * rotation,
            {**classes.parts, "rotation": rotation.detach()},
            (*classes.outputs, Output(logits, weight=self.weight)),
        )

    def attack_passes(self) -> tuple[int, int]:
        """Twice those of ``PGDAT``: one pass for each head."""
        forward, backward = super().attack_passes()
        return 2 * forward, 2 * backward

    def loss_passes(self) -> tuple[int, int]:
        """Forward at x_adv and at its rotations, and backward through both."""
        return 2, 2


def quarter_turns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return image n turned n mod 4 times by 90 degrees, and the numbers of turns [B].

    Raises:
        ValueError: Fewer than four images, of which some rotation would never be seen.
    """
    if len(x) < 4:
        raise ValueError(
            f"RotationAT: got a micro-batch of {len(x)} images; expected a multiple of 4, so that every rotation is as frequent. "
            "Use larger micro-batches."
        )
    turned = x.clone()
    for turns in (1, 2, 3):
        turned[turns::4] = torch.rot90(x[turns::4], turns, (-2, -1))
    return turned, torch.arange(len(x), device=x.device) % 4


def rotation_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the four logits of the rotation head for every image."""
    advice = "Use create_model(..., rotation_head=True), or a model of your own whose forward takes head='rotation'."
    try:
        logits = model(x, head="rotation")
    except TypeError as error:
        raise ValueError(f"RotationAT: model(x, head='rotation') failed: {error}. {advice}") from error
    if logits.shape != (len(x), 4):
        raise ValueError(
            f"RotationAT: got rotation logits of shape {tuple(logits.shape)}; expected ({len(x)}, 4). {advice}"
        )
    return logits


def check_square(x: Tensor) -> None:
    """Refuse images that do not fit into themselves when turned."""
    if x.ndim != 4 or x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"RotationAT: got images of shape {tuple(x.shape)}; expected [B, C, H, W] with H = W. Crop or resize them."
        )
