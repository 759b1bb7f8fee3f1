"""Learning-rate schedules: the share of the peak rate at a fractional epoch.

Legend: e epochs done (fractional), E epochs in all, w epochs of warm-up, r last rate over the peak rate.
"""

import math
from typing import Annotated

from pydantic import Field

from wcitrain.method import InnerShare, Method, NonNegative, Positive, Share, method, refuse, setting

Warmup = Annotated[NonNegative, Field(description="Epochs over which the rate rises linearly from 0.")]


class Schedule(Method):
    """A learning rate as a function of time alone: a shape, times a linear rise from 0 over the warm-up.

    factor = shape(e) · min(1, e / w)                                                                  (1)
    """

    warmup_epochs: float = 0.0

    def factor(self, epoch: float, epochs: int) -> float:
        """Return (1), the rate at a fractional ``epoch`` of ``epochs``, as a share of the peak rate."""
        shape = self.shape(epoch, epochs)
        return shape * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else shape

    def shape(self, epoch: float, epochs: int) -> float:
        """Return the share of the peak rate without the warm-up."""
        raise NotImplementedError


@method
class Piecewise(Schedule):
    """Drops by a factor at given epochs, or none: shape = γ^(number of milestones <= e)."""

    milestones: Annotated[tuple[NonNegative, ...], Field(strict=False)] = Field(
        default=(), description="Epochs after which the rate drops."
    )
    gamma: InnerShare = setting(0.1, "Factor γ of each drop, in (0, 1).")
    warmup_epochs: Warmup = 0.0
    label = "piecewise rate"

    def __post_init__(self) -> None:
        marks = list(self.milestones)
        if marks != sorted(set(marks)):
            refuse("milestones", f"got {marks}; expected increasing epochs. Sort them.")

    def shape(self, epoch: float, epochs: int) -> float:
        """Return the share of the peak rate without the warm-up."""
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@method
class Cosine(Schedule):
    """Half a cosine from the end of the warm-up to the last epoch.

    shape = r + (1 - r) (1 + cos πs) / 2,    s = (e - w) / (E - w) cut to [0, 1]                       (2)
    """

    final_fraction: Share = setting(0.0, "Last rate over the peak rate, in [0, 1].")
    warmup_epochs: Warmup = 0.0
    label = "cosine rate"
    source = "Loshchilov, Hutter, arXiv 1608.03983, eq. 5, without restarts"

    def shape(self, epoch: float, epochs: int) -> float:
        """Return (2)."""
        share = (epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-9)
        cosine = (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
        return self.final_fraction + (1 - self.final_fraction) * cosine


@method
class OneCycle(Schedule):
    """A linear rise to a peak epoch p, e / p, and a linear fall to zero, (E - e) / (E - p)."""

    peak_epoch: Positive | None = setting(None, "Epochs until the peak; null: 40 % of all.")
    label = "one-cycle rate"
    source = "Smith, Topin, arXiv 1708.07120, with straight lines"

    def shape(self, epoch: float, epochs: int) -> float:
        """Return the share of the peak rate."""
        peak = self.peak_epoch or 0.4 * epochs
        return epoch / peak if epoch < peak else (epochs - epoch) / max(epochs - peak, 1e-9)


SCHEDULES: dict[str, type[Schedule]] = {"piecewise": Piecewise, "cosine": Cosine, "one_cycle": OneCycle}
