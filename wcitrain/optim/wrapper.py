"""The optimizer wrapper: all regularisation happens in ``backward``, all stepping in ``step``.

One call of ``backward(loss_fn)`` adds the gradients of the regularised objective to ``.grad``: g(W); under a
weight perturbation g(W + u), ½ [g(W + u) + g(W − u)], ...; with a penalty in addition ∇ Σ c_l t_l + 2 ∂φ/∂a
W, beside a perturbation with the curvature at W + u; `refusals` says which two go together.

The wrapper owns no parameter group and no state of the base optimizer. With every strength at zero it *is*
the base optimizer, bit for bit. Perturbed weights come back by copy from a clone, also on exceptions. The
passes of one call see the same random numbers (dropout); running statistics move once.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from wcitrain.optim import record, refusals
from wcitrain.optim.delegating import DelegatingOptimizer
from wcitrain.optim.penalty import Penalty
from wcitrain.optim.perturbation import State, WeightPerturbation


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

    Raises:
        ValueError: A perturbation and a penalty that do not compose; no layers; a number out of its range.
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
        super().__init__(base)
        refusals.refuse_what_does_not_compose(perturbation, penalty)
        layers = layers or refusals.default_layers(perturbation, penalty)
        if not 0 <= trace_decay < 1 or num_micro_batches < 1:
            got = f"got trace_decay={trace_decay}, num_micro_batches={num_micro_batches}"
            raise ValueError(f"{got}; expected 0 <= trace_decay < 1 and num_micro_batches >= 1.")
        self.model, self.perturbation, self.penalty = model, perturbation, penalty
        self.trace_decay, self.seed = trace_decay, seed
        self.num_micro_batches, self.steps_per_epoch = num_micro_batches, steps_per_epoch
        optimized = {id(p) for group in base.param_groups for p in group["params"]}
        estimator = (penalty and penalty.estimator) or Auto()
        self.layers = estimator.layers(model, layers, split_qkv=split_qkv).only(optimized)
        if not self.layers:
            text = "layers: none of the selected tensors is in the optimizer. Is it the same model?"
            raise ValueError(text)
        refusals.refuse_low_precision(self.layers, penalty)
        self._accelerator: Accelerator | None = None
        self._micro_step = 0  # backward calls since the last step
        self._pending: list[Tensor] = []  # their trace estimates, each [L]
        self._memory_sum: list[Tensor] | None = None  # the sum of their smoothed gradients (VaSSO)
        self._choice: Choice | None = None
        self._is_busy = False
        if base.param_groups[0].get(record.KEY, {}).get("layers") != list(self.layers):
            base.param_groups[0][record.KEY] = record.fresh(self.layers)

    def backward(self, loss_fn: LossFn) -> Tensor:
        """Add the gradients of the regularised objective at one micro-batch to ``.grad``.

        ``loss_fn`` returns the scalar mean loss with its graph, or a `Loss` that carries its outputs too,
        which gauss_newton and top_layer need. Returns the loss at W, detached; where no pass is made at W,
        the mean of those at the perturbed weights.

        Raises:
            TypeError: ``loss_fn`` does not return a scalar tensor with a graph.
            RuntimeError: ``loss_fn`` changes gradients; autocast around the call; processes not attached.
        """
        self._refuse_inside_loss_fn("backward", "Return the loss instead.")
        refusals.refuse_stale_weights(self.layers.tensors[0], self._accelerator is not None)
        perturbation, penalty = self.perturbation, self.penalty
        now = self._record["step"], self.steps_per_epoch
        factor = perturbation.schedule.factor(*now) if perturbation else 0.0
        penalty_factor = penalty.schedule.factor(*now) * penalty.schedule.every if penalty else 0.0
        if penalty_factor and self._choice is None:
            self.choose_estimator(loss_fn)
        passes, penalized = self._passes(loss_fn), None
        with self._busy():
            if penalty and penalty_factor and self._choice:
                known = penalty_factor, self.traces(), self.layers.squared_norms()
                penalized = partial(penalty.add_gradient, passes, self._choice.estimator, *known)
            acts = perturbation and factor
            with passes.undone_on_error() if acts or penalized else nullcontext():
                if perturbation and acts:
                    state = State(self.traces(), self._record.get("memory"))
                    step = perturbation.gradient(passes, state, factor, penalized)
                else:
                    step = penalized() if penalized else Step(passes.plain())
            if penalty and penalty_factor:
                coefficients = penalty.norm_coefficients(self.layers.squared_norms(), self.traces())
                passes.add_norm_gradients(coefficients, penalty_factor)
        if step.traces is not None:
            self._pending.append(step.traces)
        if step.memory is not None:
            total = self._memory_sum
            self._memory_sum = step.memory if total is None else list(torch._foreach_add(total, step.memory))
        if step.relative_size is not None:
            self._record["relative_size"] = step.relative_size
            self._record.pop("lambda", None)  # of an earlier step
            if step.strength is not None:
                self._record["lambda"] = step.strength
        self._micro_step += 1
        return step.loss

    def step(self, closure: LossFn | None = None) -> Any:  # type: ignore[override]
        """Step the base optimizer on what is in ``.grad``, and fold in the step's trace estimates.

        With a closure: ``zero_grad``, ``backward(closure)``, step, and return the loss. The closure returns
        the differentiable loss and does *not* call ``backward``.
        """
        if closure is not None:
            if self._accelerator is not None or self.num_micro_batches > 1:
                got = "got a closure under Accelerate or with several micro-batches; expected none"
                text = f"RegularizedOptimizer.step: {got}. Call backward(loss_fn) in each, then step()."
                raise RuntimeError(text)
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
        self._refuse_inside_loss_fn("zero_grad", "Call it before backward, or let step(closure) do so.")
        self.base.zero_grad(set_to_none=set_to_none)
        self._forget_micro_batches()

    def choose_estimator(self, loss_fn: LossFn) -> Choice | None:
        """Decide by a dry run on one batch how traces are estimated, if at all; else ``backward`` does so.

        ValueError where the estimator is impossible with this model or loss, here or on another process.
        """
        if self.penalty is None or self.penalty.estimator is None:
            return None
        refusal = choice = None
        wanted, passes = self.penalty.estimator, self._passes(loss_fn)
        needs_gradient, may_move_weights = self.penalty.trace_strength > 0, self.perturbation is None
        try:
            with self._busy():
                choice = choose(
                    wanted, passes, needs_gradient=needs_gradient, may_move_weights=may_move_weights
                )
        except ValueError as error:
            refusal = ValueError(f"penalty.{error}")
        if self._world > 1:
            names = gather_object([choice and name_of(choice.estimator)])
            if refusal is None and len(set(names)) > 1:
                text = f"penalty.estimator: got {names} on the processes; expected one."
                refusal = ValueError(f"{text} Name one that all allow.")
        if refusal is not None:
            raise refusal
        self._choice = choice
        return choice

    def traces(self) -> Tensor | None:
        """Return the running averages of t_l [L], NaN for a layer without an estimate; None before any."""
        return record.averages(self._record)

    def metrics(self) -> dict[str, float]:
        """Return what there is to log, as floats (synchronises with the device).

        ``relative_size`` (||u|| / ||W||) and ``lambda``, the latest; a layer's ``frobenius/`` (a_l) and, once
        measured, ``curvature/trace/`` (average of t_l) and ``wci/`` = sqrt(a_l max(t_l, 0)), their sum
        ``wci/total``; ``curvature/negative``, the share of single-step estimates below zero.
        """
        return record.metrics(self._record, self.layers)

    def extra_passes(self) -> tuple[float, float]:
        """Return the mean forward and backward passes a step costs beyond a plain one, at full schedule."""
        forward = backward = 0.0
        if rule := self.perturbation:
            extra, every = rule.extra_passes(self.model), rule.schedule.every
            forward, backward = extra[0] / every, extra[1] / every
        if (penalty := self.penalty) and penalty.estimator:
            estimator = self._choice.estimator if self._choice else penalty.estimator
            extra, every = estimator.extra_passes(penalty.trace_strength > 0), penalty.schedule.every
            forward, backward = forward + extra[0] / every, backward + extra[1] / every
        return forward, backward

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
        )

    def _averaged(self, value: Tensor) -> Tensor:
        """Return the mean over processes."""
        return reduce(value, reduction="mean") if self._world > 1 else value

    def _forget_micro_batches(self) -> None:
        self._pending, self._memory_sum, self._micro_step = [], None, 0

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Evaluate ``loss_fn`` inside, which must not call the optimizer."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    def _refuse_inside_loss_fn(self, name: str, advice: str) -> None:
        """Raise RuntimeError where ``loss_fn``, called at perturbed weights, calls method ``name``."""
        if self._is_busy:
            raise RuntimeError(f"RegularizedOptimizer.{name}: called inside loss_fn. {advice}")

    def attach(self, accelerator: Accelerator, model: nn.Module) -> "RegularizedOptimizer":
        """Let all passes but the last run without reducing gradients, and penalties in float32.

        Call it on the wrapper itself, not on what ``prepare`` made of it, with the prepared model. ValueError
        for what `refusals.check_attachable` lists: fp16, sharded models, ...
        """
        refusals.check_attachable(accelerator, model, self.penalty, self.num_micro_batches)
        self._accelerator, self.model, self._choice = accelerator, model, None
        self.num_micro_batches = accelerator.gradient_accumulation_steps
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; the wrapper's few numbers are in its first group."""
        self._refuse_inside_loss_fn("state_dict", "Save between steps: the weights are perturbed here.")
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

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_accelerator": None}

    def __repr__(self) -> str:
        rules = f"perturbation={self.perturbation}, penalty={self.penalty}"
        return f"{type(self).__name__}({self.base!r}, {rules})"
