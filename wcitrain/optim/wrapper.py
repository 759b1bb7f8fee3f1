"""The optimizer wrapper: all regularisation happens in ``backward``, all stepping in ``step``.

Legend: W layer weights, u perturbation, L the loss at fixed adversarial examples, g its gradient, t_l = Tr(H_l).

One call of ``backward(loss_fn)`` leaves the gradients of the regularised objective in ``.grad``, added to what is there
(so micro-batches accumulate and the user clips between ``backward`` and ``step``):

| rule active at this step   | what lands in `.grad`                            | passes (forward, backward)  |
|----------------------------|--------------------------------------------------|-----------------------------|
| none                       | g(W)                                             | 1, 1                        |
| `AWP`                      | g(W + u), u along g(W)                           | 2, 2                        |
| `WCIPosterior`, `UniformNoise` | ½ [g(W + u) + g(W − u)]                      | 2, 2 (3, 2 with clean statistics) |
| a penalty with curvature   | g(W) + ∇ Σ c_l t_l + 2 ∂φ/∂a W                   | by estimator, `penalty_steps` |
| `FrobeniusTracePenalty` without | g(W) + 2 λ_F W                              | 1, 1                        |

Contracts: the wrapper owns no parameter group and no state of the base optimizer. With every strength at zero it *is* the
base optimizer, bit for bit. Perturbed weights come back by copy from a clone, also on exceptions. The passes of one call see
the same random numbers (dropout) and running statistics move once: in the pass at W where there is one, else at W − u.
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wcitrain.curvature.loss import LossFn
from wcitrain.curvature.top_layer import find_head
from wcitrain.optim import record
from wcitrain.optim.attaching import check_attachable
from wcitrain.optim.choice import Choice, choose_estimator
from wcitrain.optim.delegating import DelegatingOptimizer
from wcitrain.optim.passes import Passes
from wcitrain.optim.penalty import Penalty
from wcitrain.optim.penalty_steps import penalized
from wcitrain.optim.perturbation import AWP, Posterior, WeightPerturbation
from wcitrain.optim.perturbed_steps import Step, adversarial, antithetic, has_running_statistics
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
        perturbation: ``AWP``, ``WCIPosterior`` or ``UniformNoise``.
        penalty: ``WCIPenalty`` or ``FrobeniusTracePenalty``.
        layers, split_qkv: Which tensors are layers, see ``params.select_layers``; with the estimator ``top_layer`` the head alone.
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
        split_qkv: bool = False,
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
        if penalty is not None and penalty.measures_curvature and penalty.estimator == "top_layer":
            self.layers = _head_layer(model, layers).only(optimized)
        else:
            self.layers = select_layers(model, layers, split_qkv=split_qkv).only(optimized)
        if not self.layers:
            raise ValueError("layers: none of the selected tensors is in the optimizer's groups. Is it the same model?")
        self._accelerator: Accelerator | None = None
        self._micro_step = 0  # backward calls since the last step
        self._pending: list[Tensor] = []  # their trace estimates, each [L]
        self._latest: Posterior | None = None
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
            if perturbation and factor:
                with passes.undone_on_error():
                    if isinstance(perturbation, AWP):
                        step = adversarial(passes, perturbation, factor)
                    else:
                        step = antithetic(passes, perturbation, factor, self.traces())
            elif penalty and penalty_factor and penalty.measures_curvature:
                assert self._choice is not None
                with passes.undone_on_error():
                    step = penalized(passes, penalty, self._choice.estimator, penalty_factor, self.traces())
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
        if step.posterior is not None:
            self._latest = step.posterior
        self._micro_step += 1
        return step.loss

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
            estimate = torch.stack(self._pending).mean(0)
            if self._accelerator is not None and self._accelerator.num_processes > 1:
                estimate = self._accelerator.reduce(estimate, reduction="mean")
            record.fold(self._record, estimate, self.trace_decay)
        self._record["step"] += 1
        self._forget_micro_batches()

    def _forget_micro_batches(self) -> None:
        self._pending, self._micro_step = [], 0

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

        ``relative_size`` and ``lambda`` of the latest posterior step; for every layer ``frobenius/<layer>`` (a_l), and once
        measured ``curvature/trace/<layer>`` (running average of t_l) and ``wci/<layer>`` = sqrt(a_l max(t_l, 0)); their sum
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
            values["relative_size"] = float(self._latest.relative_size)
            if not torch.isnan(self._latest.strength):
                values["lambda"] = float(self._latest.strength)
        return values

    def extra_passes(self) -> tuple[float, float]:
        """Return the mean forward and backward passes a step costs beyond a plain one, at full schedule."""
        if isinstance(self.perturbation, AWP):
            forward, backward, every = 1, 1, self.perturbation.schedule.every
        elif self.perturbation is not None:
            clean = self.perturbation.statistics == "clean" and has_running_statistics(self.model)
            forward, backward, every = 1 + clean, 1, self.perturbation.schedule.every
        elif self.penalty is not None and self.penalty.measures_curvature:
            (forward, backward), every = self._penalty_passes(), self.penalty.schedule.every
        else:
            forward, backward, every = 0, 0, 1
        return forward / every, backward / every

    def _penalty_passes(self) -> tuple[int, int]:
        """Return the extra passes of the estimator; a differentiated backward counts as two (`penalty_steps`)."""
        assert self.penalty is not None
        estimator = self._choice.estimator if self._choice else self.penalty.estimator
        probes, is_active = self.penalty.num_probes, self.penalty.trace_strength > 0
        if estimator == "top_layer":
            return 0, 0
        if estimator == "gauss_newton":
            return 0, 3 * probes if is_active else probes
        if estimator == "hutchinson" and not is_active:
            return 0, 1 + 2 * probes
        if estimator == "hutchinson":
            return (2 * probes, 6 * probes) if self.penalty.gradient == "finite_difference" else (0, 8 * probes)
        return 2 * probes, 2 * probes  # two_point; "auto" before its dry run

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
        self.param_groups[0][record.KEY] = {
            key: value.to(like).clone() if isinstance(value, Tensor) else value
            for key, value in (fresh if saved is None else saved).items()
        }
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
