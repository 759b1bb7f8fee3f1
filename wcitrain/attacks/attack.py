"""``Attack``: one adversary with all its settings, to be run on any model."""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from wcitrain.attacks.ascent import PerExampleLoss, Start, pgd
from wcitrain.attacks.losses import LossName, attack_loss
from wcitrain.attacks.threat import ThreatModel
from wcitrain.method import Count, Nested, NonNegative, PositiveCount, PositiveShare, method, refuse

Threat = Annotated[ThreatModel, Nested(), Field(description="Norm and radius of the attack.")]
NumRestarts = Annotated[
    PositiveCount, Field(description="Independent attacks; the worst for each image counts.")
]
L1Share = Annotated[
    PositiveShare, Field(description="Share of the coordinates that an l1 step moves; other norms ignore it.")
]


@method
class Attack:
    """Projected gradient ascent with its settings: ``attack(model, x, y)`` returns adversarial images.

    Raises:
        ValueError: A setting outside its range, or ``loss="kl"`` from ``start="none"``, where it is flat.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> attack = Attack(ThreatModel("linf", 0.1), 5, step_size=0.05, start="gaussian", loss="kl")
        >>> x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6), attack.passes()
        (True, (6, 5))
    """

    threat: Threat
    num_steps: Count = Field(default=10, description="Gradient steps of a restart.")
    step_size: NonNegative = Field(
        default=2 / 255, description="Length of a step in the threat's norm, in [0, 1] pixel units."
    )
    start: Start = Field(
        default="uniform",
        description="Start: uniform in the ball; gaussian, x + 0.001 N(0, I) as in TRADES; none, x itself.",
    )
    num_restarts: NumRestarts = 1
    loss: LossName = "ce"
    l1_share: L1Share = 0.05

    def __post_init__(self) -> None:
        if self.loss == "kl" and self.start == "none":
            text = "got 'none' with loss='kl'; expected a start beside x, where the KL's gradient is zero."
            refuse("start", f"{text} Use start='gaussian'.")

    def __call__(
        self, model_fn: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, generator: Generator | None = None
    ) -> Tensor:
        """Return adversarial images for ``x`` [B, *dims] in [0, 1], detached.

        Args:
            model_fn: Maps images to logits [B, C]; its mode and statistics are the caller's (``preserve``).
            x, generator: See ``pgd``.
            y: Class indices [B] or soft targets [B, C]; ``"kl"`` ignores them.
        """
        loss, reference = attack_loss(self.loss), None
        if self.loss == "kl":
            with torch.no_grad():
                reference = model_fn(x)
        return self.maximise(lambda x_adv: loss(model_fn(x_adv), y, reference), x, generator)

    def maximise(self, loss_fn: PerExampleLoss, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Return what ``pgd`` finds for any loss with these settings; ``loss`` is ignored."""
        return pgd(
            loss_fn,
            x,
            threat=self.threat,
            num_steps=self.num_steps,
            step_size=self.step_size,
            start=self.start,
            num_restarts=self.num_restarts,
            l1_share=self.l1_share,
            generator=generator,
        )

    def passes(self) -> tuple[int, int]:
        """Return the forward and backward passes of one call.

        ``num_steps`` of both a restart; one forward a restart to compare several; one for "kl" at ``x``.
        """
        compare = self.num_restarts if self.num_restarts > 1 else 0
        steps = self.num_steps * self.num_restarts
        return steps + compare + (self.loss == "kl"), steps
