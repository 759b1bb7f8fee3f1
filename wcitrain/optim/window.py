"""What happened since the last optimizer step: what was found, and whose gradients are in place."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wcitrain.curvature.passes import Step
from wcitrain.optim import record

Versions = list[tuple[Tensor | None, int]]  # gradients, and how often they were written


@dataclass
class Window:
    """The micro-batches since the last step."""

    micro_steps: int = 0  # calls of backward and perturbed
    traces: list[Tensor] = field(default_factory=list)  # their parts of the estimates of t_l, each [L]
    is_seen: list[Tensor] = field(default_factory=list)  # which layers got a gradient, each [L]
    memory: list[Tensor] | None = None  # sum of their smoothed gradients (VaSSO)
    shared: dict[str, Any] = field(default_factory=dict)  # what they have in common: u, with one pass
    weight: Tensor | None = None  # of the step's traces in their average [L]
    latest: dict[str, Tensor | None] = field(default_factory=dict)  # relative size and λ of the last one

    def count(self, step: Step, share: float = 1.0) -> None:
        """Keep what one of them found."""
        self.micro_steps += 1
        if step.traces is not None:
            self.traces.append(step.traces * share)
            self.weight = step.weight
        if step.is_seen is not None:
            self.is_seen.append(step.is_seen)
        if step.memory is not None:
            total = self.memory
            self.memory = step.memory if total is None else list(torch._foreach_add(total, step.memory))
        if step.relative_size is not None:
            self.latest = {"relative_size": step.relative_size, "lambda": step.strength}

    def fold(
        self, own: dict[str, Any], averaged: Callable[[Tensor], Tensor], decay: float, is_paired: bool
    ) -> None:
        """Fold all of it into the wrapper's record; ``averaged`` is the mean over processes."""
        if self.traces:
            found = torch.stack(self.traces)
            estimate = torch.where(found.isnan().all(0), torch.nan, found.nansum(0))
            if self.is_seen:
                is_seen = torch.stack(self.is_seen).any(0).to(estimate)
                estimate, is_seen = averaged(torch.stack([estimate, is_seen]))
                record.see(own, is_seen > 0)
            else:
                estimate = averaged(estimate)
            record.fold(own, estimate, decay, is_paired, self.weight)
        own.update(self.latest)
        if self.memory is not None:
            own["memory"] = [averaged(total / self.micro_steps) for total in self.memory]


class Mark(NamedTuple):
    """A gradient that a step left in place, and how often it was written until then."""

    parameter: Tensor
    gradient: Tensor
    version: int

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> "Mark | None":
        """Return that of the smallest parameter with a gradient."""
        trained = (p for p in parameters if p.grad is not None)
        smallest = min(trained, key=lambda p: p.numel(), default=None)
        if smallest is None or smallest.grad is None:
            return None
        return cls(smallest, smallest.grad, smallest.grad._version)

    def is_untouched(self) -> bool:
        """Whether it is still what the step left."""
        return self.parameter.grad is self.gradient and self.gradient._version == self.version


def gradient_versions(parameters: Iterable[Tensor]) -> Versions:
    """Return what changes when somebody writes gradients, and hold them: a new one may get an old id."""
    return [(p.grad, 0 if p.grad is None else p.grad._version) for p in parameters]


def are_changed(parameters: Iterable[Tensor], before: Versions) -> bool:
    """Whether any gradient was written or replaced since ``before``."""
    now = gradient_versions(parameters)
    return any(a is not b or v != w for (a, v), (b, w) in zip(before, now, strict=True))
