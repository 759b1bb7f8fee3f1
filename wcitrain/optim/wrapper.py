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

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
        low = [n for n, p in self.layers.items() if p.dtype.itemsize < 4]
        if low and penalty is not None and penalty.measures_curvature:
            raise ValueError(
                f"penalty: got {self.layers[low[0]].dtype} weights in {low[0]}; expected float32 or float64: differences of "
                "low-precision gradients are noise. Keep float32 weights and use autocast, or use WCIPosterior."
            )
        if base.param_groups[0].get(_KEY, {}).get("layers") != list(self.layers):
            base.param_groups[0][_KEY] = self._fresh_record()

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
            RuntimeError: ``loss_fn`` changes gradients or calls this method; an autocast is on around the call; several
                processes without ``attach``.
        """
        if self._is_busy:
            raise RuntimeError("RegularizedOptimizer.backward: called inside its own loss_fn. Return the loss instead.")
        step, device = self._record["step"], next(iter(self.layers.values())).device
        self._refuse_what_is_silently_wrong(device)
        factor = self.perturbation.schedule.factor(step) if self.perturbation else 0.0
        penalty_factor = self.penalty.schedule.factor(step) if self.penalty else 0.0
        self._is_busy, self._states, self._device = True, random_state(device), device
        try:
            if self.perturbation and factor:
                take = self._adversarial if isinstance(self.perturbation, AWP) else self._antithetic
                with self._undone_on_error():
                    loss = take(loss_fn, factor)
            elif self.penalty and penalty_factor and self.penalty.measures_curvature:
                with self._undone_on_error():
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
        folded in here (over micro-batches and processes), and processes get the same running statistics.
        """
        if closure is None:
            result = self.base.step()
            self._fold_estimates()
            self._share_buffers()
            return result
        if self._accelerator is not None or self.num_micro_batches > 1:
            raise RuntimeError(
                "RegularizedOptimizer.step: got a closure under Accelerate or with several micro-batches, of which it would see "
                "only some. Use backward(loss_fn) in every micro-batch, then step()."
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
        self._forget_micro_batches()  # of a batch that was skipped

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
            found = self._layer_gradients(loss)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(self._tensors, found, strict=True)]
        radii = self.perturbation.radii(self._norms(), factor)
        lengths = dots(gradients, gradients).sqrt()
        scales = torch.where(lengths > 0, radii / lengths.clamp_min(1e-30), 0.0)
        direction = [g * s.to(g.dtype) for g, s in zip(gradients, scales, strict=True)]
        with kept_buffers(self.model), perturbed(self._tensors, direction) as move:
            move(+1)
            loss_there = self._pass(loss_fn)
        return _spoiled_by(loss.detach(), loss_there)

    def _antithetic(self, loss_fn: LossFn, factor: float) -> Tensor:
        """Posterior: the mean of the gradients at W + u and W − u, and the traces from their difference for free."""
        assert isinstance(self.perturbation, (WCIPosterior, UniformNoise))
        posterior = self.perturbation.posterior(self._norms(), self._sizes(), self.traces(), factor)
        clean_statistics = self.perturbation.statistics == "clean" and _has_running_statistics(self.model)
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
        mean = (loss_plus + loss_minus) / 2
        return _spoiled_by(loss, mean) if clean_statistics else mean

    def _two_point(self, loss_fn: LossFn, factor: float) -> Tensor:
        """Penalty: small-radius differences, g(W) + k [g+ + g− − 2 g(W)]; k = 0 only measures and changes nothing."""
        assert self.penalty is not None
        a, d, traces = self._norms(), self._sizes(), self.traces()
        shape, strength = self.penalty.trace_coefficients(a, d, traces)
        scale = self.penalty.radius * (a.sum() / (d * shape).sum()).sqrt()  # ||scale * sqrt(shape) v|| = radius ||W||
        direction, sigma = self._random_direction(scale * shape.sqrt())
        weight = float(factor * strength / scale.square()) if strength and scale > 0 else 0.0  # k
        if weight and isinstance(self.penalty, WCIPenalty):  # the posterior step is this one at k = 1/2
            size = self.penalty.radius * (2 * weight) ** 0.5
            self._latest = Posterior(sigma, None, a.new_tensor(factor * strength), a.new_tensor(size))
        with full_precision(self.model):
            with perturbed(self._tensors, direction) as move, kept_buffers(self.model), self._local():
                slopes, losses = [], []
                for side in (+1, -1):
                    move(side)
                    if weight:
                        with Slopes(self._tensors, direction) as slope:
                            losses.append(self._pass(loss_fn, weight))
                        slopes.append(slope.values)
                    else:
                        gradients = self._layer_gradients(self._evaluate(loss_fn))
                        slopes.append(dots(direction, gradients) + _nan_where_missing(gradients, sigma))
            self._observe(slopes[0], slopes[1], sigma, weight or self.num_micro_batches)
            if weight:
                return _spoiled_by(self._pass(loss_fn, 1 - 2 * weight), sum(losses))
        return self._pass(loss_fn)

    def _evaluate(self, loss_fn: LossFn, needs_graph: bool = True) -> Tensor:
        """Call ``loss_fn`` with the random numbers every pass of this call sees, and check what it returns."""
        set_random_state(self._states, self._device)
        before = [(id(p.grad), None if p.grad is None else p.grad._version) for p in self._tensors]
        loss = loss_fn()
        if before != [(id(p.grad), None if p.grad is None else p.grad._version) for p in self._tensors]:
            raise RuntimeError(
                "RegularizedOptimizer: loss_fn called backward() or zero_grad() itself; gradients of several passes are being "
                "collected. Return the differentiable loss and leave the gradients alone."
            )
        if not isinstance(loss, Tensor) or loss.ndim != 0 or (needs_graph and not loss.requires_grad):
            is_tensor = isinstance(loss, Tensor)
            got = f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}" if is_tensor else repr(loss)
            raise TypeError(
                f"RegularizedOptimizer: loss_fn returned {got}; expected a scalar loss with its graph. Return the mean loss "
                "and do not call backward, item or detach on it."
            )
        return loss

    def _layer_gradients(self, loss: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients with respect to the layers alone, on this process, without touching ``.grad``."""
        with explained():
            return torch.autograd.grad(loss, self._tensors, allow_unused=True)

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

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Several passes add all of their gradients or none: on an exception gradients, buffers and random state go back."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        num_pending = len(self._pending)
        try:
            yield
        except BaseException:
            del self._pending[num_pending:]
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad = gradient
                for buffer, value in buffers:
                    buffer.copy_(value)
            set_random_state(self._states, self._device)
            raise

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
        return {
            "layers": list(self.layers),
            "step": 0,
            "is_measured": False,
            "trace_sum": zeros,  # Σ_k decay^(n-k) (1 - decay) t_k over the n estimates of a layer,
            "trace_weight": zeros.clone(),  # and the same sum of ones: their ratio is free of start-up bias
            "num_estimates": zeros.clone(),
            "num_negative": zeros.clone(),
        }

    def _norms(self) -> Tensor:
        return squared_norms(self.layers)

    def _sizes(self) -> Tensor:
        return sizes(self.layers)

    def traces(self) -> Tensor | None:
        """Return the bias-corrected running averages of t_l [L], NaN for a layer not measured yet; None before any."""
        record = self._record
        return record["trace_sum"] / record["trace_weight"] if record["is_measured"] else None

    def _observe(self, plus: Tensor, minus: Tensor, sigma: Tensor, weight: float) -> None:
        """Keep the trace estimate of one micro-batch; slopes carry the pass's weight."""
        self._pending.append(trace_from_slopes(plus, minus, sigma) * (self.num_micro_batches / weight))

    def _fold_estimates(self) -> None:
        """Average the step's estimates over micro-batches and processes, and fold the finite ones into the averages."""
        record = self._record
        if self._pending:
            estimate = torch.stack(self._pending).mean(0)
            if self._accelerator is not None and self._accelerator.num_processes > 1:
                estimate = self._accelerator.reduce(estimate, reduction="mean")
            is_good = torch.isfinite(estimate)
            kept = torch.where(is_good, self.trace_decay, 1.0)
            for key, value in (("trace_sum", estimate), ("trace_weight", torch.ones_like(estimate))):
                record[key] = kept * record[key].to(estimate) + (1 - kept) * torch.where(is_good, value, 0.0)
            record["num_estimates"] = record["num_estimates"].to(estimate) + is_good
            record["num_negative"] = record["num_negative"].to(estimate) + (estimate < 0)
            record["is_measured"] = True
        record["step"] += 1
        self._forget_micro_batches()

    def _forget_micro_batches(self) -> None:
        self._pending, self._micro_step = [], 0

    def _refuse_what_is_silently_wrong(self, device: torch.device) -> None:
        """Raise where passes would not be what they seem."""
        if torch.is_autocast_enabled(device.type):
            raise RuntimeError(
                "RegularizedOptimizer.backward: called under autocast, which keeps low-precision copies of the weights, so that "
                "passes at perturbed weights would use the old ones. Enter autocast inside loss_fn, or let Accelerate do it."
            )
        if self._accelerator is None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                "RegularizedOptimizer.backward: called in one of several processes without attach; weights would diverge "
                "between them. Call attach(accelerator, model) after accelerator.prepare."
            )

    def _share_buffers(self) -> None:
        """Give every process the main one's running statistics.

        DistributedDataParallel does so before a forward, but there it would be undone together with the extra pass.
        """
        if self._accelerator is not None and self._accelerator.num_processes > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

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
            wci = (a * traces.nan_to_num().clamp_min(0)).sqrt()
            values |= {f"curvature/trace/{name}": v for name, v in zip(self.layers, traces.tolist(), strict=True)}
            values |= {f"wci/{name}": v for name, v in zip(self.layers, wci.tolist(), strict=True)}
            values["wci/total"] = float(wci.sum())
            record = self._record
            values["curvature/negative"] = float(
                record["num_negative"].sum() / record["num_estimates"].sum().clamp_min(1)
            )
        if self._latest is not None:
            values["relative_size"] = float(self._latest.relative_size)
            if not torch.isnan(self._latest.strength):
                values["lambda"] = float(self._latest.strength)
        return values

    def extra_passes(self) -> tuple[float, float]:
        """Return the mean forward and backward passes a step costs beyond a plain one, at full schedule."""
        if isinstance(self.perturbation, AWP):
            forward, backward, every = 1, 1, self.perturbation.schedule.every
        elif self.perturbation is not None:
            clean = self.perturbation.statistics == "clean" and _has_running_statistics(self.model)
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
        if self.num_micro_batches not in (1, accelerator.gradient_accumulation_steps):
            raise ValueError(
                f"attach: got an optimizer with num_micro_batches={self.num_micro_batches} and an accelerator with "
                f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; expected the same. Set the latter only."
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
        state = self.base.state_dict()
        state["param_groups"][0][_KEY] = dict(self._record)  # a snapshot: later steps must not change it
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or the bare base optimizer's (the running averages then start afresh).

        Raises:
            ValueError: The saved running averages are for other layers.
        """
        record = state_dict["param_groups"][0].get(_KEY)
        if record is not None and record["layers"] != list(self.layers):
            other = sorted(set(record["layers"]) ^ set(self.layers))[:6]
            raise ValueError(
                f"load_state_dict: got running averages of {len(record['layers'])} layers; expected this model's "
                f"{len(self.layers)}. They differ in {', '.join(other) or 'order'}. Was the choice of layers changed?"
            )
        fresh = self._fresh_record()
        self.base.load_state_dict(state_dict)
        like = fresh["trace_sum"]
        self.param_groups[0][_KEY] = {
            key: value.to(like).clone() if isinstance(value, Tensor) else value
            for key, value in (fresh if record is None else record).items()
        }
        self._forget_micro_batches()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_accelerator": None}

    def __repr__(self) -> str:
        return f"RegularizedOptimizer({self.base!r}, perturbation={self.perturbation}, penalty={self.penalty})"


def _spoiled_by(loss: Tensor, other: Tensor | float) -> Tensor:
    """Return ``loss``, or NaN where ``other`` is not finite: a bad perturbed pass must not hide behind a good loss."""
    return loss + 0.0 * other


def _nan_where_missing(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Return zeros [L], NaN for the layers without gradient."""
    return torch.tensor([torch.nan if g is None else 0.0 for g in gradients], device=like.device)


def _has_running_statistics(model: nn.Module) -> bool:
    """Tell whether a forward pass in train mode moves anything."""
    return any(getattr(m, "running_mean", None) is not None for m in model.modules())
