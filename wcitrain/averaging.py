"""Averages of the weights along the way: an exponential one each step (EMA), or an equal one each epoch (SWA).

The averaged weights are what is measured, selected and exported. Their running statistics: EMA averages them too; SWA's are
those of no training step, so they are taken anew (`recalibrate`).

Legend: w_t weights after epoch t, n epochs averaged.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wcitrain.preserve import module_mode

TrainPasses = Callable[[nn.Module], Iterator[None]]  # evaluates the training loss of a model, a batch at a time


class EMA:
    """w̄ ← decay · w̄ + (1 − decay) · w after every optimizer step, by timm; after the first two steps w̄ is w itself."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._ema = ModelEmaV3(model, decay=decay)
        self.module: Any = self._ema.module
        self.module.requires_grad_()  # its curvature is measured

    def after_step(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (0-based)."""
        self._ema.update(model, step=step)

    def after_epoch(self, model: nn.Module, epoch: int, train_passes: TrainPasses) -> None:
        """Do nothing: it moves every step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights."""
        return {"module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self.module.load_state_dict(state["module"])


class SWA:
    """Stochastic weight averaging (Izmailov et al., arXiv 1803.05407): the equal mean of the weights after each epoch.

        w̄ = (1/n) Σ_{t > start} w_t                                                                             (1)

    Before ``start_epoch`` epochs are over the average is the weights themselves.

    Args:
        model: The trained model.
        start_epoch: Epochs before the first sample.
    """

    def __init__(self, model: nn.Module, start_epoch: int) -> None:
        self.module: Any = deepcopy(model)
        self.start_epoch, self.num_averaged = start_epoch, 0

    def after_step(self, model: nn.Module, step: int) -> None:
        """Do nothing: it moves every epoch."""

    def after_epoch(self, model: nn.Module, epoch: int, train_passes: TrainPasses) -> None:
        """Take in the weights after ``epoch`` finished epochs; statistics from ``train_passes`` once two are averaged."""
        if epoch > self.start_epoch:
            self.num_averaged += 1
        if self.num_averaged <= 1:
            self.module.load_state_dict(model.state_dict())
            return
        with torch.no_grad():
            for mean, p in zip(self.module.parameters(), model.parameters(), strict=True):
                mean += (p - mean) / self.num_averaged
        if any(isinstance(m, _BatchNorm) for m in self.module.modules()):
            recalibrate(self.module, train_passes)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and how many they are of."""
        return {"module": self.module.state_dict(), "num_averaged": self.num_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self.module.load_state_dict(state["module"])
        self.num_averaged = state["num_averaged"]


def recalibrate(model: nn.Module, train_passes: TrainPasses) -> None:
    """Replace BatchNorm's running statistics by their plain averages over the forward passes of ``train_passes(model)``.

    The passes are what training does with a batch, so the statistics are of the images that training normalises (clean ones,
    attacked ones, or both). Dropout and stochastic depth stay off; modes and momenta are left as they were.

    Raises:
        ValueError: There was no pass, which would leave the statistics empty.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    num_batches = 0
    with module_mode(model, training=False):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        try:
            for _ in train_passes(model):
                num_batches += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if not num_batches:
        raise ValueError("recalibrate: got no batch; expected at least one. Raise evaluation.train_size.")
