"""The base optimizers of a recipe: what steps on the gradients that the wrapper leaves.

torch's SGD (timm's "sgd" is Nesterov) and AdamW by their plain names, else what timm builds.
"""

from typing import Annotated, Any

import torch
from pydantic import Field, JsonValue
from torch import nn

from wcitrain.method import Decay, Method, NonNegative, Positive, Text, method, nearest, refuse, setting

PeakRate = Annotated[Positive, Field(description="Peak learning rate.")]
WeightDecay = Annotated[NonNegative, Field(description="Weight decay of the base optimizer.")]
NormAndBias = Annotated[bool, Field(description="Decay normalisation weights and biases too.")]
Kwargs = Annotated[dict[str, JsonValue], Field(description="Further arguments of the optimizer.")]


class BaseOptimizer(Method):
    """The contract: ``build`` makes the torch optimizer."""

    lr: float
    weight_decay: float
    decay_norm_and_bias: bool
    kwargs: dict[str, Any]
    cost = "no pass"

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the trainable parameters of ``model``; ValueError for what it refuses."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained}]
        if not self.decay_norm_and_bias:
            groups = [{"params": [p for p in trained if p.ndim > 1]}]
            groups.append({"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0})
        try:
            return self._make(groups, lr=self.lr, weight_decay=self.weight_decay, **self.kwargs)
        except (TypeError, AssertionError, ImportError) as error:
            raise ValueError(f"optimizer.kwargs: got {self.kwargs}, which {self} refuses: {error}") from error

    def _make(self, groups: list[dict[str, Any]], **common: Any) -> torch.optim.Optimizer:
        raise NotImplementedError


@method
class SGD(BaseOptimizer):
    """torch's stochastic gradient descent with momentum."""

    lr: PeakRate = 0.1
    weight_decay: WeightDecay = 5e-4
    momentum: Decay = setting(0.9, "Momentum, in [0, 1).")
    nesterov: bool = setting(False, "Use Nesterov's momentum.")
    decay_norm_and_bias: NormAndBias = True
    kwargs: Kwargs = Field(default_factory=dict)
    label = "SGD {lr:g}"
    source = "torch.optim.SGD"
    cost = "one copy of the weights"

    def _make(self, groups: list[dict[str, Any]], **common: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov, **common)


@method
class AdamW(BaseOptimizer):
    """torch's Adam with decoupled weight decay."""

    lr: PeakRate = 1e-3
    weight_decay: WeightDecay = 5e-4
    decay_norm_and_bias: NormAndBias = True
    kwargs: Kwargs = Field(default_factory=dict)
    label = "AdamW {lr:g}"
    source = "Loshchilov, Hutter, arXiv 1711.05101; torch.optim.AdamW"
    cost = "two copies of the weights"

    def _make(self, groups: list[dict[str, Any]], **common: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, **common)


@method
class TimmOptimizer(BaseOptimizer):
    """Any first-order optimizer of timm, by its name there."""

    name: Text = Field(description="Name for timm.optim.create_optimizer_v2.")
    lr: PeakRate = 0.1
    weight_decay: WeightDecay = 5e-4
    momentum: Decay = setting(0.9, "Momentum, in [0, 1), for the optimizers that have one.")
    decay_norm_and_bias: NormAndBias = True
    kwargs: Kwargs = Field(default_factory=dict)
    label = "{name} {lr:g}"
    source = "timm.optim"

    def __post_init__(self) -> None:
        from timm.optim import list_optimizers

        known = [str(name) for name in list_optimizers()]
        if self.name not in known:
            hint = f"Did you mean {nearest(self.name, known, 0.0)}?"
            refuse("name", f"got {self.name!r}; expected sgd, adamw or a timm optimizer. {hint}")

    def _make(self, groups: list[dict[str, Any]], **common: Any) -> torch.optim.Optimizer:
        from timm.optim import create_optimizer_v2

        optimizer = create_optimizer_v2(groups, opt=self.name, momentum=self.momentum, **common)
        if getattr(optimizer, "is_second_order", False):
            raise ValueError(f"optimizer.name: got {self.name!r}; expected one without second derivatives.")
        return optimizer


OPTIMIZERS: dict[str, type[BaseOptimizer]] = {"sgd": SGD, "adamw": AdamW}
