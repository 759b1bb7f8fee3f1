"""What one call of ``backward`` may do with ``loss_fn``: evaluate it, differentiate it, move the weights and put them back.

Every pass of a call sees the same random numbers (dropout) and the same module; all passes but the last run inside
``local()``, so that processes reduce their gradients once; on an exception nothing of the call remains.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.curvature.loss import Loss, LossFn, as_loss
from wcitrain.curvature.probes import signs
from wcitrain.params import Layers
from wcitrain.preserve import put_back_buffers, random_state, saved_buffers, set_random_state
from wcitrain.seeding import generator_from

if TYPE_CHECKING:
    from accelerate import Accelerator


class Passes:
    """The passes of one micro-batch on one process.

    Args:
        model: The module ``loss_fn`` calls (prepared, under Accelerate).
        layers: The tensors that are perturbed and measured.
        loss_fn: See ``RegularizedOptimizer.backward``.
        parameters: All that the optimizer steps, for undoing.
        share: Of this micro-batch in the step, 1 / num_micro_batches.
        key: Names the micro-batch: every random direction is a function of it.
        accelerator: None in a plain loop.
        use_math_attention: Run attention by its plain formula: torch's fused kernels cannot be differentiated twice.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        loss_fn: LossFn,
        *,
        parameters: Sequence[Tensor] = (),
        share: float = 1.0,
        key: tuple[object, ...] = (0,),
        accelerator: "Accelerator | None" = None,
        use_math_attention: bool = False,
    ) -> None:
        self.model, self.layers, self.share = model, layers, share
        self.use_math_attention = use_math_attention
        self._loss_fn, self._parameters, self._key, self._accelerator = loss_fn, parameters, key, accelerator
        self.device = layers.tensors[0].device
        self._states = random_state(self.device)

    def evaluate(self, needs_graph: bool = True) -> Loss:
        """Call ``loss_fn`` with the random numbers every pass of this call sees, and check what it returns."""
        set_random_state(self._states, self.device)
        before = self._gradient_versions()
        with sdpa_kernel(SDPBackend.MATH) if self.use_math_attention else nullcontext():
            loss = as_loss(self._loss_fn())
        if before != self._gradient_versions():
            raise RuntimeError(
                "RegularizedOptimizer: loss_fn called backward() or zero_grad() itself; gradients of several passes are being "
                "collected. Return the differentiable loss and leave the gradients alone."
            )
        total: Any = loss.total
        if not isinstance(total, Tensor) or total.ndim != 0 or (needs_graph and not total.requires_grad):
            is_tensor = isinstance(total, Tensor)
            got = f"shape {tuple(total.shape)}, requires_grad={total.requires_grad}" if is_tensor else repr(total)
            raise TypeError(
                f"RegularizedOptimizer: loss_fn returned {got}; expected a scalar loss with its graph. Return the mean loss "
                "and do not call backward, item or detach on it."
            )
        return loss

    def backward(self, total: Tensor, weight: float = 1.0) -> None:
        """Add ``weight`` times the gradients of ``total``, in this micro-batch's share, to ``.grad``."""
        with explained():
            (total if weight == 1 == self.share else total * (weight * self.share)).backward()

    def plain(self, weight: float = 1.0) -> Tensor:
        """Evaluate once, add ``weight`` times the gradients, return the loss, detached."""
        total = self.evaluate().total
        self.backward(total, weight)
        return total.detach()

    def plain_weighed(self, weigh: Callable[[list[Tensor]], float]) -> Tensor:
        """As ``plain``, with a weight that ``weigh`` computes from the layers' gradients of this very pass.

        In one process the gradients are scaled before they join what is in ``.grad``. Among several they are reduced while
        they are computed, so the weight has to be known first: there this takes a second backward pass.
        """
        total = self.evaluate().total
        if self._accelerator is not None and self._accelerator.num_processes > 1:
            found = self.layer_gradients(total, retain_graph=True)
            self.backward(total, weigh(self.filled(found)))
            return total.detach()
        parameters = self._trained()
        earlier = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        with explained():
            total.backward()
        weight = weigh(self.filled([t.grad for t in self.layers.tensors])) * self.share
        for p, gradient in zip(parameters, earlier, strict=True):
            if p.grad is None:
                p.grad = gradient
            else:
                p.grad = p.grad.mul_(weight) if gradient is None else gradient.add_(p.grad, alpha=weight)
        return total.detach()

    def layer_gradients(
        self, total: Tensor, *, create_graph: bool = False, retain_graph: bool | None = None
    ) -> Sequence[Tensor | None]:
        """Return the gradients with respect to the layers' tensors, on this process, without touching ``.grad``."""
        with explained():
            return torch.autograd.grad(
                total, self.layers.tensors, allow_unused=True, create_graph=create_graph, retain_graph=retain_graph
            )

    def generator(self, *names: object) -> torch.Generator:
        """Return the random numbers of this micro-batch that go by these names."""
        return generator_from(self.device, *self._key, *names)

    def random_direction(self, sigma: Tensor, probe: int = 0, *, gaussian: bool = False) -> tuple[list[Tensor], Tensor]:
        """Return u_l = σ_l v_l with fresh signs (or normal numbers), and σ as it was rounded to the weights' dtype."""
        detached = [t.detach() for t in self.layers.tensors]
        rounded = sigma.to(detached[0].dtype)
        direction = self.gaussian() if gaussian else signs(detached, self.generator(*([probe] if probe else [])))
        for u, factor in zip(direction, self.layers.spread(rounded), strict=True):
            u.mul_(factor)
        return direction, rounded

    def gaussian(self) -> list[Tensor]:
        """Return standard normal numbers shaped like the layers' tensors."""
        generator = self.generator()
        return [torch.randn(t.shape, generator=generator, device=t.device, dtype=t.dtype) for t in self.layers.tensors]

    def add_norm_gradients(self, coefficients: Tensor | None, factor: float = 1.0) -> None:
        """Add ``factor · coefficient_l · W_l`` to ``.grad`` (the same on every rank, a share per micro-batch)."""
        if coefficients is None:
            return
        with torch.no_grad():
            factors = self.layers.spread(coefficients * (factor * self.share))
            for p, c in zip(self.layers.tensors, factors, strict=True):
                p.grad = p * c if p.grad is None else p.grad.add_(p * c)

    def local(self) -> AbstractContextManager:
        """Keep gradients on this rank: forward *and* backward of every pass but the last run inside."""
        return nullcontext() if self._accelerator is None else self._accelerator.no_sync(self.model)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Several passes add all of their gradients or none: on an exception gradients, buffers and random state go back."""
        parameters = self._trained()
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        buffers = saved_buffers(self.model)
        try:
            yield
        except BaseException:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            put_back_buffers(buffers)
            set_random_state(self._states, self.device)
            raise

    def _trained(self) -> list[Tensor]:
        """Return the optimizer's and the model's parameters, each once."""
        return list({id(p): p for p in (*self._parameters, *self.model.parameters())}.values())

    def filled(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the layers' gradients, zero where there is none."""
        return [torch.zeros_like(t) if g is None else g for t, g in zip(self.layers.tensors, gradients, strict=True)]

    def _gradient_versions(self) -> list[tuple[int, int | None]]:
        """Return what changes when somebody writes to the layers' gradients."""
        return [(id(p.grad), None if p.grad is None else p.grad._version) for p in self.layers.tensors]


class Slopes:
    """Collects <u_l, g_l> of the one backward pass made inside ``with Slopes(layers, direction) as slopes``.

    Hooks see this process's own gradient before it is added to ``.grad`` and before any reduction over processes, so
    neither accumulated micro-batches nor other processes' directions leak in. Afterwards ``slopes.values`` is a tensor [L];
    a layer that got no gradient has NaN.
    """

    def __init__(self, layers: Layers, direction: Sequence[Tensor]) -> None:
        self._layers, self._direction = layers, direction
        self._found: dict[int, Tensor] = {}

    def __enter__(self) -> "Slopes":
        self._handles = [t.register_hook(self._hook(index)) for index, t in enumerate(self._layers.tensors)]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Any:
        def collect(gradient: Tensor) -> None:
            slope = self._layers.sum_parts(index, self._direction[index] * gradient.detach())
            self._found[index] = (
                self._found[index] + slope if index in self._found else slope
            )  # reentrant checkpointing

        return collect

    @property
    def values(self) -> Tensor:
        """The inner products [L], summed in float64."""
        nothing = [
            self._layers.sum_parts(i, u) * torch.nan for i, u in enumerate(self._direction) if i not in self._found
        ]
        missing = iter(nothing)
        return torch.cat([self._found[i] if i in self._found else next(missing) for i in range(len(self._direction))])


class Captured:
    """Keeps the layers' gradients of the one backward pass made inside ``with Captured(layers, weight) as captured``.

    ``captured.gradients``: one tensor each, divided by the ``weight`` the loss was multiplied by; None where there is none.
    Like `Slopes`, by hooks: this pass's own, on this process.
    """

    def __init__(self, layers: Layers, weight: float) -> None:
        self._layers, self._weight = layers, weight
        self.gradients: list[Tensor | None] = [None] * len(layers.tensors)

    def __enter__(self) -> "Captured":
        self._handles = [t.register_hook(self._hook(index)) for index, t in enumerate(self._layers.tensors)]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Any:
        def keep(gradient: Tensor) -> None:
            earlier, found = self.gradients[index], gradient.detach() / self._weight
            self.gradients[index] = found if earlier is None else earlier + found  # reentrant checkpointing

        return keep


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
