"""Averages of the weights along the way: exponential over the steps (EMA), or equal over the epochs (SWA).

The averaged weights are what is measured, selected and exported. EMA averages their running statistics too;
SWA's would be those of no training step, so they are taken anew (`recalibrate`).
"""

from collections.abc import Callable, Iterator

import torch
from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wcitrain.method import Count, InnerShare, Method, method, setting
from wcitrain.preserve import module_mode

TrainPasses = Callable[[nn.Module], Iterator[None]]  # the training loss of a model, a batch at a time


class Averaging(Method):
    """A rule that moves ``average``, a copy of the model in eval mode, after every step or every epoch."""

    def after_step(self, average: nn.Module, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (0-based)."""

    def after_epoch(self, average: nn.Module, model: nn.Module, epoch: int, passes: TrainPasses) -> None:
        """Take in the weights after ``epoch`` finished epochs."""


@method
class EMA(Averaging):
    """Exponential moving average of the weights after every optimizer step.

        w̄ ← decay · w̄ + (1 − decay) · w,    w̄ = w after the first two steps                               (1)

    Running statistics are averaged alike, counters copied.
    """

    decay: InnerShare = setting(0.999, "Decay per step of the averaged weights, in (0, 1).")
    label = "EMA {decay:g}"
    source = "Polyak, Juditsky 1992, with exponential weights"
    cost = "no pass; one more copy of the model"

    @torch.no_grad()
    def after_step(self, average: nn.Module, model: nn.Module, step: int) -> None:
        """Apply (1)."""
        decay = self.decay if step > 1 else 0.0
        for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1.0 - decay)
            else:
                mean.copy_(value)


@method
class SWA(Averaging):
    """Stochastic weight averaging: the equal mean of the weights at the ends of epochs.

        w̄ = (1/n) Σ_{t > start} w_t                                                                       (2)

    over the n epochs after ``start_epoch``; before, it is the weights themselves.
    """

    start_epoch: Count = Field(description="Epochs before the first sample; then one sample an epoch.")
    label = "SWA"
    source = "Izmailov et al., arXiv 1803.05407"
    cost = "training passes over evaluation.train_size images an epoch; one more copy of the model"

    def after_epoch(self, average: nn.Module, model: nn.Module, epoch: int, passes: TrainPasses) -> None:
        """Apply (2); statistics are those of ``passes`` once two are averaged."""
        n = epoch - self.start_epoch
        if n <= 1:
            average.load_state_dict(model.state_dict())
            return
        with torch.no_grad():
            for mean, p in zip(average.parameters(), model.parameters(), strict=True):
                mean.add_((p - mean) / n)
        recalibrate(average, passes, model)


AVERAGES: dict[str, type[Averaging]] = {"ema": EMA, "swa": SWA}


def recalibrate(model: nn.Module, passes: TrainPasses, trained: nn.Module | None = None) -> None:
    """Replace BatchNorm's running statistics by their plain averages over ``passes(model)``.

    The passes are what training does with a batch, so the statistics are of the images that training
    normalises (clean, attacked, or both). Dropout and stochastic depth stay off; modes and momenta are kept.
    Those that ``trained``, the same model, holds in eval mode keep theirs. ValueError where there is no pass.
    """
    pairs = zip(model.modules(), (trained or model).modules(), strict=True)
    used = [m for m, own in pairs if own.training or trained is None]
    norms = [m for m in used if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with module_mode(model, training=False):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        try:
            num_batches = sum(1 for _ in passes(model))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not num_batches:
        raise ValueError("recalibrate: got no batch; expected at least one. Raise evaluation.train_size.")
