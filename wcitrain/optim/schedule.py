"""When a perturbation or penalty acts, and how strongly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StrengthSchedule:
    """Off before ``start``, then a linear ramp to full strength, acting on every ``every``-th optimizer step.

    Args:
        start: First optimizer step (0-based) at which the rule may act.
        ramp: Steps from ``start`` until full strength; 0 switches on at once.
        every: Act on one step in ``every``. A penalty is multiplied by ``every`` to keep its mean strength; a weight
            perturbation is not (its radius is a radius, not a rate): its mean strength falls.

    Raises:
        ValueError: A negative ``start`` or ``ramp``, or ``every < 1``.
    """

    start: int = 0
    ramp: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        if self.start < 0 or self.ramp < 0 or self.every < 1:
            raise ValueError(f"schedule: got {self}; expected start >= 0, ramp >= 0 and every >= 1 (optimizer steps).")

    def factor(self, step: int) -> float:
        """Return the share of full strength at optimizer step ``step`` (0-based): 0 when the rule does not act."""
        if step < self.start or (step - self.start) % self.every:
            return 0.0
        return 1.0 if step >= self.start + self.ramp else (step - self.start + 1) / (self.ramp + 1)
