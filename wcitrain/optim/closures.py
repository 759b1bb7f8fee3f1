"""What a closure does beside its loss."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def clearing(closure: Any, parameters: Sequence[Tensor]) -> Any:
    """Return the closure; its first call drops what was in ``.grad`` of ``parameters`` that it clears.

    They are another optimizer's: gradients of before are put back after a pass, as the passes add up. A mark
    in their place tells ``model.zero_grad()`` from a backward, which adds to it. Zeros in place are not seen.
    """
    earlier = [(p, p.grad) for p in parameters if p.grad is not None]

    def call() -> Any:
        marks = [(p, torch.zeros_like(p), gradient) for p, gradient in earlier]
        earlier.clear()
        for p, mark, _ in marks:
            p.grad = mark
        result = closure()
        for p, mark, gradient in marks:
            if p.grad is not mark:
                gradient.zero_()
            elif not mark._version:
                p.grad = None
        return result

    return call


def watched(closure: Any, model: nn.Module, calls: int) -> Any:
    """Return the closure; its first call warns where it differentiates the model before it makes the loss.

    So does an attack, which is then repeated in each of ``calls`` passes. It is seen, not guessed: by a
    forward after a backward through the model's outputs.
    """
    seen = {"backward": False, "attack": False, "done": False}

    def entered(module: nn.Module, args: Any, returned: Any) -> None:
        seen["attack"] |= seen["backward"]
        if isinstance(returned, Tensor) and returned.requires_grad:
            returned.register_hook(lambda gradient: seen.update(backward=True))

    def call() -> Any:
        if seen["done"]:
            return closure()
        handle = model.register_forward_hook(entered)
        try:
            return closure()
        finally:
            handle.remove()
            seen["done"] = True
            if seen["attack"]:
                got = "the closure differentiates the model before it calls it for the loss (an attack?)"
                rule = f"and is called {calls} times a step. Make the attack once, before step()"
                warnings.warn(f"RegularizedOptimizer.step: {got}, {rule}.", UserWarning, stacklevel=2)

    return call
