"""When a perturbation or penalty acts, and how strongly."""

from pydantic import Field

from wcitrain.method import NonNegative, PositiveCount, method


@method
class StrengthSchedule:
    """Off before ``start``, then a linear ramp to full strength, acting on every ``every``-th optimizer step.

    A penalty is multiplied by ``every`` to keep its mean strength. A weight perturbation is not (its radius
    is a radius, not a rate): its mean strength falls.
    """

    start: NonNegative = Field(
        default=0.0, description="Epochs trained before it acts; steps in plain loops."
    )
    ramp: NonNegative = Field(default=0.0, description="Epochs over which it grows to full strength.")
    every: PositiveCount = Field(default=1, description="Acts in one of so many optimizer steps.")

    def factor(self, step: int, steps_per_epoch: int = 1) -> float:
        """Return the share of full strength at optimizer step ``step`` (0-based), 0 where it does not act."""
        start, ramp = round(self.start * steps_per_epoch), round(self.ramp * steps_per_epoch)
        if step < start or (step - start) % self.every:
            return 0.0
        return 1.0 if step >= start + ramp else (step - start + 1) / (ramp + 1)


ALWAYS = StrengthSchedule()
