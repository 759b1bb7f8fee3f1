"""``Victim``: the model under attack and its examples, which every attack and every check needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wcitrain.digest import digest
from wcitrain.params import unwrapped
from wcitrain.preserve import full_precision, undisturbed
from wcitrain.seeding import seed_from


class Clean(NamedTuple):
    """A model without an attack: is it right, the cross-entropy, are the logits finite."""

    is_right: Tensor  # [N]
    losses: Tensor  # [N]
    is_finite: Tensor  # [N]
    num_classes: int


@dataclass(frozen=True, eq=False)
class Victim:
    """A model, as ``attackable`` yields it, and what it is attacked on."""

    model: nn.Module
    x: Tensor  # [N, *dims], on the CPU
    y: Tensor  # [N], on the CPU
    batch_size: int = 200
    seed: int = 0
    modes: tuple[bool, ...] = ()  # ``training`` of every module as the user left it

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def batch(self, places: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return the images and labels at ``places``, on the device."""
        return self.x[places].to(self.device), self.y[places].to(self.device)

    @cached_property
    def clean(self) -> Clean:
        """What the model does without an attack; ValueError where outputs or labels do not fit."""
        torch.manual_seed(seed_from(self.seed, "clean"))  # a randomised model: the same after a kill
        rows, num_classes = [], 0
        for places in torch.arange(len(self.x)).split(self.batch_size):
            images, labels = self.batch(places)
            with torch.no_grad():
                logits = self.model(images)
            num_classes = num_classes or self._count_classes(logits, len(images))
            losses = F.cross_entropy(logits, labels, reduction="none")
            rows.append([is_right(logits, labels).cpu(), losses.cpu(), logits.isfinite().all(1).cpu()])
        flags, losses, is_finite = (torch.cat(column) for column in zip(*rows, strict=True))
        return Clean(flags, losses, is_finite, num_classes)

    def _count_classes(self, logits: object, num: int) -> int:
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != num or logits.shape[1] < 2:
            got = f"shape {tuple(getattr(logits, 'shape', ()))} ({type(logits).__name__})"
            raise ValueError(f"model: got {got} for {num} images; expected logits [{num}, C >= 2]. Wrap it.")
        low, high, last = int(self.y.min()), int(self.y.max()), logits.shape[1] - 1
        if low < 0 or high > last:
            got = f"got labels {low} to {high} for a model of {last + 1} classes"
            raise ValueError(f"data: {got}; expected 0 to {last}. Is this the data it was trained on?")
        return last + 1

    def digest(self) -> str:
        """Return the digest of weights, buffers, and names of the modules' classes."""
        parts: list[object] = [type(module).__qualname__ for module in self.model.modules()]
        for name, value in self.model.state_dict().items():
            parts += [name, value]
        return digest(parts)


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return truth values [B]: the largest logit is the label's, and none is NaN or infinite."""
    return (logits.max(1).indices == labels) & logits.isfinite().all(1)


@contextmanager
def attackable(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[bool, ...]]]:
    """Yield the user's own module in eval mode, float32 and frozen, and its modes; put all back."""
    module = unwrapped(model)
    parameters = list(module.parameters())
    others = {str(p.dtype) for p in parameters if p.is_floating_point() and p.dtype != torch.float32}
    if others:
        got = f"parameters in {', '.join(sorted(others))}"
        raise ValueError(f"model: got {got}; expected float32. Call model.float() first.")
    modes = tuple(m.training for m in module.modules())
    required = [p.requires_grad for p in parameters]
    try:
        with torch.inference_mode(False), undisturbed(module, training=False), full_precision(module):
            for p in parameters:
                p.requires_grad_(False)
            yield module, modes
    finally:
        for p, flag in zip(parameters, required, strict=True):
            p.requires_grad_(flag)
