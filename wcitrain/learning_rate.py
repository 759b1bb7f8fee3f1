"""Learning-rate schedules: the share of the peak rate at a step, or a fractional epoch.

Legend: e epochs done (fractional), E epochs in all, w epochs of warm-up, r last rate over the peak rate.
"""

import inspect
import math
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, JsonValue
from timm.scheduler import create_scheduler_v2

from wcitrain.method import InnerShare, Method, NonNegative, Positive, Share, method, refuse, setting

Warmup = Annotated[NonNegative, Field(description="Epochs over which the rate rises linearly from 0.")]


class Schedule(Method):
    """A learning rate as a function of time alone: a shape, times a linear rise from 0 over the warm-up.

    factor = shape(e) · min(1, e / w)                                                                  (1)
    """

    warmup_epochs: float = 0.0

    def factor(self, step: int, updates: int, epochs: int) -> float:
        """Return (1), the share of the peak rate at ``step``, of which an epoch has ``updates``."""
        epoch = step / updates
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


DEFAULTS = {name: one.default for name, one in inspect.signature(create_scheduler_v2).parameters.items()}


Kind = Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"]


@method
class TimmSchedule(Schedule):
    """timm's schedules of time alone, as its training script steps them (plateau waits for a metric).

    Its cosine runs under the warm-up too, ours from the end of it; its milestone m acts at m - 1 epochs (or
    steps), ours at m: so neither replaces the other.
    """

    kind: Kind = setting("cosine", "Name of the schedule there.")
    each_step: bool = setting(False, "A new rate for every step; false: for every epoch.")
    warmup_epochs: Annotated[NonNegative, Field(description="Epochs over which the rate rises.")] = 0.0
    warmup_fraction: Share = setting(0.0, "First rate of the warm-up over the peak rate, in [0, 1].")
    final_fraction: Share = setting(0.0, "Last rate over the peak rate, in [0, 1].")
    kwargs: dict[str, JsonValue] = setting(dict, "Further arguments of timm's, e.g. decay_rate: 0.5.")
    label = "timm's {kind} rate"
    source = "timm.scheduler.create_scheduler_v2"

    def _made(self, updates: int, epochs: int) -> tuple[Any, float]:
        """Return timm's scheduler of an optimizer whose peak rate is 1, and how many epochs it lasts."""
        rates = {"warmup_lr": self.warmup_fraction, "min_lr": self.final_fraction}
        times = {"warmup_epochs": self.warmup_epochs, "step_on_epochs": not self.each_step}
        one, create = torch.optim.SGD([torch.zeros(1)], lr=1.0), cast(Any, create_scheduler_v2)
        return create(
            one,
            self.kind,
            updates_per_epoch=updates,
            **rates,
            **times,
            **{"num_epochs": epochs, **self.kwargs},
        )

    def factor(self, step: int, updates: int, epochs: int) -> float:
        """Return the rate at ``step`` as a share of the peak rate; timm's script never steps to 0."""
        scheduler, _ = self._made(updates, epochs)
        if step and self.each_step:
            scheduler.step_update(step)
        elif step >= updates:
            scheduler.step(step // updates)
        return cast(float, scheduler.optimizer.param_groups[0]["lr"])

    def check(self, epochs: int) -> None:
        """Refuse arguments of no schedule, another length than ``epochs``, and what has no effect there."""
        try:
            length, curve = self._made(10, epochs)[1], self._curve(epochs)
        except (TypeError, ValueError, AssertionError, ArithmeticError) as error:
            refuse(
                "kwargs",
                f"got {self.kwargs}; expected arguments of timm's {self.kind}: {error}. Correct them.",
            )
        if length != epochs:
            rule = (
                f"train.epochs = {epochs}. Set kwargs.num_epochs, without prefix, cool-down, further cycles."
            )
            refuse("kwargs", f"got a schedule of {length:g} epochs; expected {rule}")
        others: dict[str, dict[str, Any]] = {key: {key: 0.0} for key in ("warmup_fraction", "final_fraction")}
        for key in (key for key, value in self.kwargs.items() if value != DEFAULTS[key]):
            others[f"kwargs.{key}"] = {"kwargs": {k: value for k, value in self.kwargs.items() if k != key}}
        others["kind"] = {"kind": "constant", "final_fraction": 0.0, "kwargs": {}}
        own = vars(self) | {f"kwargs.{key}": value for key, value in self.kwargs.items()}
        for key, other in others.items():
            if (less := replace(self, **other)) != self and less._curve(epochs) == curve:
                rule = f"a setting that changes the rate in {epochs} epochs. Remove or change it."
                refuse(key, f"got {own[key]} with {self.kind}, without effect; expected {rule}")

    def _curve(self, epochs: int) -> list[float]:
        """Return the rates of all epochs, or of ten steps in each."""
        return [self.factor(step, 10, epochs) for step in range(0, 10 * epochs, 1 if self.each_step else 10)]


SCHEDULES: dict[str, type[Schedule]] = {
    "piecewise": Piecewise,
    "cosine": Cosine,
    "one_cycle": OneCycle,
    "timm": TimmSchedule,
}
