"""The optimizer wrapper: all regularisation happens in ``backward``, all stepping in ``step``.

Legend: W layer weights, u perturbation, L the loss at fixed adversarial examples, g its gradient, t_l = Tr(H_l).

One call of ``backward(loss_fn)`` leaves the gradients of the regularised objective in ``.grad``, added to what is there
(so micro-batches accumulate and the user clips between ``backward`` and ``step``):

| rule active at this step   | what lands in `.grad`                            | passes (forward, backward)  |
|----------------------------|--------------------------------------------------|-----------------------------|
| none                       | g(W)                                             | 1, 1                        |
| a weight perturbation      | g(W + u), ½ [g(W + u) + g(W − u)], ...           | by rule, `ascent` and `perturbation` |
| a penalty with curvature   | g(W) + ∇ Σ c_l t_l + 2 ∂φ/∂a W                   | by estimator, `penalty_steps` |
| a penalty on norms alone   | g(W) + 2 λ_F W                                   | 1, 1                        |

A perturbation whose gradient is taken at W + u alone (SAM, AWP, ...) composes with a Gauss–Newton penalty, which is then the
penalty at W + u; one with a norm penalty always does. All others are refused (`composition`).

Contracts: the wrapper owns no parameter group and no state of the base optimizer. With every strength at zero it *is* the
base optimizer, bit for bit. Perturbed weights come back by copy from a clone, also on exceptions. The passes of one call see
the same random numbers (dropout) and running statistics move once: in the pass at W where there is one, else in the last.
"""

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wcitrain.curvature.loss import LossFn
from wcitrain.curvature.top_layer import find_head
from wcitrain.optim import record
from wcitrain.optim.attaching import check_attachable
from wcitrain.optim.choice import Choice, choose_estimator
from wcitrain.optim.composition import refuse_what_does_not_compose
from wcitrain.optim.delegating import DelegatingOptimizer
from wcitrain.optim.passes import Passes
from wcitrain.optim.penalty import Penalty
from wcitrain.optim.penalty_steps import extra_passes as penalty_passes
from wcitrain.optim.penalty_steps import penalized
from wcitrain.optim.perturbation import WeightPerturbation
from wcitrain.optim.perturbed_steps import Step, perturbed_step
from wcitrain.optim.perturbed_steps import extra_passes as perturbation_passes
from wcitrain.params import Layers, select_layers

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        perturbation: A rule of ``ascent`` (SAM, ASAM, AWP, GSAM, VaSSO, ...) or ``perturbation`` (WCIPosterior, noise).
        penalty: ``WCIPenalty`` or ``FrobeniusTracePenalty``.
        layers, split_qkv: Which tensors are layers, see ``params.select_layers``; None: what the rule is published for
            (``"all"`` for SAM's family, else ``"weights"``). With the estimator ``top_layer`` the head alone.
        trace_decay: Decay of the running average of t_l, in [0, 1); its start-up bias is corrected.
        num_micro_batches: ``backward`` calls per ``step``; each contributes 1/num_micro_batches.
        seed: Of the random directions: they depend on (seed, step, micro-batch, rank) and nothing else.

    Raises:
        ValueError: A perturbation and a penalty that do not compose; no layers; a parameter outside the given ranges.
        TypeError: ``base`` is not a ``torch.optim.Optimizer`` instance.
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
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        if perturbation is not None and penalty is not None:
            refuse_what_does_not_compose(perturbation, penalty)
            if layers is None and perturbation.default_layers != "weights":
                raise ValueError(
                    f"layers: got None with {perturbation}, which is published for all tensors, and a penalty, which is defined on "
                    "weight matrices; expected the layers of both. Set layers to 'weights' or 'all'."
                )
        layers = layers or (perturbation.default_layers if perturbation is not None else "weights")
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
        if penalty is not None and penalty.measures_curvature and penalty.estimator == "top_layer":
            self.layers = _head_layer(model, layers).only(optimized)
        else:
            self.layers = select_layers(model, layers, split_qkv=split_qkv).only(optimized)
        if not self.layers:
            raise ValueError("layers: none of the selected tensors is in the optimizer's groups. Is it the same model?")
        self._accelerator: Accelerator | None = None
        self._micro_step = 0  # backward calls since the last step
        self._pending: list[Tensor] = []  # their trace estimates, each [L]
        self._memory_sum: list[Tensor] | None = None  # the sum of their smoothed gradients (VaSSO)
        self._latest: tuple[Tensor, Tensor | None] | None = None  # relative size and λ
        self._choice: Choice | None = None
        self._is_busy = False
        low = [n for n, p in self.layers.items() if p.dtype.itemsize < 4]
        takes_differences = penalty is not None and penalty.estimator in ("auto", "two_point", "hutchinson")
        if low and takes_differences and penalty is not None and penalty.measures_curvature:
            raise ValueError(
                f"penalty: got {self.layers[low[0]].dtype} weights in {low[0]}; expected float32 or float64: differences of "
                "low-precision gradients are noise. Keep float32 weights and use autocast, or use WCIPosterior."
            )
        if base.param_groups[0].get(record.KEY, {}).get("layers") != list(self.layers):
            base.param_groups[0][record.KEY] = record.fresh_record(self.layers)

    # ---- the two calls -----------------------------------------------------------------------------------------------

    def backward(self, loss_fn: LossFn) -> Tensor:
        """Add the gradients of the regularised objective at one micro-batch to ``.grad``.

        Args:
            loss_fn: Returns the scalar mean loss at fixed adversarial examples, with graph, or a `Loss` that carries its
                outputs too (``wcitrain.cross_entropy``; every objective's loss), which gauss_newton and top_layer need.
                Called once or several times.

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
        self._refuse_what_is_silently_wrong()
        perturbation, penalty, now = self.perturbation, self.penalty, self._record["step"]
        factor = perturbation.schedule.factor(now) if perturbation else 0.0
        penalty_factor = penalty.schedule.factor(now) * penalty.schedule.every if penalty else 0.0
        if penalty and penalty_factor and penalty.measures_curvature and self._choice is None:
            choice = self.choose_estimator(loss_fn)
            if choice and penalty.estimator == "auto" and choice.estimator == "two_point":
                warnings.warn(f"penalty estimator: two_point, since {choice.reason}", UserWarning, stacklevel=2)
        passes = self._passes(loss_fn)
        self._is_busy = True
        try:
            is_penalized = bool(penalty and penalty_factor and penalty.measures_curvature)
            with_penalty = (
                partial(self._penalized, passes, penalty_factor, self.layers.squared_norms()) if is_penalized else None
            )
            if perturbation and factor:
                with passes.undone_on_error():
                    memory = self._record.get("memory")
                    step = perturbed_step(passes, perturbation, factor, self.traces(), memory, with_penalty)
            elif with_penalty is not None:
                with passes.undone_on_error():
                    step = with_penalty()
            else:
                step = Step(passes.plain())
            if penalty and penalty_factor:
                coefficients = penalty.norm_coefficients(
                    self.layers.squared_norms(), self.layers.sizes(), self.traces()
                )
                passes.add_norm_gradients(coefficients, penalty_factor)
        finally:
            self._is_busy = False
        if step.traces is not None:
            self._pending.append(step.traces)
        if step.memory is not None:
            total = self._memory_sum
            self._memory_sum = step.memory if total is None else list(torch._foreach_add(total, step.memory))
        if step.relative_size is not None:
            self._latest = step.relative_size, step.strength
        self._micro_step += 1
        return step.loss

    def _penalized(self, passes: Passes, factor: float, a: Tensor) -> Step:
        """Make the penalty's pass where the weights are now; ``a`` are the squared norms at W."""
        assert self.penalty is not None
        assert self._choice is not None
        return penalized(passes, self.penalty, self._choice.estimator, factor, self.traces(), a)

    def choose_estimator(self, loss_fn: LossFn) -> Choice | None:
        """Decide how the penalty's traces are estimated, by a dry run on one batch; the first ``backward`` calls it too.

        Returns:
            The estimator and the reason in a sentence; None without a curvature penalty.

        Raises:
            ValueError: The penalty's explicit estimator is impossible with this model or loss; names the modules.
        """
        if self.penalty is None or not self.penalty.measures_curvature:
            return None
        self._is_busy = True
        try:
            choice = choose_estimator(self._passes(loss_fn), self.penalty, self.penalty.trace_strength)
        finally:
            self._is_busy = False
        if self._accelerator is not None and self._accelerator.num_processes > 1:  # all alike
            is_fallback = torch.tensor(float(choice.estimator == "two_point"), device=self.layers.tensors[0].device)
            if float(self._accelerator.reduce(is_fallback, reduction="sum")) and choice.estimator != "two_point":
                choice = Choice("two_point", "the dry run failed on another process")
        if self.perturbation is not None and choice.estimator != "gauss_newton":
            raise ValueError(
                f"penalty.estimator: got {choice.estimator} ({choice.reason}) beside {self.perturbation}; expected gauss_newton, "
                "the one that moves no weights. Make it possible, or leave one of the two out."
            )
        self._choice = choice
        return choice

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

    # ---- norms, traces, record -----------------------------------------------------------------------------------------

    @property
    def _record(self) -> dict[str, Any]:
        """The wrapper's numbers, kept in the base optimizer's first group: they survive every checkpoint path."""
        return self.param_groups[0][record.KEY]

    def traces(self) -> Tensor | None:
        """Return the bias-corrected running averages of t_l [L], NaN for a layer not measured yet; None before any."""
        return record.averages(self._record)

    def _fold_estimates(self) -> None:
        """Average the step's estimates over micro-batches and processes, and fold them into the running averages."""
        if self._pending:
            record.fold(self._record, self._averaged(torch.stack(self._pending).mean(0)), self.trace_decay)
        if self._memory_sum is not None:
            self._record["memory"] = [self._averaged(total / self._micro_step) for total in self._memory_sum]
        self._record["step"] += 1
        self._forget_micro_batches()

    def _averaged(self, value: Tensor) -> Tensor:
        """Return the mean over processes."""
        if self._accelerator is not None and self._accelerator.num_processes > 1:
            return self._accelerator.reduce(value, reduction="mean")
        return value

    def _forget_micro_batches(self) -> None:
        self._pending, self._memory_sum, self._micro_step = [], None, 0

    def _passes(self, loss_fn: LossFn) -> Passes:
        """Return what this micro-batch may do with ``loss_fn``; its random directions go by (seed, step, micro-batch)."""
        accelerator = self._accelerator
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        return Passes(
            self.model,
            self.layers,
            loss_fn,
            parameters=[p for group in self.param_groups for p in group["params"]],
            share=1 / self.num_micro_batches,
            key=(self.seed, self._record["step"], self._micro_step * world + rank),
            accelerator=accelerator,
            use_math_attention=self._choice is not None and self._choice.use_math_attention,
        )

    def _refuse_what_is_silently_wrong(self) -> None:
        """Raise where passes would not be what they seem."""
        if torch.is_autocast_enabled(self.layers.tensors[0].device.type):
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

    def metrics(self) -> dict[str, float]:
        """Return what there is to log, as floats (synchronises with the device).

        ``relative_size`` (||u|| / ||W||) of the latest perturbation or penalty, and the ``lambda`` it amounts to; for every
        layer ``frobenius/<layer>`` (a_l), and once measured ``curvature/trace/<layer>`` (running average of t_l) and
        ``wci/<layer>`` = sqrt(a_l max(t_l, 0)); their sum
        ``wci/total``; ``curvature/negative`` the share of single-step estimates below zero.
        """
        a, traces = self.layers.squared_norms(), self.traces()
        values = {f"frobenius/{name}": v for name, v in zip(self.layers, a.tolist(), strict=True)}
        if traces is not None:
            wci = (a * traces.nan_to_num().clamp_min(0)).sqrt()
            values |= {f"curvature/trace/{name}": v for name, v in zip(self.layers, traces.tolist(), strict=True)}
            values |= {f"wci/{name}": v for name, v in zip(self.layers, wci.tolist(), strict=True)}
            values["wci/total"] = float(wci.sum())
            numbers = self._record
            values["curvature/negative"] = float(
                numbers["num_negative"].sum() / numbers["num_estimates"].sum().clamp_min(1)
            )
        if self._latest is not None:
            size, strength = self._latest
            values["relative_size"] = float(size)
            if strength is not None and not torch.isnan(strength):
                values["lambda"] = float(strength)
        return values

    def extra_passes(self) -> tuple[float, float]:
        """Return the mean forward and backward passes a step costs beyond a plain one, at full schedule."""
        forward = backward = 0.0
        if self.perturbation is not None:
            extra, every = perturbation_passes(self.perturbation, self.model), self.perturbation.schedule.every
            forward, backward = forward + extra[0] / every, backward + extra[1] / every
        if self.penalty is not None and self.penalty.measures_curvature:
            estimator = self._choice.estimator if self._choice else self.penalty.estimator
            extra, every = penalty_passes(self.penalty, estimator), self.penalty.schedule.every
            forward, backward = forward + extra[0] / every, backward + extra[1] / every
        return forward, backward

    # ---- Accelerate ------------------------------------------------------------------------------------------------

    def attach(self, accelerator: "Accelerator", model: nn.Module) -> "RegularizedOptimizer":
        """Wire the wrapper to a prepared model: local passes under ``no_sync``, one reduction, float32 differences.

        Call it after ``accelerator.prepare`` on the wrapper itself (``prepare`` returns an ``AcceleratedOptimizer`` around
        it), with the prepared model.

        Raises:
            ValueError: See ``attaching.check_attachable``.
        """
        check_attachable(accelerator, model, self.penalty, self.num_micro_batches)
        self._accelerator, self.model, self._choice = accelerator, model, None
        self.num_micro_batches = accelerator.gradient_accumulation_steps
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; the wrapper's few numbers are in its first group."""
        if self._is_busy:
            raise RuntimeError(
                "RegularizedOptimizer.state_dict: called inside loss_fn, while the weights are perturbed."
            )
        state = self.base.state_dict()
        state["param_groups"][0][record.KEY] = dict(self._record)  # a snapshot: later steps must not change it
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or the bare base optimizer's (the running averages then start afresh).

        Raises:
            ValueError: The saved running averages are for other layers.
        """
        saved = state_dict["param_groups"][0].get(record.KEY)
        if saved is not None:
            record.refuse_other_layers(saved, self.layers)
        fresh = record.fresh_record(self.layers)
        self.base.load_state_dict(state_dict)
        like = fresh["trace_sum"]
        loaded = {k: v.to(like).clone() if isinstance(v, Tensor) else v for k, v in (saved or fresh).items()}
        if "memory" in loaded:
            loaded["memory"] = [m.to(t).clone() for m, t in zip(loaded["memory"], self.layers.tensors, strict=True)]
        self.param_groups[0][record.KEY] = loaded
        self._forget_micro_batches()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_accelerator": None}

    def __repr__(self) -> str:
        return f"RegularizedOptimizer({self.base!r}, perturbation={self.perturbation}, penalty={self.penalty})"


def _head_layer(model: nn.Module, layers: str) -> Layers:
    """Return the head's weight as the only layer."""
    if layers != "weights":
        raise ValueError(
            f"layers: got {layers!r} with estimator 'top_layer', whose only layer is the head's weight; expected 'weights'. "
            "Leave it out."
        )
    name, head = find_head(model)
    return Layers({f"{name}.weight".removeprefix("."): head.weight})
