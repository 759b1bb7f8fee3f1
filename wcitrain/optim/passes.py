"""The building blocks of an extra pass: weights moved and put back, slopes collected, misuse explained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from wcitrain.params import dots


@contextmanager
def perturbed(layers: Sequence[Tensor], direction: Sequence[Tensor]) -> Iterator[Callable[[int], None]]:
    """Yield ``move(sign)``, which puts the weights at W + sign·u; W comes back bit for bit, also on exceptions.

    From a clone and by copy: adding and subtracting u would be off by a rounding, rebinding ``.data`` would break views.
    """
    weights = [p.detach() for p in layers]
    saved = [w.clone() for w in weights]

    def move(sign: int) -> None:
        torch._foreach_copy_(weights, saved)
        torch._foreach_add_(weights, list(direction), alpha=sign)

    try:
        yield move
    finally:
        torch._foreach_copy_(weights, saved)


class Slopes:
    """Collects <u_l, g_l> of the one backward pass made inside ``with Slopes(layers, direction) as slopes``.

    Hooks see this process's own gradient before it is added to ``.grad`` and before any reduction over processes, so
    neither accumulated micro-batches nor other processes' directions leak in. Afterwards ``slopes.values`` is a tensor [L];
    a layer that got no gradient has NaN.
    """

    def __init__(self, layers: Sequence[Tensor], direction: Sequence[Tensor]) -> None:
        self._layers, self._direction = layers, direction
        self._found: dict[int, Tensor] = {}

    def __enter__(self) -> "Slopes":
        self._handles = [p.register_hook(self._hook(index)) for index, p in enumerate(self._layers)]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def collect(gradient: Tensor) -> None:
            slope = dots([self._direction[index]], [gradient.detach()])[0]
            self._found[index] = (
                self._found[index] + slope if index in self._found else slope
            )  # reentrant checkpointing

        return collect

    @property
    def values(self) -> Tensor:
        """The inner products [L], summed in float64."""
        missing = dots(self._direction[:1], [None])[0] * torch.nan
        return torch.stack([self._found.get(index, missing) for index in range(len(self._direction))])


@contextmanager
def explained() -> Iterator[None]:
    """Turn autograd's complaint about a freed graph into what the user did."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                "RegularizedOptimizer: loss_fn called backward() itself. Return the differentiable loss instead."
            ) from error
        raise
