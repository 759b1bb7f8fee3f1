"""Learning-rate schedules: the share of the peak rate at a fractional epoch.

Legend: e epochs done (fractional), E epochs in all, w epochs of warm-up, r last rate over the peak rate.
"""

import math
from typing import Annotated, ClassVar

from pydantic import Field

from wcitrain.method import InnerShare, Method, NonNegative, Positive, Share, method, refuse

Warmup = Annotated[NonNegative, Field(description="Epochs over which the rate rises linearly from 0.")]
FinalFraction = Annotated[Share, Field(description="Last rate over the peak rate, in [0, 1].")]


class Schedule(Method):
    """A learning rate as a function of time alone."""

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the rate at a fractional ``epoch`` of ``epochs``, as a share of the peak rate."""
        raise NotImplementedError


@method
class Constant(Schedule):
    """One rate: factor = min(1, e / w)."""

    warmup_epochs: Warmup = 0.0
    label: ClassVar[str] = "constant rate"

    def factor(self, epoch: float, epochs: int) -> float:
        """Return 1, or less in the warm-up."""
        return _risen(1.0, epoch, self.warmup_epochs)


@method
class Piecewise(Schedule):
    """Drops at given epochs: factor = γ^(number of milestones <= e) · min(1, e / w)."""

    milestones: Annotated[tuple[NonNegative, ...], Field(strict=False)] = Field(
        default=(), description="Epochs after which the rate drops."
    )
    gamma: InnerShare = Field(default=0.1, description="Factor γ of each drop, in (0, 1).")
    warmup_epochs: Warmup = 0.0
    label: ClassVar[str] = "piecewise rate"

    def __post_init__(self) -> None:
        marks = list(self.milestones)
        if marks != sorted(set(marks)):
            refuse("milestones", f"got {marks}; expected increasing epochs. Sort them.")

    def factor(self, epoch: float, epochs: int) -> float:
        """Return one factor γ for each milestone that is over."""
        drops = sum(epoch >= milestone for milestone in self.milestones)
        return _risen(self.gamma**drops, epoch, self.warmup_epochs)


@method
class Cosine(Schedule):
    """Half a cosine after the warm-up.

    factor = (r + (1 - r) (1 + cos πs) / 2) · min(1, e / w),    s = (e - w) / (E - w) cut to [0, 1].
    """

    final_fraction: FinalFraction = 0.0
    warmup_epochs: Warmup = 0.0
    label: ClassVar[str] = "cosine rate"

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the cosine's value, or less in the warm-up."""
        share = (epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-9)
        cosine = (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
        return _risen(self.final_fraction + (1 - self.final_fraction) * cosine, epoch, self.warmup_epochs)


@method
class OneCycle(Schedule):
    """A linear rise and fall: factor = e / p before the peak p, then r + (1 - r) (E - e) / (E - p)."""

    peak_epoch: Positive | None = Field(default=None, description="Epochs until the peak; null: 40 % of all.")
    final_fraction: FinalFraction = 0.0
    label: ClassVar[str] = "one-cycle rate"

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the height on the rise or on the fall."""
        peak = self.peak_epoch or 0.4 * epochs
        if epoch < peak:
            return epoch / peak
        return self.final_fraction + (1 - self.final_fraction) * (epochs - epoch) / max(epochs - peak, 1e-9)


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "piecewise": Piecewise,
    "cosine": Cosine,
    "one_cycle": OneCycle,
}


def _risen(factor: float, epoch: float, warmup_epochs: float) -> float:
    """Return ``factor`` with the linear rise over the warm-up."""
    return factor * min(1.0, epoch / warmup_epochs) if warmup_epochs else factor
