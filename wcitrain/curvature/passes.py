"""What one call of ``backward`` may do with ``loss_fn``: evaluate it and differentiate it, several times.

Every pass of a call sees the same random numbers (dropout) and the same module; all passes but the last run
inside ``local()``, so that processes reduce their gradients once; on an exception nothing of it remains.

A function returns the loss with its graph, or calls ``backward`` itself, as closures for torch do. What the
call did to ``.grad`` tells them apart: it is empty meanwhile, and what was there is put back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from wcitrain.curvature.loss import Loss, LossFn, as_loss, dense, signs
from wcitrain.params import Layers
from wcitrain.preserve import put_back_buffers, random_state, saved_buffers, set_random_state
from wcitrain.seeding import generator_from

TINY = 1e-30
Gradients = dict[int, Tensor]  # by the ``id`` of their parameters
Weigh = Callable[[list[Tensor]], Tensor]  # a weight of gradients, made of those of the layers


class NothingDone(Exception):
    """A closure returned None and left gradients alone: there is nothing to regularise."""


class Step(NamedTuple):
    """What the passes of a perturbation or a penalty return, beside the gradients they left in ``.grad``."""

    loss: Tensor
    traces: Tensor | None = None  # estimates of t_l [L]
    is_seen: Tensor | None = None  # which layers got a gradient, booleans [L]; None: not looked at
    relative_size: Tensor | None = None  # of the perturbation, as the rule counts it
    strength: Tensor | None = None  # λ, NaN where it is not defined
    memory: list[Tensor] | None = None  # what a rule carries to the next step, one tensor a layer
    weight: Tensor | None = None  # of these traces in their average [L]; None: as any other


@dataclass(eq=False)
class Passes:
    """The passes of one micro-batch on one process."""

    model: nn.Module  # that ``loss_fn`` calls (DistributedDataParallel, among several processes)
    layers: Layers  # the tensors that are perturbed and measured
    loss_fn: LossFn  # see ``RegularizedOptimizer.backward``
    _: KW_ONLY
    parameters: Sequence[Tensor] = ()  # all that the optimizer steps, for undoing
    share: float = 1.0  # of this micro-batch in the step, 1 / num_micro_batches
    key: tuple[object, ...] = (0,)  # names the micro-batch: every random direction is a function of it
    draw: tuple[object, int] = (0, 0)  # seed, and number of steps with draws: of what all micro-batches share
    world: int = 1  # processes
    scale: Tensor | None = None  # what a GradScaler multiplies losses with, and so what is in ``.grad``
    may_call_backward: bool = False  # ``loss_fn`` may be torch's kind of closure
    may_change_gradients: bool = False  # ... and clip them, where no rule would see those of a single pass
    traces: Tensor | None = None  # running averages of t_l [L], where known
    is_active: Tensor | None = None  # layers that get gradients, booleans [L]; None: all
    memory: list[Tensor] | None = None  # what the rule's last ``Step`` carried
    initial: Sequence[Tensor] = ()  # W⁰ of the layers' tensors, for rules with their centre there
    shared: dict[str, Any] = field(default_factory=dict)  # what all micro-batches of the step have in common

    def __post_init__(self) -> None:
        self.device = self.layers.tensors[0].device
        self._states = random_state(self.device)
        everything = (*self.parameters, *self.model.parameters())
        self._trained = list({id(p): p for p in everything if p.requires_grad}.values())

    def evaluate(self) -> Loss:
        """Return the loss with its graph, from the random numbers that every pass sees.

        RuntimeError where ``loss_fn`` calls ``backward``, TypeError where it returns no scalar with a graph.
        """
        return self._call(needs_graph=True)[0]

    def backward(self, total: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add ``weight`` times the gradients of ``total``, in this micro-batch's share, to ``.grad``."""
        factor = self._scaled(weight * self.share)
        (total if isinstance(factor, float) and factor == 1 else total * factor).backward()

    def plain(self, weight: float = 1.0, direction: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor | None]:
        """Evaluate once and add ``weight`` times the gradients; return the loss, detached.

        With a direction u also ⟨u_l, g_l⟩ [L] of the gradients on this process; NaN for a layer without one.
        """
        loss, own, sums = self._call(direction)
        if own is None:
            with slopes(self.layers, direction) as sums:
                self.backward(loss.total, weight)
        else:
            self._add(own, weight * self.share)
        factor = 1.0 if own is not None else self._scaled(weight * self.share)
        return loss.total.detach(), self.layers.joined(sums, torch.nan) / factor if direction else None

    def gradients(
        self, weight: float | Weigh = 0.0, *, retain_graph: bool = False
    ) -> tuple[Loss, list[Tensor]]:
        """Evaluate once; return the loss and the gradients of the layers on this process, zero where none.

        ``weight`` times the gradients, or what it returns for them, is added to ``.grad``. The pass is an
        ordinary ``backward``: reentrant checkpoints write into ``.grad``, past ``autograd.grad``.
        """
        loss, own, _ = self._call()
        if own is None:
            with self._set_aside():
                self._scaled(loss.total).backward(retain_graph=retain_graph)
                own = self._own_gradients()
            if self.scale is not None:
                own = {key: g / self.scale for key, g in own.items()}
        g = self.filled([own.get(id(t)) for t in self.layers.tensors])
        factor = weight(g) if callable(weight) else weight
        if isinstance(factor, Tensor) or factor:
            self._add(own, factor * self.share)
        return loss, g

    def plain_weighed(self, weigh: Weigh) -> Tensor:
        """As ``plain``, with a weight that ``weigh`` computes from the layers' gradients of this very pass.

        Among processes gradients are reduced while they are computed: a first backward finds the weight.
        """
        if self.world == 1:
            return self.gradients(weigh)[0].total.detach()
        total = self.evaluate().total
        g = torch.autograd.grad(total, self.layers.tensors, retain_graph=True, allow_unused=True)
        self.backward(total * weigh(self.filled(g)))
        return total.detach()

    def filled(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the layers' gradients, zero where there is none."""
        pairs = zip(self.layers.tensors, gradients, strict=True)
        return [torch.zeros_like(t) if g is None else dense(g) for t, g in pairs]

    def generator(self, *names: object) -> Generator:
        """Return the random numbers of this micro-batch that go by these names."""
        return generator_from(self.device, *self.key, *names)

    def random_direction(
        self, sigma: Tensor, probe: int = 0, *, gaussian: bool = False, antithetic: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Return u_l = σ_l v_l, v signs or normal numbers, and σ as rounded to the weights' dtype.

        An antithetic one is the same in all micro-batches and processes of a step. The step after turns its
        sign, which σ then has too: two steps make a pair.
        """
        tensors = [t.detach() for t in self.layers.tensors]
        rounded, (seed, number) = sigma.to(tensors[0].dtype), self.draw
        g = self.generator(*[probe] if probe else [])
        if antithetic:
            g, rounded = generator_from(self.device, seed, "pair", number // 2), rounded * (-1) ** number
        normal = partial(torch.randn, generator=g, device=self.device)
        direction = [normal(t.shape, dtype=t.dtype) for t in tensors] if gaussian else signs(tensors, g)
        torch._foreach_mul_(direction, self.layers.spread(rounded))
        return direction, rounded

    def relative_size(self, direction: list[Tensor]) -> Tensor:
        """Return ||u|| / ||W||."""
        length = self.layers.squares(direction).sum()
        return (length / self.layers.squared_norms().sum().clamp_min(TINY)).sqrt()

    def away(self, center: str) -> list[Tensor]:
        """Return W of the layers' tensors, or W − W⁰ where the centre is initial; no graph."""
        tensors = [t.detach() for t in self.layers.tensors]
        return tensors if center == "origin" else list(torch._foreach_sub(tensors, list(self.initial)))

    def squared_norms(self, center: str) -> Tensor:
        """Return a_l [L], the squared norms of ``away``."""
        return self.layers.squares(self.away(center))

    def add_norm_gradients(self, coefficients: Tensor | None, factor: float, center: str) -> None:
        """Add ``factor · coefficient_l`` times ``away``, in this share, to ``.grad``; alike on every rank."""
        if coefficients is None:
            return
        with torch.no_grad():
            factors = self.layers.spread(self._scaled(coefficients * (factor * self.share)))
            for p, w, c in zip(self.layers.tensors, self.away(center), factors, strict=True):
                p.grad = w * c if p.grad is None else p.grad.add_(w * c)

    def local(self) -> AbstractContextManager:
        """Keep gradients on this rank: forward *and* backward of every pass but the last run inside."""
        return getattr(self.model, "no_sync", nullcontext)()

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

    def _call(
        self, direction: Sequence[Tensor] = (), *, needs_graph: bool = False
    ) -> tuple[Loss, Gradients | None, list[Tensor | None]]:
        """Call ``loss_fn``; return the loss, the gradients it made itself, and their ⟨u_l, g_l⟩."""
        set_random_state(self._states, self.device)
        with self._set_aside(), torch.enable_grad(), self._noting(direction) as sums:
            returned: Any = self.loss_fn()
            own = self._own_gradients() or None
        if self.may_call_backward and returned is None and own is None:
            raise NothingDone
        loss = as_loss(torch.tensor(returned) if own and isinstance(returned, float) else returned)
        total: Any = loss.total
        if own is not None and (needs_graph or not self.may_call_backward):
            text = "loss_fn called backward() itself. Return the loss and leave the gradients alone"
            raise RuntimeError(f"RegularizedOptimizer: {text}: this pass needs the graph of the loss.")
        if not isinstance(total, Tensor) or total.ndim != 0 or not (total.requires_grad or own):
            rule = "a scalar loss with its graph. Return the mean loss, without item or detach"
            raise TypeError(f"RegularizedOptimizer: loss_fn returned {total!r:.60}; expected {rule}.")
        return loss, own, sums

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Make ``.grad`` empty inside, and put back what was in it."""
        earlier = [p.grad for p in self._trained]
        for p in self._trained:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in zip(self._trained, earlier, strict=True):
                p.grad = gradient

    @contextmanager
    def _noting(self, direction: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
        """Yield ⟨u_l, g_l⟩ of what a closure's own backward leaves in ``.grad``, as ``slopes`` does.

        RuntimeError where it changes gradients afterwards (clipping, as Lightning does), unless there is but
        one pass to be clipped. DistributedDataParallel writes the means late: where it reduces none is seen.
        """
        sums: list[Tensor | None] = [None] * len(self.layers.tensors)
        left: dict[int, tuple[Tensor, int]] = {}
        places = {id(t): index for index, t in enumerate(self.layers.tensors)}

        def note(p: Tensor) -> None:
            gradient = cast(Tensor, p.grad)
            left[id(p)] = gradient, gradient._version
            if direction and (index := places.get(id(p))) is not None:
                sums[index] = self.layers.sum_parts(index, direction[index] * dense(gradient))

        noted = [p for p in self._trained if p.is_leaf] if self.may_call_backward else []
        handles = [p.register_post_accumulate_grad_hook(note) for p in noted]
        try:
            yield sums
        finally:
            for handle in handles:
                handle.remove()
        if self.may_change_gradients or getattr(self.model, "require_backward_grad_sync", False):
            return
        for p in noted:
            gradient, version = left.get(id(p), (None, 0))
            is_same = gradient is None or (p.grad is gradient and gradient._version == version)
            if p.grad is not None and not is_same:
                got = "got a closure that changes gradients after backward (clipping?)"
                rule = "them as they are in every pass. Call backward(loss_fn), clip, then step()"
                raise RuntimeError(f"RegularizedOptimizer.step: {got}; expected {rule}.")

    def _own_gradients(self) -> Gradients:
        return {id(p): p.grad for p in self._trained if p.grad is not None}

    def _add(self, gradients: Gradients, weight: float | Tensor) -> None:
        """Add ``weight`` times gradients to ``.grad``."""
        weight = self._scaled(weight)
        for p in self._trained:
            if (g := gradients.get(id(p))) is not None:
                p.grad = g * weight if p.grad is None else p.grad.add_(g * weight)

    def _scaled(self, x: Any) -> Any:
        """Return a number, a loss or gradients, times what a GradScaler multiplies losses with."""
        return x if self.scale is None else x * self.scale


@contextmanager
def slopes(layers: Layers, direction: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """Yield ⟨u_l, g_l⟩ of the backward pass inside, one [parts] a tensor, None for one without gradient.

    The gradient is this process's own; reentrant checkpointing hands it over in pieces, which are added up.
    Where ``.grad`` was emptied in between (an attack that leaves gradients behind), what came before is gone.
    """
    sums: list[Tensor | None] = [None] * len(layers.tensors)

    def add(index: int, gradient: Tensor) -> None:
        earlier = None if layers.tensors[index].grad is None else sums[index]
        own = layers.sum_parts(index, direction[index] * dense(gradient.detach()))
        sums[index] = own if earlier is None else earlier + own

    places = enumerate(layers.tensors) if direction else ()
    handles = [t.register_hook(partial(add, index)) for index, t in places]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def carry_nan(loss: Tensor, other: Tensor | float) -> Tensor:
    """Return ``loss``, NaN where ``other`` is not finite: a good loss must not hide a bad extra pass."""
    return loss + 0.0 * other
