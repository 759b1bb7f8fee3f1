"""What one call of ``backward`` may do with ``loss_fn``: evaluate it and differentiate it, several times.

Every pass of a call sees the same random numbers (dropout) and the same module; all passes but the last run
inside ``local()``, so that processes reduce their gradients once; on an exception nothing of it remains.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.curvature.loss import Loss, LossFn, as_loss, signs
from wcitrain.params import Layers
from wcitrain.preserve import put_back_buffers, random_state, saved_buffers, set_random_state
from wcitrain.seeding import generator_from

if TYPE_CHECKING:
    from accelerate import Accelerator

TINY = 1e-30


class Step(NamedTuple):
    """What the passes of a perturbation or a penalty return, beside the gradients they left in ``.grad``."""

    loss: Tensor
    traces: Tensor | None = None  # estimates of t_l [L]
    relative_size: Tensor | None = None  # ||u|| / ||W||
    strength: Tensor | None = None  # λ, NaN where it is not defined
    memory: list[Tensor] | None = None  # what a rule carries to the next step, one tensor a layer


@dataclass(eq=False)
class Passes:
    """The passes of one micro-batch on one process."""

    model: nn.Module  # that ``loss_fn`` calls (prepared, under Accelerate)
    layers: Layers  # the tensors that are perturbed and measured
    loss_fn: LossFn  # see ``RegularizedOptimizer.backward``
    _: KW_ONLY
    parameters: Sequence[Tensor] = ()  # all that the optimizer steps, for undoing
    share: float = 1.0  # of this micro-batch in the step, 1 / num_micro_batches
    key: tuple[object, ...] = (0,)  # names the micro-batch: every random direction is a function of it
    accelerator: "Accelerator | None" = None  # None in a plain loop
    use_math_attention: bool = False  # the plain formula: fused kernels cannot be differentiated twice
    traces: Tensor | None = None  # running averages of t_l [L], where known
    memory: list[Tensor] | None = None  # what the rule's last ``Step`` carried

    def __post_init__(self) -> None:
        self.device = self.layers.tensors[0].device
        self._states = random_state(self.device)
        everything = (*self.parameters, *self.model.parameters())
        self._trained = list({id(p): p for p in everything if p.requires_grad}.values())

    def evaluate(self) -> Loss:
        """Call ``loss_fn`` with the random numbers that every pass sees.

        RuntimeError where it changes gradients, TypeError where it returns no scalar loss with its graph.
        """
        set_random_state(self._states, self.device)
        before = self._gradient_versions()
        with sdpa_kernel(SDPBackend.MATH) if self.use_math_attention else nullcontext():
            loss = as_loss(self.loss_fn())
        if before != self._gradient_versions():
            text = "loss_fn called backward() or zero_grad() itself. Return the loss and leave the gradients"
            raise RuntimeError(f"RegularizedOptimizer: {text} alone.")
        total: Any = loss.total
        if not isinstance(total, Tensor) or total.ndim != 0 or not total.requires_grad:
            rule = "a scalar loss with its graph. Return the mean loss, without item or detach."
            raise TypeError(f"RegularizedOptimizer: loss_fn returned {total!r:.60}; expected {rule}")
        return loss

    def backward(self, total: Tensor, weight: float = 1.0) -> None:
        """Add ``weight`` times the gradients of ``total``, in this micro-batch's share, to ``.grad``."""
        (total if weight == 1 == self.share else total * (weight * self.share)).backward()

    def plain(self, weight: float = 1.0) -> Tensor:
        """Evaluate once, add ``weight`` times the gradients, return the loss, detached."""
        total = self.evaluate().total
        self.backward(total, weight)
        return total.detach()

    def plain_weighed(self, weigh: Callable[[list[Tensor]], float]) -> Tensor:
        """As ``plain``, with a weight that ``weigh`` computes from the layers' gradients of this very pass.

        Among processes gradients are reduced while they are computed: a first backward finds the weight.
        """
        total = self.evaluate().total
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            self.backward(total, weigh(self.layer_gradients(total, retain_graph=True)))
            return total.detach()
        earlier = [p.grad for p in self._trained]
        for p in self._trained:
            p.grad = None
        total.backward()  # not ``autograd.grad``: reentrant checkpoints write into .grad
        weight = weigh(self.filled([t.grad for t in self.layers.tensors])) * self.share
        for p, gradient in zip(self._trained, earlier, strict=True):
            if p.grad is None:
                p.grad = gradient
            else:
                p.grad = p.grad.mul_(weight) if gradient is None else gradient.add_(p.grad, alpha=weight)
        return total.detach()

    def layer_gradients(self, total: Tensor, retain_graph: bool) -> list[Tensor]:
        """Return the gradients in the layers' tensors, on this process, without touching ``.grad``."""
        return self.filled(
            torch.autograd.grad(total, self.layers.tensors, retain_graph=retain_graph, allow_unused=True)
        )

    def filled(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the layers' gradients, zero where there is none."""
        pairs = zip(self.layers.tensors, gradients, strict=True)
        return [torch.zeros_like(t) if g is None else g for t, g in pairs]

    def generator(self, *names: object) -> torch.Generator:
        """Return the random numbers of this micro-batch that go by these names."""
        return generator_from(self.device, *self.key, *names)

    def random_direction(
        self, sigma: Tensor, probe: int = 0, *, gaussian: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Return u_l = σ_l v_l, v signs or normal numbers, and σ as rounded to the weights' dtype."""
        detached = [t.detach() for t in self.layers.tensors]
        rounded = sigma.to(detached[0].dtype)
        g = self.generator(*[probe] if probe else [])
        if gaussian:
            direction = [torch.randn(t.shape, generator=g, device=t.device, dtype=t.dtype) for t in detached]
        else:
            direction = signs(detached, g)
        for u, factor in zip(direction, self.layers.spread(rounded), strict=True):
            u.mul_(factor)
        return direction, rounded

    def relative_size(self, direction: list[Tensor]) -> Tensor:
        """Return ||u|| / ||W||."""
        length = self.layers.squares(direction).sum()
        return (length / self.layers.squared_norms().sum().clamp_min(TINY)).sqrt()

    def add_norm_gradients(self, coefficients: Tensor | None, factor: float = 1.0) -> None:
        """Add ``factor · coefficient_l · W_l``, in this share, to ``.grad``; the same on every rank."""
        if coefficients is None:
            return
        with torch.no_grad():
            factors = self.layers.spread(coefficients * (factor * self.share))
            for p, c in zip(self.layers.tensors, factors, strict=True):
                p.grad = p * c if p.grad is None else p.grad.add_(p * c)

    def local(self) -> AbstractContextManager:
        """Keep gradients on this rank: forward *and* backward of every pass but the last run inside."""
        return nullcontext() if self.accelerator is None else self.accelerator.no_sync(self.model)

    @contextmanager
    def undone(self, *, on_success: bool = False) -> Iterator[None]:
        """Put gradients, buffers and random state back on an exception, or always: a dry run."""
        gradients = [None if p.grad is None else p.grad.clone() for p in self._trained]
        buffers, counts = saved_buffers(self.model), False
        try:
            yield
            counts = not on_success
        finally:
            if not counts:
                for p, gradient in zip(self._trained, gradients, strict=True):
                    p.grad = gradient
                put_back_buffers(buffers)
                set_random_state(self._states, self.device)

    def _gradient_versions(self) -> list[tuple[int, int | None]]:
        """Return what changes when somebody writes to the layers' gradients."""
        return [(id(p.grad), None if p.grad is None else p.grad._version) for p in self.layers.tensors]


@contextmanager
def collected(layers: Layers, part: Callable[[int, Tensor], Tensor]) -> Iterator[list[Tensor | None]]:
    """Yield a list in which the one backward pass inside puts ``part(i, gradient of tensor i)``, else None.

    The gradient is this process's own; reentrant checkpointing hands it over in pieces, which are added up.
    """
    sums: list[Tensor | None] = [None] * len(layers.tensors)

    def add(index: int, gradient: Tensor) -> None:
        earlier, own = sums[index], part(index, gradient.detach())
        sums[index] = own if earlier is None else earlier + own

    handles = [t.register_hook(partial(add, index)) for index, t in enumerate(layers.tensors)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def slopes(layers: Layers, direction: Sequence[Tensor]) -> AbstractContextManager[list[Tensor | None]]:
    """Collect ⟨u_l, g_l⟩ of the one backward pass inside, in float64, the parts of a tensor together."""
    return collected(layers, lambda index, gradient: layers.sum_parts(index, direction[index] * gradient))


def carry_nan(loss: Tensor, other: Tensor | float) -> Tensor:
    """Return ``loss``, NaN where ``other`` is not finite: a good loss must not hide a bad extra pass."""
    return loss + 0.0 * other
