"""``Attack``: one adversary with all its settings, to be run on any model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from wcitrain.attacks.ascent import Start, search
from wcitrain.attacks.losses import attack_loss
from wcitrain.attacks.threat import ThreatModel


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent with its settings: ``attack(model, x, y)`` returns adversarial images.

    Args:
        threat: Norm and radius.
        num_steps, step_size, num_restarts, l1_share: See ``pgd``.
        start: ``"uniform"`` in the ball; ``"gaussian"``: x + 0.001 N(0, I), as in TRADES; ``"none"``: x itself.
        loss: Name of what is maximised, see ``losses.ATTACK_LOSSES``.

    Raises:
        ValueError: A setting outside its range; or ``loss="kl"`` from ``start="none"``, where its gradient is exactly zero.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        >>> attack = Attack(ThreatModel("linf", 0.1), num_steps=5, step_size=0.05, start="gaussian", loss="kl")
        >>> x_adv = attack(model, x, y, generator=torch.Generator().manual_seed(0))
        >>> bool((x_adv - x).abs().max() <= 0.1 + 1e-6), attack.passes()
        (True, (6, 5))
    """

    threat: ThreatModel
    num_steps: int = 10
    step_size: float = 2 / 255
    start: Start = "uniform"
    num_restarts: int = 1
    loss: str = "ce"
    l1_share: float = 0.05

    def __post_init__(self) -> None:
        attack_loss(self.loss)
        if self.start not in get_args(Start):
            raise ValueError(f"Attack.start: got {self.start!r}; expected one of {', '.join(get_args(Start))}.")
        if not 0 <= self.step_size < float("inf"):
            raise ValueError(
                f"Attack.step_size: got {self.step_size}; expected a finite length >= 0. 2.5 eps / num_steps is usual."
            )
        if self.num_steps < 0 or self.num_restarts < 1 or not 0 < self.l1_share <= 1:
            raise ValueError(
                f"Attack: got num_steps={self.num_steps}, num_restarts={self.num_restarts}, l1_share={self.l1_share}; expected "
                "num_steps >= 0, num_restarts >= 1, l1_share in (0, 1]."
            )
        if self.loss == "kl" and self.start == "none":
            raise ValueError(
                "Attack.start: got 'none' with loss='kl'; expected a start beside x, where the KL's gradient is zero. "
                "Use start='gaussian'."
            )

    def __call__(
        self,
        model_fn: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return adversarial images for ``x`` [B, *dims], detached.

        Args:
            model_fn: Maps images to logits [B, C]; its mode and statistics are the caller's (``preserve.undisturbed``).
            x: Images in [0, 1].
            y: Class indices [B] or soft targets [B, C]; ``"kl"`` ignores them.
            generator: Source of the starting points.
        """
        loss, reference = attack_loss(self.loss), None
        if self.loss == "kl":
            with torch.no_grad():
                reference = model_fn(x)
        return search(
            lambda x_adv: loss(model_fn(x_adv), y, reference),
            x,
            threat=self.threat,
            num_steps=self.num_steps,
            step_size=self.step_size,
            start=self.start,
            num_restarts=self.num_restarts,
            l1_share=self.l1_share,
            generator=generator,
        )

    def scaled(self, factor: float) -> "Attack":
        """Return the attack with radius and steps times ``factor`` in [0, 1]; 1 returns the attack itself."""
        if factor == 1:
            return self
        return replace(self, threat=self.threat.scaled(factor), step_size=self.step_size * factor)

    def passes(self) -> tuple[int, int]:
        """Return the forward and backward passes of one call.

        ``num_steps`` of both a restart; one forward a restart to compare several; one forward for the clean logits of "kl".
        """
        compare = self.num_restarts if self.num_restarts > 1 else 0
        steps = self.num_steps * self.num_restarts
        return steps + compare + (self.loss == "kl"), steps
