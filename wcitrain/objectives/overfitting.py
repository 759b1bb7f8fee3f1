"""Notice catastrophic overfitting: single-step training that loses its robustness to multi-step attacks within an epoch."""

import torch
from torch import Tensor, nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.preserve import full_precision, undisturbed


class CatastrophicOverfittingGuard:
    """Watches the robust accuracy of a few training images under a short PGD attack (Wong et al. 2020, 2001.03994, sec. 5.1).

        overfitting  ⇔  best robust accuracy so far − robust accuracy now  >  drop                                      (1)

    Wong et al.'s code compares with the check before instead of the best one, so a fall in two halves escapes it; it uses one
    training batch, five steps of 2/255 and one random start. Here the step is 2.5 eps / num_steps, for any radius and norm.

    Args:
        drop: Of the accuracy, in (0, 1).
        num_steps: Of the attack; >= 2, as one step is what the training resists.

    Attributes:
        best, last: Robust accuracies in [0, 1]; None before the first check.

    Example:
        >>> guard = CatastrophicOverfittingGuard(drop=0.2)
        >>> [guard.update(accuracy) for accuracy in (0.30, 0.42, 0.35, 0.01)]
        [False, False, False, True]
    """

    def __init__(self, drop: float = 0.2, num_steps: int = 5) -> None:
        if not 0 < drop < 1 or num_steps < 2:
            raise ValueError(
                f"CatastrophicOverfittingGuard: got drop={drop}, num_steps={num_steps}; expected drop in (0, 1) and num_steps "
                ">= 2. 0.2 and 5 are usual."
            )
        self.drop, self.num_steps = drop, num_steps
        self.best: float | None = None
        self.last: float | None = None

    def check(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator | None = None
    ) -> bool:
        """Measure the robust accuracy on a few hundred training images and return whether it has collapsed, (1).

        A pure measurement: eval mode and float32 inside, and the model, its buffers and the random state are left alone. Use the
        same images, the same ``threat`` (the final eps, if eps is warmed up) and a generator with the same seed every time.
        Among several processes, call it on all of them with the same images, or on one and share the answer.

        Args:
            model: The model that is trained.
            x: Training images without augmentation.
            y: Class indices [B], or soft targets [B, C], of which the largest counts.
            threat: What the model is trained against.
            generator: Source of the attack's random start.
        """
        attack = Attack(threat, num_steps=self.num_steps, step_size=2.5 * threat.eps / self.num_steps)
        with undisturbed(model, training=False), full_precision(model):
            x_adv = attack(model, x, y, generator)
            with torch.no_grad():
                is_right = model(x_adv).argmax(1) == (y.argmax(1) if y.ndim == 2 else y)
        return self.update(float(is_right.float().mean()))

    def update(self, robust_accuracy: float) -> bool:
        """Record a robust accuracy that was measured elsewhere and return whether it has collapsed, (1)."""
        self.last = robust_accuracy
        self.best = robust_accuracy if self.best is None else max(self.best, robust_accuracy)
        return self.best - robust_accuracy > self.drop

    def state_dict(self) -> dict[str, float | None]:
        """Return the accuracies, plain numbers."""
        return {"best": self.best, "last": self.last}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.best, self.last = state["best"], state["last"]
