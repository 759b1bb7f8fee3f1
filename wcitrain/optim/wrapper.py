"""The optimizer wrapper: all regularisation happens in ``backward``, all stepping in ``step``.

Legend: W layer weights, u perturbation, L the loss at fixed adversarial examples, g its gradient, t_l = Tr(H_l).

One call of ``backward(loss_fn)`` leaves the gradients of the regularised objective in ``.grad``, added to what is there
(so micro-batches accumulate and the user clips between ``backward`` and ``step``):

| rule active at this step   | what lands in `.grad`                            | passes (forward, backward)  |
|----------------------------|--------------------------------------------------|-----------------------------|
| none                       | g(W)                                             | 1, 1                        |
| `AWP`                      | g(W + u), u along g(W)                           | 2, 2                        |
| `WCIPosterior`, `UniformNoise` | ½ [g(W + u) + g(W − u)]                      | 2, 2 (3, 2 with clean statistics) |
| a penalty with curvature   | g(W) + k [g(W + u) + g(W − u) − 2 g(W)], + 2 ∂φ/∂a W | 3, 3                    |
| `FrobeniusTracePenalty` without | g(W) + 2 λ_F W                              | 1, 1                        |

Contracts: the wrapper owns no parameter group and no state of the base optimizer. With every strength at zero it *is* the
base optimizer, bit for bit. Perturbed weights come back by copy from a clone, also on exceptions. The passes of one call see
the same random numbers (dropout) and running statistics move once: in the pass at W where there is one, else at W − u.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wcitrain.curvature.two_point import signs, trace_from_slopes
from wcitrain.optim.delegating import DelegatingOptimizer
from wcitrain.optim.passes import Slopes, explained, perturbed
from wcitrain.optim.penalty import Penalty, WCIPenalty
from wcitrain.optim.perturbation import AWP, Posterior, UniformNoise, WCIPosterior, WeightPerturbation
from wcitrain.params import dots, select_layers, sizes, squared_norms
from wcitrain.preserve import full_precision, kept_buffers, random_state, set_random_state

if TYPE_CHECKING:
    from accelerate import Accelerator

LossFn = Callable[[], Tensor]
_KEY = "regularizer"  # where the wrapper's own numbers travel: base.param_groups[0][_KEY]


class RegularizedOptimizer(DelegatingOptimizer):
    """Any torch optimizer, with a weight perturbation and/or a penalty in the gradient it steps on.

    In one's own loop (``loss_fn`` returns the differentiable loss at fixed ``x_adv``, and calls neither ``backward`` nor
    ``zero_grad``; it is called several times)::

        optimizer = RegularizedOptimizer(SGD(model.parameters(), lr=0.1), model, perturbation=WCIPosterior(1.0))
        loss = optimizer.step(lambda: F.cross_entropy(model(x_adv), y))

    With accumulation, clipping or Accelerate: ``backward(loss_fn)`` once a micro-batch, then ``step()``, ``zero_grad()``.

    Args:
        base: The optimizer that steps; groups, state and defaults remain its own, and schedulers may be given either.
        model: The module whose layers are perturbed and whose buffers are protected in the extra passes.
        perturbation: ``AWP``, ``WCIPosterior`` or ``UniformNoise``.
        penalty: ``WCIPenalty`` or ``FrobeniusTracePenalty``.
        layers: Which tensors are layers, see ``params.select_layers``.
        trace_decay: Decay of the running average of t_l, in [0, 1); its start-up bias is corrected.
        num_micro_batches: ``backward`` calls per ``step``; each contributes 1/num_micro_batches.
        seed: Of the random directions: they depend on (seed, step, micro-batch, rank) and nothing else.

    Raises:
        ValueError: A perturbation and a curvature penalty together; no layers; a parameter outside the given ranges.
        TypeError: ``base`` is not a ``torch.optim.Optimizer`` instance.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        *,
        perturbation: WeightPerturbation | None = None,
        penalty: Penalty | None = None,
        layers: str = "weights",
        trace_decay: float = 0.9,
        num_micro_batches: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        if perturbation is not None and penalty is not None and penalty.measures_curvature:
            raise ValueError(
                f"got perturbation={perturbation} and penalty={penalty}; expected one of the two: both move the weights "
                "for the same pass. WCIPosterior measures the traces by itself."
            )
        if not 0 <= trace_decay < 1 or num_micro_batches < 1:
            raise ValueError(
                f"got trace_decay={trace_decay}, num_micro_batches={num_micro_batches}; expected 0 <= trace_decay < 1 "
                "and num_micro_batches >= 1."
            )
        self.model = model
        self.perturbation = perturbation
        self.penalty = penalty
        self.trace_decay = trace_decay
        self.num_micro_batches = num_micro_batches
        self.seed = seed
        optimized = {id(p) for group in base.param_groups for p in group["params"]}
        self.layers = {n: p for n, p in select_layers(model, layers).items() if id(p) in optimized}
        if not self.layers:
            raise ValueError("layers: none of the selected tensors is in the optimizer's groups. Is it the same model?")
        self._accelerator: Accelerator | None = None
        self._micro_step = 0  # backward calls since the last step
        self._pending: list[Tensor] = []  # their trace estimates, each [L]
        self._latest: Posterior | None = None
        self._is_busy = False
        base.param_groups[0].setdefault(_KEY, self._fresh_record())

    # ---- the two calls -----------------------------------------------------------------------------------------------

    def backward(self, loss_fn: LossFn) -> Tensor:
        """Add the gradients of the regularised objective at one micro-batch to ``.grad``.

        Args:
            loss_fn: Returns the scalar mean loss at fixed adversarial examples, with graph. Called once to three times.

        Returns:
            The loss at the unperturbed weights, detached; where no pass is made there (posterior without clean
            statistics) the mean of the two perturbed losses.

        Raises:
            TypeError: ``loss_fn`` does not return a scalar tensor with a graph.
            RuntimeError: ``loss_fn`` calls ``backward``, ``zero_grad`` or this method.
        """
        if self._is_busy:
            raise RuntimeError("RegularizedOptimizer.backward: called inside its own loss_fn. Return the loss instead.")
        step, device = self._record["step"], next(iter(self.layers.values())).device
        factor = self.perturbation.schedule.factor(step) if self.perturbation else 0.0
        penalty_factor = self.penalty.schedule.factor(step) if self.penalty else 0.0
        self._is_busy, self._states, self._device = True, random_state(device), device
        try:
            if self.perturbation and factor:
                take = self._adversarial if isinstance(self.perturbation, AWP) else self._antithetic
                loss = take(loss_fn, factor)
            elif self.penalty and penalty_factor and self.penalty.measures_curvature:
                loss = self._two_point(loss_fn, penalty_factor * self.penalty.schedule.every)
            else:
                loss = self._pass(loss_fn)
            if self.penalty and penalty_factor:
                self._add_to_gradients(
                    self.penalty.norm_coefficients(self._norms(), self._sizes(), self.traces()),
                    penalty_factor * self.penalty.schedule.every,
                )
        finally:
            self._is_busy = False
            del self._states
        self._micro_step += 1
        return loss

    def step(self, closure: LossFn | None = None) -> Any:  # type: ignore[override]
        """Step the base optimizer on what is in ``.grad``; with a closure: ``zero_grad``, ``backward(closure)``, step.

        The closure returns the differentiable loss and does *not* call ``backward``. Running averages of the traces are
        folded in here (over micro-batches and ranks), whatever the base optimizer does with the gradients.
        """
        if closure is None:
            result = self.base.step()
            self._fold_estimates()
            return result
        if self._accelerator is not None:
            raise RuntimeError(
                "RegularizedOptimizer.step: got a closure under Accelerate, which calls it only on some micro-batches. "
                "Use backward(loss_fn) in every micro-batch, then step()."
            )
        self.zero_grad()
        loss = self.backward(closure)
        self.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients (the base optimizer's ``zero_grad``); an error inside ``loss_fn``."""
        if self._is_busy:
            raise RuntimeError(
                "RegularizedOptimizer.zero_grad: called inside loss_fn, where it would wipe the gradients of the passes "
                "already made. Clear them before backward, or let step(closure) do it."
            )
        self.base.zero_grad(set_to_none=set_to_none)

    # ---- the passes --------------------------------------------------------------------------------------------------

    def _pass(self, loss_fn: LossFn, weight: float = 1.0) -> Tensor:
        """Evaluate once with the call's random numbers and add ``weight`` times the gradients; return the loss."""
        loss = self._evaluate(loss_fn)
        with explained():
            (loss if weight == 1 == self.num_micro_batches else loss * (weight / self.num_micro_batches)).backward()
        return loss.detach()

    def _adversarial(self, loss_fn: LossFn, factor: float) -> Tensor:
        """AWP: ascend along the local gradient, take the gradient there."""
        assert isinstance(self.perturbation, AWP)
        with self._local():
            loss = self._evaluate(loss_fn)
            gradients = self._layer_gradients(loss)
        radii = self.perturbation.radii(self._norms(), factor)
        lengths = dots(gradients, gradients).sqrt()
        scales = torch.where(lengths > 0, radii / lengths.clamp_min(1e-30), 0.0)
        direction = [g * s.to(g.dtype) for g, s in zip(gradients, scales, strict=True)]
        with kept_buffers(self.model), perturbed(self._tensors, direction) as move:
            move(+1)
            self._pass(loss_fn)
        return loss.detach()

    def _antithetic(self, loss_fn: LossFn, factor: float) -> Tensor:
        """Posterior: the mean of the gradients at W + u and W − u, and the traces from their difference for free."""
        assert isinstance(self.perturbation, (WCIPosterior, UniformNoise))
        posterior = self.perturbation.posterior(self._norms(), self._sizes(), self.traces(), factor)
        clean_statistics = self.perturbation.statistics == "clean" and any(True for _ in self.model.buffers())
        if clean_statistics:
            with torch.no_grad(), self._local():
                loss = self._evaluate(loss_fn, needs_graph=False)
        direction, sigma = self._random_direction(posterior.sigma)
        with perturbed(self._tensors, direction) as move:
            with kept_buffers(self.model), self._local(), Slopes(self._tensors, direction) as plus:
                move(+1)
                loss_plus = self._pass(loss_fn, 0.5)
            with (
                kept_buffers(self.model) if clean_statistics else nullcontext(),
                Slopes(self._tensors, direction) as minus,
            ):
                move(-1)
                loss_minus = self._pass(loss_fn, 0.5)
        self._observe(plus.values, minus.values, sigma, 0.5)
        self._add_to_gradients(posterior.frobenius, 1.0)
        self._latest = posterior
        return loss if clean_statistics else (loss_plus + loss_minus) / 2

    def _two_point(self, loss_fn: LossFn, factor: float) -> Tensor:
        """Penalty: small-radius differences, g(W) + k [g+ + g− − 2 g(W)]; k = 0 only measures and changes nothing."""
        assert self.penalty is not None
        a, d, traces = self._norms(), self._sizes(), self.traces()
        shape, strength = self.penalty.trace_coefficients(a, d, traces)
        scale = self.penalty.radius * (a.sum() / (d * shape).sum()).sqrt()  # ||scale * sqrt(shape) v|| = radius ||W||
        direction, sigma = self._random_direction(scale * shape.sqrt())
        weight = float(factor * strength / scale.square()) if strength else 0.0  # k
        if weight and isinstance(self.penalty, WCIPenalty):  # the posterior step is this one at k = 1/2
            size = self.penalty.radius * (2 * weight) ** 0.5
            self._latest = Posterior(sigma, None, a.new_tensor(factor * strength), a.new_tensor(size))
        with full_precision(self.model):
            with perturbed(self._tensors, direction) as move, kept_buffers(self.model), self._local():
                slopes = []
                for side in (+1, -1):
                    move(side)
                    if weight:
                        with Slopes(self._tensors, direction) as slope:
                            self._pass(loss_fn, weight)
                        slopes.append(slope.values)
                    else:
                        slopes.append(dots(direction, self._layer_gradients(self._evaluate(loss_fn))))
            self._observe(slopes[0], slopes[1], sigma, weight or self.num_micro_batches)
            if weight:
                return self._pass(loss_fn, 1 - 2 * weight)
        return self._pass(loss_fn)

    def _evaluate(self, loss_fn: LossFn, needs_graph: bool = True) -> Tensor:
        """Call ``loss_fn`` with the random numbers every pass of this call sees, and check what it returns."""
        set_random_state(self._states, self._device)
        loss = loss_fn()
        if not isinstance(loss, Tensor) or loss.ndim != 0 or (needs_graph and not loss.requires_grad):
            got = (
                f"a tensor of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
                if isinstance(loss, Tensor)
                else repr(loss)
            )
            raise TypeError(
                f"RegularizedOptimizer: loss_fn returned {got}; expected a scalar loss with its graph. Return the mean loss "
                "and do not call backward, item or detach on it."
            )
        return loss

    def _layer_gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradients with respect to the layers alone, on this rank, without touching ``.grad``."""
        with explained():
            found = torch.autograd.grad(loss, self._tensors, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self._tensors, found, strict=True)]

    @property
    def _tensors(self) -> list[nn.Parameter]:
        """The layers without their names."""
        return list(self.layers.values())

    def _random_direction(self, sigma: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return u_l = σ_l v_l with fresh signs, and σ as it was rounded to the weights' dtype."""
        rank, world = (
            (0, 1) if self._accelerator is None else (self._accelerator.process_index, self._accelerator.num_processes)
        )
        layers = [p.detach() for p in self._tensors]
        rounded = sigma.to(layers[0].dtype)
        direction = signs(layers, self.seed, self._record["step"], self._micro_step * world + rank)
        torch._foreach_mul_(direction, list(rounded))
        return direction, rounded

    def _local(self) -> AbstractContextManager:
        """Keep gradients on this rank: forward *and* backward of every pass but the last run inside."""
        return nullcontext() if self._accelerator is None else self._accelerator.no_sync(self.model)

    # ---- norms, traces, record -----------------------------------------------------------------------------------------

    @property
    def _record(self) -> dict[str, Any]:
        """The wrapper's numbers, kept in the base optimizer's first group: they survive every checkpoint path."""
        return self.param_groups[0][_KEY]

    def _fresh_record(self) -> dict[str, Any]:
        zeros = torch.zeros_like(squared_norms(self.layers))
        return {"step": 0, "num_estimates": 0, "trace_sum": zeros, "num_negative": zeros.clone()}

    def _norms(self) -> Tensor:
        return squared_norms(self.layers)

    def _sizes(self) -> Tensor:
        return sizes(self.layers)

    def traces(self) -> Tensor | None:
        """Return the bias-corrected running averages of t_l [L], or None before the first estimate."""
        record = self._record
        if not record["num_estimates"]:
            return None
        return record["trace_sum"] / (1 - self.trace_decay ** record["num_estimates"])

    def _observe(self, plus: Tensor, minus: Tensor, sigma: Tensor, weight: float) -> None:
        """Keep the trace estimate of one micro-batch; slopes carry the pass's weight."""
        self._pending.append(trace_from_slopes(plus, minus, sigma) * (self.num_micro_batches / weight))

    def _fold_estimates(self) -> None:
        """Average the step's estimates over micro-batches and ranks, and fold them into the running averages."""
        record = self._record
        if self._pending:
            estimate = torch.stack(self._pending).mean(0)
            if self._accelerator is not None and self._accelerator.num_processes > 1:
                estimate = self._accelerator.reduce(estimate, reduction="mean")
            record["trace_sum"] = self.trace_decay * record["trace_sum"] + (1 - self.trace_decay) * estimate
            record["num_negative"] = record["num_negative"] + (estimate < 0)
            record["num_estimates"] += 1
        record["step"] += 1
        self._pending, self._micro_step = [], 0

    def _add_to_gradients(self, coefficients: Tensor | None, factor: float) -> None:
        """Add ``factor · coefficient_l · W_l`` to ``.grad`` (the same on every rank, a share per micro-batch)."""
        if coefficients is None:
            return
        with torch.no_grad():
            for p, c in zip(self.layers.values(), coefficients * (factor / self.num_micro_batches), strict=True):
                p.grad = p * c.to(p.dtype) if p.grad is None else p.grad.add_(p * c.to(p.dtype))

    def metrics(self) -> dict[str, float]:
        """Return what there is to log, as floats (synchronises with the device).

        ``relative_size`` and ``lambda`` of the latest posterior step; for every layer ``frobenius/<layer>`` (a_l), and once
        measured ``curvature/trace/<layer>`` (running average of t_l) and ``wci/<layer>`` = sqrt(a_l max(t_l, 0)); their sum
        ``wci/total``; ``curvature/negative`` the share of single-step estimates below zero.
        """
        a, traces = self._norms(), self.traces()
        values = {f"frobenius/{name}": v for name, v in zip(self.layers, a.tolist(), strict=True)}
        if traces is not None:
            wci = (a * traces.clamp_min(0)).sqrt()
            values |= {f"curvature/trace/{name}": v for name, v in zip(self.layers, traces.tolist(), strict=True)}
            values |= {f"wci/{name}": v for name, v in zip(self.layers, wci.tolist(), strict=True)}
            values["wci/total"] = float(wci.sum())
            values["curvature/negative"] = float(self._record["num_negative"].mean()) / self._record["num_estimates"]
        if self._latest is not None:
            values["relative_size"] = float(self._latest.relative_size)
            if not torch.isnan(self._latest.strength):
                values["lambda"] = float(self._latest.strength)
        return values

    def extra_passes(self) -> tuple[float, float]:
        """Return the mean forward and backward passes a step costs beyond a plain one, at full schedule."""
        has_buffers = any(True for _ in self.model.buffers())
        if isinstance(self.perturbation, AWP):
            forward, backward, every = 1, 1, self.perturbation.schedule.every
        elif self.perturbation is not None:
            clean = self.perturbation.statistics == "clean" and has_buffers
            forward, backward, every = 1 + clean, 1, self.perturbation.schedule.every
        elif self.penalty is not None and self.penalty.measures_curvature:
            forward, backward, every = 2, 2, self.penalty.schedule.every
        else:
            forward, backward, every = 0, 0, 1
        return forward / every, backward / every

    # ---- Accelerate ------------------------------------------------------------------------------------------------

    def attach(self, accelerator: "Accelerator", model: nn.Module) -> "RegularizedOptimizer":
        """Wire the wrapper to a prepared model: local passes under ``no_sync``, one reduction, float32 differences.

        Call it after ``accelerator.prepare`` on the wrapper itself (``prepare`` returns an ``AcceleratedOptimizer`` around
        it), with the prepared model.

        Raises:
            ValueError: fp16 (its scaler skips and rescales steps), a static DDP graph, sharded or DeepSpeed models, or a
                compiled bfloat16 model with a curvature penalty.
        """
        kind = accelerator.distributed_type.value
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"attach: got mixed_precision={accelerator.mixed_precision!r}; expected 'no' or 'bf16'. Use bf16."
            )
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise ValueError(f"attach: got distributed type {kind}; expected one process or DistributedDataParallel.")
        if getattr(model, "static_graph", False):
            raise ValueError(
                "attach: got a DDP model with static_graph=True; expected False: extra passes change the graph."
            )
        is_compiled = any(hasattr(m, "_orig_mod") for m in model.modules())
        if is_compiled and accelerator.mixed_precision == "bf16" and self.penalty and self.penalty.measures_curvature:
            raise ValueError(
                "attach: got a compiled bf16 model and a curvature penalty, whose differences need float32 passes that the "
                "compiled graph cannot switch to. Use precision 'no', drop compile, or use WCIPosterior."
            )
        self._accelerator, self.model = accelerator, model
        self.num_micro_batches = accelerator.gradient_accumulation_steps
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; the wrapper's few numbers are in its first group."""
        if self._is_busy:
            raise RuntimeError(
                "RegularizedOptimizer.state_dict: called inside loss_fn, while the weights are perturbed."
            )
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or the bare base optimizer's (the running averages then start afresh).

        Raises:
            ValueError: The saved running averages are for another number of layers.
        """
        record = state_dict["param_groups"][0].get(_KEY)
        if record is not None and len(record["trace_sum"]) != len(self.layers):
            raise ValueError(
                f"load_state_dict: got running averages of {len(record['trace_sum'])} layers; this model has "
                f"{len(self.layers)}. Was the choice of layers changed?"
            )
        fresh = self._fresh_record()
        self.base.load_state_dict(state_dict)
        loaded = self.base.param_groups[0].get(_KEY, fresh)
        like = fresh["trace_sum"]
        self.base.param_groups[0][_KEY] = {
            key: value.to(like).clone() if isinstance(value, Tensor) else value for key, value in loaded.items()
        }
        self._pending, self._micro_step = [], 0

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_accelerator": None}

    def __repr__(self) -> str:
        return f"RegularizedOptimizer({self.base!r}, perturbation={self.perturbation}, penalty={self.penalty})"
