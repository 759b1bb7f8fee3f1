"""The optimizer wrapper: all regularisation happens in ``backward``, all stepping in ``step``.

One call of ``backward(loss_fn)`` adds the gradients of the regularised objective to ``.grad``: g(W); under a
weight perturbation g(W + u), ½ [g(W + u) + g(W − u)], ...; with a penalty in addition ∇ Σ c_l t_l + 2 ∂φ/∂a
W, beside a perturbation with the curvature at W + u; `penalty` says which two go together.

Groups and state are the base optimizer's own: with every strength at zero it is this one, bit for bit. All
passes of a call see the same random numbers (dropout); running statistics move once.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.optim import Optimizer

from wcitrain.curvature.estimators import Auto, Choice, choose, name_of
from wcitrain.curvature.loss import LossFn
from wcitrain.curvature.passes import Passes, Step
from wcitrain.optim import record
from wcitrain.optim.delegating import DelegatingOptimizer
from wcitrain.optim.penalty import Penalty, layers_for
from wcitrain.optim.perturbation import WeightPerturbation
from wcitrain.params import is_compiled


class RegularizedOptimizer(DelegatingOptimizer):
    """Any torch optimizer, with a weight perturbation and/or a penalty in the gradient it steps on.

    >>> from wcitrain import WCIPosterior, cross_entropy
    >>> model, x_adv, y = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
    >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> optimizer = RegularizedOptimizer(base, model, perturbation=WCIPosterior(1.0))
    >>> loss = optimizer.step(lambda: cross_entropy(model(x_adv), y))  # at fixed adversarial images
    >>> optimizer.extra_passes()
    (1.0, 1.0)

    The function is called several times and calls neither ``backward`` nor ``zero_grad``. With accumulation,
    clipping or Accelerate: ``backward(loss_fn)`` once a micro-batch, then ``step()`` and ``zero_grad()``.

    Args:
        base: The optimizer that steps and keeps groups and state; schedulers may be given either.
        model: The module whose layers are perturbed and whose buffers are protected in the extra passes.
        layers, split_qkv: See ``params.select_layers``; None: what the rule is published for.
        trace_decay: Decay of the running average of t_l, in [0, 1).
        num_micro_batches: ``backward`` calls per ``step``; each contributes 1/num_micro_batches.
        steps_per_epoch: Optimizer steps of an epoch, which the rules' schedules count; 1: they count steps.
        seed: Of the random directions: they depend on (seed, step, micro-batch, rank) and nothing else.
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        *,
        perturbation: WeightPerturbation | None = None,
        penalty: Penalty | None = None,
        layers: str | None = None,
        split_qkv: bool = False,
        trace_decay: float = 0.9,
        num_micro_batches: int = 1,
        steps_per_epoch: int = 1,
        seed: int = 0,
    ) -> None:
        if not 0 <= trace_decay < 1 or num_micro_batches < 1:
            got = f"got trace_decay={trace_decay}, num_micro_batches={num_micro_batches}"
            raise ValueError(f"{got}; expected 0 <= trace_decay < 1 and num_micro_batches >= 1.")
        layers = layers_for(perturbation, penalty, layers)
        super().__init__(base)
        self.model, self.perturbation, self.penalty = model, perturbation, penalty
        self.trace_decay, self.seed = trace_decay, seed
        self.num_micro_batches, self.steps_per_epoch = num_micro_batches, steps_per_epoch
        optimized = {id(p) for group in base.param_groups for p in group["params"]}
        estimator = (penalty and penalty.estimator) or Auto()
        self.layers = estimator.layers(model, layers, split_qkv=split_qkv).only(optimized)
        if not self.layers:
            raise ValueError(
                "layers: none of the selected tensors is in the optimizer. Is it the same model?"
            )
        low = next((p.dtype for p in self.layers.tensors if p.dtype.itemsize < 4), None)
        if low and penalty and penalty.estimator and estimator.moves_weights:
            rule = "float32 or float64: differences of low-precision gradients are noise. Use WCIPosterior."
            raise ValueError(f"penalty: got {low} weights; expected {rule}")
        self._accelerator: Accelerator | None = None
        self._micro_step = 0  # backward calls since the last step
        self._pending: list[Tensor] = []  # their trace estimates, each [L]
        self._memory_sum: list[Tensor] | None = None  # the sum of their smoothed gradients (VaSSO)
        self._choice: Choice | None = None
        if self.param_groups[0].get(record.KEY, {}).get("layers") != list(self.layers):
            self.param_groups[0][record.KEY] = record.fresh(self.layers)  # else it was loaded before

    def backward(self, loss_fn: LossFn) -> Tensor:
        """Add the gradients of the regularised objective at one micro-batch to ``.grad``.

        ``loss_fn`` returns the scalar mean loss with its graph, or a `Loss` that carries its outputs too,
        which gauss_newton and top_layer need. Returns the loss at W, detached; where no pass is made at W,
        the mean of those at the perturbed weights. RuntimeError: ``loss_fn`` changes gradients; autocast
        around the call; processes not attached.
        """
        self._refuse_stale_weights()
        perturbation, penalty = self.perturbation, self.penalty
        now = self._record["step"], self.steps_per_epoch
        factor = perturbation.schedule.factor(*now) if perturbation else 0.0
        penalty_factor = penalty.schedule.factor(*now) * penalty.schedule.every if penalty else 0.0
        if penalty_factor and self._choice is None:
            self.choose_estimator(loss_fn)
        passes, penalized = self._passes(loss_fn), None
        if penalty and penalty_factor and self._choice:
            known = self._choice.estimator, penalty_factor, self.layers.squared_norms()
            penalized = partial(penalty.add_gradient, passes, *known)
        acts = perturbation and factor
        with passes.undone() if acts or penalized else nullcontext():
            if perturbation and acts:
                step = perturbation.gradient(passes, factor, penalized)
            else:
                step = penalized() if penalized else Step(passes.plain())
        if penalty and penalty_factor:
            coefficients = penalty.norm_coefficients(self.layers.squared_norms(), passes.traces)
            passes.add_norm_gradients(coefficients, penalty_factor)
        if step.traces is not None:
            self._pending.append(step.traces)
        if step.memory is not None:
            total = self._memory_sum
            self._memory_sum = step.memory if total is None else list(torch._foreach_add(total, step.memory))
        if step.relative_size is not None:
            self._record.update({"relative_size": step.relative_size, "lambda": step.strength})
        self._micro_step += 1
        return step.loss

    def step(self, closure: LossFn | None = None) -> Any:  # type: ignore[override]
        """Step the base optimizer on what is in ``.grad``, and fold in the step's trace estimates.

        With a closure: ``zero_grad``, ``backward(closure)``, step, and return the loss. The closure returns
        the differentiable loss and does *not* call ``backward``. RuntimeError for a closure under Accelerate
        or with several micro-batches.
        """
        if closure is not None:
            if self._accelerator is not None or self.num_micro_batches > 1:
                got = "got a closure under Accelerate or with several micro-batches"
                raise RuntimeError(f"RegularizedOptimizer.step: {got}. Call backward(loss_fn) in each.")
            self.zero_grad()
            loss = self.backward(closure)
            self.step()
            return loss
        result = self.base.step()
        if self._pending:
            record.fold(self._record, self._averaged(torch.stack(self._pending).mean(0)), self.trace_decay)
        if self._memory_sum is not None:
            self._record["memory"] = [self._averaged(total / self._micro_step) for total in self._memory_sum]
        self._record["step"] += 1
        self._forget_micro_batches()
        if self._world > 1:
            for buffer in self.model.buffers():  # DDP does so before a forward, which an extra pass undoes
                torch.distributed.broadcast(buffer, src=0)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients by the base optimizer's ``zero_grad``, and forget a batch that was skipped."""
        self.base.zero_grad(set_to_none=set_to_none)
        self._forget_micro_batches()

    def choose_estimator(self, loss_fn: LossFn) -> Choice | None:
        """Decide by a dry run on one batch how traces are estimated, if at all; else ``backward`` does so.

        ValueError where no estimator is possible, or processes choose different ones.
        """
        if self.penalty is None or self.penalty.estimator is None:
            return None
        choice = refusal = None
        try:
            needs_gradient = self.penalty.strengths[1] > 0
            choice = choose(self.penalty.estimator, self._passes(loss_fn), needs_gradient=needs_gradient)
        except ValueError as error:
            refusal = ValueError(f"penalty.{error}")
        if self._world > 1:
            names = gather_object([choice and name_of(choice.estimator)])
            if refusal is None and len(set(names)) > 1:
                refusal = ValueError(
                    f"penalty.estimator: got {names} on the processes; expected one. Name it."
                )
        if refusal is not None:
            raise refusal
        self._choice = choice
        return choice

    def traces(self) -> Tensor | None:
        """Return the running averages of t_l [L], NaN for a layer without an estimate; None before any."""
        own = self._record
        return own["trace_sum"] / own["trace_weight"] if own["is_measured"] else None

    def metrics(self) -> dict[str, float]:
        """Return what there is to log, as floats (synchronises with the device).

        ``relative_size`` (||u|| / ||W||) and ``lambda``, the latest; a layer's ``frobenius/`` (a_l) and, once
        measured, ``curvature/trace/`` (average of t_l) and ``wci/`` = sqrt(a_l max(t_l, 0)), their sum
        ``wci/total``; ``curvature/negative``, the share of single-step estimates below zero.
        """
        return record.metrics(self._record, self.layers, self.traces())

    def extra_passes(self) -> tuple[float, float]:
        """Return the mean forward and backward passes a step costs beyond a plain one, at full schedule."""
        extra = [(0, 0, 1)]
        if rule := self.perturbation:
            extra.append((*rule.extra_passes(), rule.schedule.every))
        if (penalty := self.penalty) and penalty.estimator:
            estimator = self._choice.estimator if self._choice else penalty.estimator
            extra.append((*estimator.extra_passes(penalty.strengths[1] > 0), penalty.schedule.every))
        return sum(n / every for n, _, every in extra), sum(n / every for _, n, every in extra)

    def attach(self, accelerator: Accelerator, model: nn.Module) -> "RegularizedOptimizer":
        """Let all passes but the last run without reducing gradients, and penalties in float32.

        Call it on the wrapper itself, not on what ``prepare`` made of it, with the prepared model. ValueError
        for what the passes cannot work with: fp16, FSDP, DeepSpeed, a static graph, a penalty on a model that
        is compiled in bfloat16, other micro-batches than Accelerate's.
        """
        kind, precision = accelerator.distributed_type.value, accelerator.mixed_precision
        parts, mine = accelerator.gradient_accumulation_steps, self.num_micro_batches
        needs_float32 = self.penalty is not None and self.penalty.estimator is not None
        is_low = needs_float32 and precision == "bf16" and any(map(is_compiled, model.modules()))
        rules = [
            (precision in ("no", "bf16"), f"mixed_precision={precision!r}", "'no' or 'bf16'. Use bf16"),
            (kind in ("NO", "MULTI_GPU", "MULTI_CPU"), kind, "one process or DistributedDataParallel"),
            (not getattr(model, "static_graph", False), "a DDP model with static_graph=True", "False"),
            (not is_low, "a compiled bf16 model", "float32, for the penalty's passes"),
            (mine in (1, parts), f"num_micro_batches={mine}", f"{parts}, gradient_accumulation_steps"),
        ]
        for is_fine, got, rule in rules:
            if not is_fine:
                raise ValueError(f"attach: got {got}; expected {rule}.")
        self._accelerator, self.model, self._choice = accelerator, model, None
        self.num_micro_batches = parts
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; the wrapper's few numbers are in its first group."""
        state = self.base.state_dict()
        state["param_groups"][0][record.KEY] = dict(self._record)  # later steps must not change it
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or the bare base optimizer's, which has no running averages."""
        saved = state_dict["param_groups"][0].get(record.KEY)
        own = record.fresh(self.layers) if saved is None else record.loaded(saved, self.layers)
        self.base.load_state_dict(state_dict)
        self.param_groups[0][record.KEY] = own
        self._forget_micro_batches()

    @property
    def _record(self) -> dict[str, Any]:
        return self.param_groups[0][record.KEY]

    @property
    def _world(self) -> int:
        return 1 if self._accelerator is None else self._accelerator.num_processes

    def _passes(self, loss_fn: LossFn) -> Passes:
        """Return what this micro-batch may do with ``loss_fn``."""
        rank = 0 if self._accelerator is None else self._accelerator.process_index
        return Passes(
            self.model,
            self.layers,
            loss_fn,
            parameters=[p for group in self.param_groups for p in group["params"]],
            share=1 / self.num_micro_batches,
            key=(self.seed, self._record["step"], self._micro_step * self._world + rank),
            accelerator=self._accelerator,
            use_math_attention=self._choice is not None and self._choice.use_math_attention,
            traces=self.traces(),
            memory=self._record.get("memory"),
        )

    def _averaged(self, value: Tensor) -> Tensor:
        """Return the mean over processes."""
        return reduce(value, reduction="mean") if self._world > 1 else value

    def _forget_micro_batches(self) -> None:
        self._pending, self._memory_sum, self._micro_step = [], None, 0

    def _refuse_stale_weights(self) -> None:
        """Raise RuntimeError where the passes of ``backward`` would not be what they seem."""
        if torch.is_autocast_enabled(self.layers.tensors[0].device.type):
            got = "called under autocast, whose copies of the weights perturbed passes would use"
            raise RuntimeError(f"RegularizedOptimizer.backward: {got}. Enter autocast inside loss_fn.")
        distributed = torch.distributed
        if self._accelerator is None and distributed.is_initialized() and distributed.get_world_size() > 1:
            got = "called in one of several processes, whose weights would diverge"
            raise RuntimeError(
                f"RegularizedOptimizer.backward: {got}. Call attach(accelerator, model) first."
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_accelerator": None}
