"""The base optimizers of a recipe: what steps on the gradients that the wrapper leaves.

torch's SGD and AdamW by their plain names, else what timm builds. (timm's "sgd" is Nesterov; ours is what
torch and the robust-training literature call SGD.)
"""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, JsonValue
from torch import nn

from wcitrain.method import Decay, Method, NonNegative, Positive, Text, method, nearest, refuse, setting

OWN_KEYS = {"lr", "weight_decay", "momentum", "nesterov", "params", "opt"}
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

    def __post_init__(self) -> None:
        if reserved := sorted(OWN_KEYS & set(self.kwargs)):
            text = f"got {', '.join(reserved)}; expected arguments without a key of their own."
            refuse("kwargs", f"{text} Set {reserved[0]} beside kwargs.")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the trainable parameters of ``model``.

        Raises:
            ValueError: Arguments that the optimizer refuses, or a second-order optimizer.
        """
        decayed: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for p in (p for p in model.parameters() if p.requires_grad):
            (decayed if self.decay_norm_and_bias or p.ndim > 1 else rest).append(p)
        groups: list[dict[str, Any]] = [{"params": decayed}]
        if rest:
            groups.append({"params": rest, "weight_decay": 0.0})
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
    label: ClassVar[str] = "SGD {lr:g}"
    source: ClassVar[str] = "torch.optim.SGD"
    cost: ClassVar[str] = "one copy of the weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            refuse("nesterov", "got true with momentum 0; expected momentum above 0. Remove it.")

    def _make(self, groups: list[dict[str, Any]], **common: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov, **common)


@method
class AdamW(BaseOptimizer):
    """torch's Adam with decoupled weight decay."""

    lr: PeakRate = 1e-3
    weight_decay: WeightDecay = 5e-4
    decay_norm_and_bias: NormAndBias = True
    kwargs: Kwargs = Field(default_factory=dict)
    label: ClassVar[str] = "AdamW {lr:g}"
    source: ClassVar[str] = "Loshchilov, Hutter, arXiv 1711.05101; torch.optim.AdamW"
    cost: ClassVar[str] = "two copies of the weights"

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
    label: ClassVar[str] = "{name} {lr:g}"
    source: ClassVar[str] = "timm.optim"

    def __post_init__(self) -> None:
        super().__post_init__()
        from timm.optim import list_optimizers

        known = [str(name) for name in list_optimizers()]
        if self.name not in known:
            near = nearest(self.name, known)
            hint = f"Did you mean {near}?" if near else "timm.optim.list_optimizers() lists them."
            refuse("name", f"got {self.name!r}; expected sgd, adamw or a timm optimizer. {hint}")

    def _make(self, groups: list[dict[str, Any]], **common: Any) -> torch.optim.Optimizer:
        from timm.optim import create_optimizer_v2

        optimizer = create_optimizer_v2(groups, opt=self.name, momentum=self.momentum, **common)
        if getattr(optimizer, "is_second_order", False):
            text = f"optimizer.name: got {self.name!r}, which needs second derivatives of its own"
            raise ValueError(f"{text}; expected a first-order optimizer. Choose another.")
        return optimizer


OPTIMIZERS: dict[str, type[BaseOptimizer]] = {"sgd": SGD, "adamw": AdamW}
