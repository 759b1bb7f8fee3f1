"""Which parts of a backbone train, and from when: some never, the head alone at first, stages one by one.

What is frozen keeps every bit: it gets no gradient, and an optimizer passes over what has none, its weight
decay and momentum too. A frozen BatchNorm normalises by its running statistics and leaves them alone.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import Field
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from wcitrain.method import Count, Method, PositiveCount, Text, method, nearest, setting
from wcitrain.models import Classifier
from wcitrain.text import name_some

Plan = dict[str, float]  # the epoch from which a parameter trains, by name; infinite: never


@method
class Freezing(Method):
    """Fine-tuning by parts; by default all trains.

    The classifier trains from the start, stage s (0: the top one) of the backbone from epoch h + k s on, with
    h ``head_epochs`` and k ``unfreeze_every`` (none: 0). Stages are the coarse groups of timm's
    ``group_matcher``; what it names no group for belongs to the top one.
    """

    names: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(),
        description="Modules or parameters of the backbone that never train; globs, and ranges: blocks.0-5.",
    )
    head_epochs: Count = setting(0, "Epochs at the beginning in which the classifier alone trains.")
    unfreeze_every: PositiveCount | None = setting(
        None, "Epochs between stages that begin to train, from the top; null: all at once."
    )
    label = "freezing"
    source = "Howard, Ruder, arXiv 1801.06146 (stages); Kumar et al., arXiv 2202.10054 (the head first)"

    @property
    def is_staged(self) -> bool:
        """Whether other parameters train in other epochs."""
        return bool(self.head_epochs or self.unfreeze_every)

    def plan(self, model: Classifier, epochs: int) -> Plan:
        """Return the epoch from which each parameter of ``model`` trains that is trainable now.

        Raises:
            ValueError: A name that matches nothing, nothing that trains from the start, stages that begin
                after the last epoch, or ones that the model does not have.
        """
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        plan = dict.fromkeys(trained, 0.0)
        frozen = self._named(model.backbone)
        body = [name for name in trained if name not in frozen | head_names(model)]
        if self.is_staged:
            if not body or len(body) == len(trained):
                got = f"got {self.head_epochs} and {self.unfreeze_every}"
                where = "freezing.head_epochs, unfreeze_every"
                rule = "a classifier (get_classifier) and a part of the backbone that trains after it"
                raise ValueError(f"{where}: {got}; expected {rule}. Remove them.")
            stages = _stages(model) if self.unfreeze_every else dict.fromkeys(body, 0)
            depths = sorted({stages[name] for name in body}, reverse=True)
            for name in body:
                plan[name] = self.head_epochs + (self.unfreeze_every or 0) * depths.index(stages[name])
            if (last := max(plan.values())) >= epochs:
                got = f"got {self.unfreeze_every}, so one of {len(depths)} stages begins in epoch {last:g}"
                rule = f"less than train.epochs = {epochs}. Lower it, or train longer."
                raise ValueError(f"freezing.unfreeze_every: {got}; expected {rule}")
        plan |= {name: math.inf for name in plan if name in frozen}
        if min(plan.values(), default=math.inf) > 0:
            rule = "a part that does. Take some away."
            raise ValueError(
                f"freezing.names: got {list(self.names)}, so nothing trains at first; expected {rule}"
            )
        return plan

    def _named(self, backbone: nn.Module) -> set[str]:
        """Return the parameters that ``names`` says, by their names in the classifier."""
        found, paths = set(), {}  # of every parameter: itself and all that it is inside of
        for name, _ in backbone.named_parameters():
            parts = name.split(".")
            paths[name] = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        for pattern in (one for name in self.names for one in expanded(name)):
            matched = [name for name, own in paths.items() if any(fnmatchcase(o, pattern) for o in own)]
            if not matched:
                known = sorted({path for own in paths.values() for path in own})
                hint = f"Did you mean {nearest(pattern, known, 0.0)}?"
                rule = f"a module or parameter of the backbone, such as {name_some(known, 3)}. {hint}"
                raise ValueError(f"freezing.names: got {pattern!r}, which matches nothing; expected {rule}")
            found |= {f"backbone.{name}" for name in matched}
        return found


def expanded(pattern: str) -> list[str]:
    """Return a pattern for each number of its first range, and so on: ``["blocks.0", "blocks.1"]``."""
    found = re.search(r"(?<![\[\d])(\d+)-(\d+)(?![\]\d])", pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise ValueError(f"freezing.names: got the range {found[0]}; expected {last}-{first}. Turn it round.")
    ends = pattern[: found.start()], pattern[found.end() :]
    return [one for number in range(first, last + 1) for one in expanded(f"{ends[0]}{number}{ends[1]}")]


def head_names(model: nn.Module) -> set[str]:
    """Return the names of what maps features to classes, or to the rotations; empty for a model without."""
    get: Any = getattr(getattr(model, "backbone", model), "get_classifier", tuple)
    heads = get() if isinstance(found := get(), tuple | list) else (found,)
    heads = (*heads, getattr(model, "rotation_head", None))
    own = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in own}


def _stages(model: Classifier) -> dict[str, int]:
    """Return the stage of every parameter, counted from the stem; what comes after the last joins it."""
    backbone: Any = model.backbone
    if not hasattr(backbone, "group_matcher"):
        got = f"got {type(backbone).__name__}, which has no group_matcher"
        raise ValueError(
            f"freezing.unfreeze_every: {got}; expected a timm model with stages. Set it to null."
        )
    groups = group_parameters(backbone, backbone.group_matcher(coarse=True), reverse=True)
    top = max(groups.values()) - 1  # below the group of what is matched by nothing: the head
    return {f"backbone.{name}": min(group, top) for name, group in groups.items()}


def freeze(model: Classifier, plan: Plan, epoch: float) -> None:
    """Let train what trains in ``epoch``, and put BatchNorm that does not into eval mode.

    Call it after every ``model.train()``. One without parameters goes with the module it is in.
    """
    for name, start in plan.items():
        model.get_parameter(name).requires_grad_(start <= epoch)
    for path, norm in model.named_modules():
        if isinstance(norm, _NormBase):
            owner: nn.Module = norm
            while path and next(owner.parameters(), None) is None:
                path = path.rpartition(".")[0]
                owner = model.get_submodule(path)
            if not any(p.requires_grad for p in owner.parameters()):
                norm.eval()


@contextmanager
def all_trainable(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Let all that is planned ask for gradients inside: measures are of all layers, in every epoch."""
    flags = [(p, p.requires_grad) for p in map(model.get_parameter, plan)]
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
