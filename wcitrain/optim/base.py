"""The base optimizers of a recipe: what steps on the gradients that the wrapper leaves.

torch's SGD (timm's "sgd" is Nesterov) and AdamW by their plain names, else what timm builds. Which
parameters form a group is timm's rule for all of them. A group's rate keeps its ratio to ``lr`` for ever:
schedules multiply all of them.
"""

from typing import Annotated, Any

import torch
from pydantic import Field, JsonValue
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from wcitrain.freezing import head_names
from wcitrain.method import Decay, Method, NonNegative, Positive, Text, method, nearest, refuse, setting

PeakRate = Annotated[Positive, Field(description="Peak learning rate.")]
WeightDecay = Annotated[NonNegative, Field(description="Weight decay of the base optimizer.")]
NormAndBias = Annotated[bool, Field(description="Decay vectors, and the model's no_weight_decay(), too.")]
PER_LAYER = "Rate of a layer over that of the next one, in (0, 1); null: the same for all."
LayerDecay = Annotated[float | None, Field(gt=0, lt=1, description=PER_LAYER)]
HeadRate = Annotated[Positive | None, Field(description="Peak rate of the classifier; null: as all others.")]
Kwargs = Annotated[dict[str, JsonValue], Field(description="Further arguments of the optimizer.")]


OURS = ("layer_decay", "weight_decay_exclude_1d", "fallback_", "param_group_fn")  # ignored beside groups


class BaseOptimizer(Method):
    """The contract: ``build`` makes the torch optimizer.

    Layer l of L, as timm's ``group_matcher`` counts them, has the peak rate lr · layer_decay^(L−l), the
    classifier ``head_lr``.
    """

    lr: float
    weight_decay: float
    layer_decay: float | None
    head_lr: float | None
    decay_norm_and_bias: bool
    kwargs: dict[str, Any]
    source = "Clark et al., arXiv 2003.10555 (layer decay)"
    cost = "no pass"

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the trainable parameters of ``model``; ValueError for what it refuses."""
        if ours := [key for key in self.kwargs if key.startswith(OURS)]:
            rule = "none, as the groups are made before. Set optimizer.layer_decay or decay_norm_and_bias."
            raise ValueError(f"optimizer.kwargs: got {', '.join(ours)}; expected {rule}")
        try:
            return self._make(self.groups(model), lr=self.lr, weight_decay=self.weight_decay, **self.kwargs)
        except (TypeError, AssertionError, ImportError) as error:
            raise ValueError(f"optimizer.kwargs: got {self.kwargs}, which {self} refuses: {error}") from error

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the groups of the trainable parameters, each with its rate and weight decay.

        ValueError for a layer decay without layers, and a rate of the classifier where none trains.
        """
        backbone: Any = getattr(model, "backbone", model)
        is_timms = not self.decay_norm_and_bias
        rule: dict[str, Any] = {"weight_decay": self.weight_decay, "weight_decay_exclude_1d": is_timms}
        if is_timms:
            rule["no_weight_decay_list"] = getattr(backbone, "no_weight_decay", set)()
        if self.layer_decay is None:
            groups = param_groups_weight_decay(backbone, **rule)
        elif hasattr(backbone, "group_matcher"):
            groups = param_groups_layer_decay(backbone, layer_decay=self.layer_decay, **rule)
        else:
            got = f"got {self.layer_decay:g} with {type(backbone).__name__}, which has no group_matcher"
            raise ValueError(f"optimizer.layer_decay: {got}; expected a timm model. Set it to null.")
        if (rotation := getattr(model, "rotation_head", None)) is not None:
            groups += param_groups_weight_decay(rotation, **rule)
        for group in groups:  # rates from here on: timm's schedulers would take the scale into account again
            group["lr"] = self.lr * group.pop("lr_scale", 1.0)
        if self.head_lr is None:
            return groups
        head, split = {id(model.get_parameter(name)) for name in head_names(model)}, []
        for group in groups:
            for rate, is_head in ((group["lr"], False), (self.head_lr, True)):
                own = [p for p in group["params"] if (id(p) in head) == is_head]
                split += [group | {"params": own, "lr": rate}] * bool(own)
        if not any(id(p) in head for group in groups for p in group["params"]):
            text = "whose classifier does not train; expected one that does. Set it to null."
            raise ValueError(f"optimizer.head_lr: got {self.head_lr:g} with a model {text}")
        return split

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
    layer_decay: LayerDecay = None
    head_lr: HeadRate = None
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
    layer_decay: LayerDecay = None
    head_lr: HeadRate = None
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
    layer_decay: LayerDecay = None
    head_lr: HeadRate = None
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
