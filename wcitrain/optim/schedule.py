"""When a perturbation or penalty acts, and how strongly."""

from wcitrain.method import NonNegative, PositiveCount, method, setting


@method
class StrengthSchedule:
    """Off before ``start``, then a linear ramp to full strength, acting on every ``every``-th optimizer step.

    A penalty is multiplied by ``every`` to keep its mean strength. A perturbation is not: it is a radius.
    """

    start: NonNegative = setting(0.0, "Epochs trained before it acts; steps in plain loops.")
    ramp: NonNegative = setting(0.0, "Epochs over which it grows to full strength.")
    every: PositiveCount = setting(1, "Acts in one of so many optimizer steps.")

    def factor(self, step: int, steps_per_epoch: int = 1) -> float:
        """Return the share of full strength at optimizer step ``step`` (0-based), 0 where it does not act."""
        start, ramp = round(self.start * steps_per_epoch), round(self.ramp * steps_per_epoch)
        if step < start or (step - start) % self.every:
            return 0.0
        return 1.0 if step >= start + ramp else (step - start + 1) / (ramp + 1)


ALWAYS = StrengthSchedule()
