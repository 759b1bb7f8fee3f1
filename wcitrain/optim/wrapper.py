"""The optimizer wrapper: all regularisation happens before ``step``, which steps on what is in ``.grad``.

One call of ``backward(loss_fn)`` adds the gradients of the regularised objective to ``.grad``: g(W); under a
weight perturbation g(W + u), ½ [g(W + u) + g(W − u)], ...; with a penalty in addition ∇ Σ c_l t_l + 2 ∂φ/∂a
W, beside a perturbation with the curvature at W + u; `penalty` says which two go together. For a rule whose
step is one pass at W + u, ``perturbed()`` does the same around any forward and backward.

Groups and state are the base optimizer's own: with every strength at zero it is this one, bit for bit. All
passes of a call see the same random numbers (dropout); running statistics move once.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from wcitrain.curvature.estimators import Auto, Choice, choose, name_of
from wcitrain.curvature.loss import LossFn, as_loss
from wcitrain.curvature.passes import NothingDone, Passes, Step, slopes
from wcitrain.optim import record
from wcitrain.optim.closures import clearing, watched
from wcitrain.optim.delegating import DelegatingOptimizer
from wcitrain.optim.penalty import Penalty, layers_for
from wcitrain.optim.perturbation import Displacement, WeightPerturbation
from wcitrain.optim.refusals import (
    refuse_accelerator,
    refuse_base,
    refuse_scaler,
    refuse_unseen,
    refusing_hidden,
)
from wcitrain.optim.window import Mark, Versions, Window, are_changed, gradient_versions
from wcitrain.params import Layers, precise
from wcitrain.preserve import perturbed


class _Moved(NamedTuple):
    """What ``restore`` needs."""

    stack: ExitStack  # puts W back
    sums: list[Tensor | None]  # of ``slopes``, where the rule takes them
    drawn: Displacement | None  # None: nothing moved, the rule does not act
    before: Versions


@dataclass
class _State:
    """What changes while the wrapper works; one object, for other libraries copy a wrapper's attributes."""

    layers: Layers
    known: list[tuple[int, bool]] = field(default_factory=list)  # parameters and whether they train
    window: Window = field(default_factory=Window)
    choice: Choice | None = None
    accelerator: Accelerator | None = None
    scaler: torch.amp.GradScaler | None = None
    moved: "_Moved | None" = None  # while perturbed
    last_gradient: Mark | None = None  # one that the last step left
    is_inside: bool = False  # a call of the user's function
    has_warned: bool = False
    listens: bool = True  # to torch, which only warns of gradients that are hidden
    silent: set[int] = field(default_factory=set)  # ids of layers that were without a gradient


class RegularizedOptimizer(DelegatingOptimizer):
    """Any torch optimizer, with a weight perturbation and/or a penalty in the gradient it steps on.

    >>> from wcitrain import WCIPosterior, cross_entropy
    >>> model, x_adv, y = nn.Linear(2, 3), torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
    >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> optimizer = RegularizedOptimizer(base, model, perturbation=WCIPosterior(0.5))
    >>> loss = optimizer.step(lambda: cross_entropy(model(x_adv), y))  # at fixed adversarial images
    >>> optimizer.extra_passes()
    (1.0, 1.0)

    The ways in: ``step(closure)``; ``backward(loss_fn)`` once a micro-batch (accumulation, clipping,
    Accelerate), then ``step()`` and ``zero_grad()``; for rules of one pass ``with perturbed():``. A step with
    gradients and none of these raises.

    Args:
        base: The optimizer that steps and keeps groups and state; schedulers may be given either.
        model: The module whose layers are perturbed and whose buffers are protected in the extra passes;
            among several processes the DistributedDataParallel one, or ``attach``. Give the whole one also
            where ``base`` steps a part: parameters of neither get the sum of all passes' gradients.
        layers, split_qkv: See ``params.select_layers``; None: what the rule is published for. What is frozen,
            thawed or added to the base later counts from the next step on. They now hold the W⁰ of
            ``center: initial``, a new head its random values; a loaded state brings its own.
        trace_decay: Decay of the running average of t_l a step, in [0, 1); None: 0.9, with one pass 0.98.
        num_micro_batches: ``backward`` calls per ``step``; each contributes 1/num_micro_batches.
        steps_per_epoch: Optimizer steps of an epoch, which the rules' schedules count; 1: they count steps.
        seed: Of the random directions: they depend on (seed, step, micro-batch, rank) and nothing else.
        scaler: The loop's GradScaler (fp16), or timm's NativeScaler. ``loss_fn`` returns the loss unscaled;
            in ``perturbed`` the loop scales. Penalties on traces, which fp16 cannot hold, are refused.
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
        trace_decay: float | None = None,
        num_micro_batches: int = 1,
        steps_per_epoch: int = 1,
        seed: int = 0,
        scaler: Any = None,
    ) -> None:
        if trace_decay is None:
            trace_decay = 0.98 if perturbation and perturbation.is_paired else 0.9
        if not 0 <= trace_decay < 1 or num_micro_batches < 1:
            got = f"got trace_decay={trace_decay}, num_micro_batches={num_micro_batches}"
            raise ValueError(f"{got}; expected 0 <= trace_decay < 1 and num_micro_batches >= 1.")
        super().__init__(base)
        refuse_base(base, isinstance(base, RegularizedOptimizer))
        self.model, self.perturbation, self.penalty = model, perturbation, penalty
        self.trace_decay, self.seed = trace_decay, seed
        self.num_micro_batches, self.steps_per_epoch = num_micro_batches, steps_per_epoch
        self._choice_of_layers = layers_for(perturbation, penalty, layers), split_qkv
        self._state = _State(Layers({}), scaler=getattr(scaler, "_scaler", scaler))  # timm's holds torch's
        refuse_scaler(self._state.scaler, self.perturbation, self.penalty)
        self._state.layers = self._selected()
        estimator = penalty and penalty.estimator
        low = next((p.dtype for p in self.layers.tensors if p.dtype.itemsize < 4), None)
        if low and estimator and estimator.moves_weights:
            rule = "float32 or float64: differences of low-precision gradients are noise. Use WCIPosterior."
            raise ValueError(f"penalty: got {low} weights; expected {rule}")
        known = self.param_groups[0].get(record.KEY)
        self.param_groups[0][record.KEY] = record.begun(known, self.layers, perturbation, penalty)

    # ---- the ways in ---------------------------------------------------------------------------------------

    def backward(self, loss_fn: LossFn) -> Tensor:
        """Add the gradients of the regularised objective at one micro-batch to ``.grad``.

        ``loss_fn`` returns the scalar mean loss with its graph, or a `Loss` that carries its outputs too,
        which gauss_newton and top_layer need. Returns the loss at W, detached; where no pass is made at W,
        the mean of those at the perturbed weights. RuntimeError: ``loss_fn`` changes gradients; processes
        without DistributedDataParallel.
        """
        return self._regularize(loss_fn)

    def step(self, closure: Any = None) -> Any:
        """Step the base optimizer on what is in ``.grad``, and fold in the step's trace estimates.

        A closure returns the differentiable loss at fixed adversarial images, or clears the gradients and
        calls ``backward`` itself, as closures for torch do: gradients of before are dropped, all passes are
        made, and the loss is returned. An attack in it is repeated in every pass, which is said once.

        RuntimeError: gradients that the rule has not seen, unless the learning rate is zero; fewer
        ``backward`` calls than ``num_micro_batches``; a GradScaler it was not told of; a closure under
        Accelerate, a scaler or several micro-batches.
        """
        state = self._state
        if closure is not None:
            return self._step_with(closure)
        self._refuse_inside("step")
        if vars(self).pop("found_inf", None) is not None:  # see ``_step_supports_amp_scaling``
            vars(self).pop("grad_scale", None)
            rule = "one it knows. Write RegularizedOptimizer(..., scaler=scaler), or call attach"
            raise RuntimeError(f"RegularizedOptimizer.step: got a GradScaler; expected {rule}.")
        if state.moved:
            self.restore()
        done = state.window.micro_steps
        if not done:
            self._refuse_unseen_gradients("step")
            return self.base.step()
        if state.accelerator is None and done % self.num_micro_batches:
            got = f"got a step after {done} of {self.num_micro_batches} micro-batches"
            rule = "all of them: each counts 1/num_micro_batches. Make the rest, or zero_grad()"
            raise RuntimeError(f"RegularizedOptimizer.step: {got}; expected {rule}.")
        result = self.base.step()
        self._finish_step()
        return result

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Put the weights at W + u inside: forward and backward are the user's own; W comes back on exit.

        Once a micro-batch; those of a step share u. Attack inside for images that are adversarial to W + u.
        Without a backward pass inside it does not count, and ``step()`` refuses gradients of a later one.
        Evaluation, checkpoints and averages belong outside. A ``step()`` inside ends it first.

        RuntimeError for what is more than one pass: other rules, penalties.
        """
        self.perturb()
        try:
            yield
        except BaseException:
            if moved := self._state.moved:  # else a step() inside has ended it
                moved.stack.close()
                self._state.moved = None
            raise
        if self._state.moved:
            self.restore()

    def perturb(self) -> None:
        """Enter ``perturbed``, where a callback cannot hold a context open; ``restore`` leaves it."""
        state, rule = self._state, self.perturbation
        self._refuse_inside("perturbed")
        if state.moved:
            raise RuntimeError("RegularizedOptimizer.perturb: called twice. Call restore() in between.")
        if more := self.penalty or (None if rule is None or rule.is_one_pass else rule):
            text = f"got {more}, which is more than one pass; expected a rule such as WCIPosterior(passes=1)"
            raise RuntimeError(f"RegularizedOptimizer.perturbed: {text}. Use backward(loss_fn).")
        if state.window.micro_steps >= self.num_micro_batches > 1:
            got = f"got micro-batch {state.window.micro_steps + 1} of {self.num_micro_batches}"
            raise RuntimeError(f"RegularizedOptimizer.perturbed: {got}. Call step() and zero_grad() first.")
        passes, factor = self._begin(_no_loss), self._factors()[0]
        stack, drawn, sums = ExitStack(), None, list[Tensor | None]()
        stack.enter_context(self._listening(bool(rule and factor)))
        if rule and factor:
            with torch.no_grad():
                drawn = rule.displace(passes, factor)
            stack.enter_context(perturbed(self.layers.tensors, drawn.u))(+1)
            if drawn.sigma is not None:
                sums = stack.enter_context(slopes(self.layers, drawn.u))
        state.moved = _Moved(stack, sums, drawn, gradient_versions(self._parameters))

    def restore(self) -> None:
        """Leave ``perturbed``: W comes back, and the gradients at W + u count."""
        if self._state.moved is None:
            raise RuntimeError("RegularizedOptimizer.restore: got weights at W. Call perturb() first.")
        (stack, sums, drawn, before), self._state.moved = self._state.moved, None
        stack.close()
        if not are_changed(self._parameters, before):
            return  # no backward inside: a later one, at W, would pass for the rule's
        step, scale = Step(torch.zeros(())), self._scale()
        found = self.layers.joined(sums, torch.nan) / (1.0 if scale is None else scale) if sums else None
        self._state.window.count(drawn.noted(step, found) if drawn else step)

    @contextmanager
    def attacking(self) -> Iterator[None]:
        """Put the weights where the rule wants an attack made: at the next pass's W + u, or at W."""
        rule, (factor, _) = self.perturbation, self._factors()
        with ExitStack() as stack:
            if rule and factor and rule.attacks_perturbed and not self._state.moved:
                with torch.no_grad():
                    drawn = rule.displace(self._begin(_no_loss), factor)
                stack.enter_context(perturbed(self.layers.tensors, drawn.u))(+1)
            yield

    # ---- torch's interface ---------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients by the base optimizer's ``zero_grad``, and forget a batch that was skipped.

        Gradients that somebody else set to None are noticed too; zeros in their place are not.
        """
        self.base.zero_grad(set_to_none=set_to_none)
        state = self._state
        if state.moved:  # gradients of an attack: what they were along u is forgotten too
            state.moved.sums[:] = [None] * len(state.moved.sums)
        if not state.is_inside:
            state.window, state.last_gradient = Window(), None

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; the wrapper's few numbers are in its first group."""
        self._refuse_moved("state_dict")
        state = self.base.state_dict()
        state["param_groups"][0][record.KEY] = dict(self._record)  # later steps must not change it
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or the bare base optimizer's, which has no running averages."""
        self._follow()
        own = record.loaded(state_dict["param_groups"][0].get(record.KEY), self._record, self.layers)
        self.base.load_state_dict(state_dict)
        self.param_groups[0][record.KEY] = own
        self._state.window, self._state.last_gradient = Window(), None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch's GradScaler asks: one the wrapper was not told of leaves ``found_inf`` on it.

        It must not ask a fused base, which would get neither.
        """
        return self._state.scaler is None

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_moved("copy or pickle")
        kept = replace(self._state, accelerator=None, moved=None, last_gradient=None)
        return super().__getstate__() | {"_state": kept}

    # ---- what there is to know -----------------------------------------------------------------------------

    @property
    def layers(self) -> Layers:
        """The tensors that are perturbed and measured now."""
        return self._state.layers

    def choose_estimator(self, loss_fn: LossFn) -> Choice | None:
        """Decide by a dry run on one batch how traces are estimated, if at all; else ``backward`` does so.

        ValueError where no estimator is possible, or processes choose different ones.
        """
        if self.penalty is None or self.penalty.estimator is None:
            return None
        found = refusal = None
        try:
            needs_gradient = self.penalty.strengths[1] > 0
            found = choose(self.penalty.estimator, self._passes(loss_fn), needs_gradient=needs_gradient)
        except ValueError as error:
            refusal = ValueError(f"penalty.{error}")
        if self._world > 1:
            names: list[Any] = [None] * self._world
            dist.all_gather_object(names, found and name_of(found.estimator))
            if refusal is None and len(set(names)) > 1:
                got = f"got {names} on the processes"
                refusal = ValueError(f"penalty.estimator: {got}; expected one. Name it.")
        if refusal is not None:
            raise refusal
        self._state.choice = found
        return found

    def traces(self) -> Tensor | None:
        """Return the running averages of t_l [L], NaN for a layer without an estimate; None before any."""
        return record.averages(self._record)[0] if self._record["is_measured"] else None

    def metrics(self) -> dict[str, float]:
        """Return what there is to log, as floats (synchronises with the device).

        ``relative_size`` (as the rule counts it) and ``lambda``, the latest; a layer's ``frobenius/`` (a_l)
        and, once measured, ``curvature/trace/`` (average of t_l), ``curvature/trace_stderr/`` (its error, see
        `record`) and ``wci/`` = sqrt(a_l max(t_l, 0)), their sum ``wci/total``; ``curvature/negative``, the
        share of single estimates below zero. With ``center: initial`` those of a_l are ``wci_from_initial/``
        and ``frobenius_from_initial/``. RuntimeError at W + u, whose norms are others.
        """
        self._refuse_moved("metrics")
        return record.metrics(self._record, self._passes(_no_loss), self.perturbation, self.penalty)

    def extra_passes(self) -> tuple[float, float]:
        """Return the mean forward and backward passes a step costs beyond a plain one, at full schedule."""
        forward, backward = 0.0, 0.0
        if rule := self.perturbation:
            forward, backward = (n / rule.schedule.every for n in rule.extra_passes())
        if (penalty := self.penalty) and penalty.estimator:
            estimator = self._state.choice.estimator if self._state.choice else penalty.estimator
            more = estimator.extra_passes(penalty.strengths[1] > 0)
            forward += more[0] / penalty.schedule.every
            backward += more[1] / penalty.schedule.every
        return forward, backward

    def attach(self, accelerator: Accelerator, model: nn.Module) -> "RegularizedOptimizer":
        """Take processes, micro-batches and the loss scaler from Accelerate.

        Call it on the wrapper itself, not on what ``prepare`` made of it, with the prepared model. ValueError
        for what the passes cannot work with: FSDP, DeepSpeed, a static graph, a penalty on traces in fp16 or
        on a model that is compiled in bfloat16, other micro-batches than Accelerate's.
        """
        needs_float32 = self.penalty is not None and self.penalty.estimator is not None
        refuse_accelerator(accelerator, model, needs_float32, self.num_micro_batches)
        state = self._state
        state.accelerator, state.choice = accelerator, None
        state.scaler = getattr(accelerator, "scaler", None)
        refuse_scaler(state.scaler, self.perturbation, self.penalty)
        self.model, self.num_micro_batches = model, accelerator.gradient_accumulation_steps
        for w in record.initial_tensors(self._record, self.layers) if self._world > 1 else ():
            dist.broadcast(w, src=0)  # as DistributedDataParallel does with W
        return self

    # ---- inside --------------------------------------------------------------------------------------------

    @property
    def _record(self) -> dict[str, Any]:
        return self.param_groups[0][record.KEY]

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _world(self) -> int:
        return dist.get_world_size() if isinstance(self.model, DistributedDataParallel) else 1

    def _factors(self) -> tuple[float, float]:
        """Return at which share of full strength perturbation and penalty act in this step."""
        rule, penalty, now = self.perturbation, self.penalty, (self._record["step"], self.steps_per_epoch)
        factor = penalty.schedule.factor(*now) * penalty.schedule.every if penalty else 0.0
        return rule.schedule.factor(*now) if rule else 0.0, factor

    def _regularize(self, loss_fn: LossFn, may_call_backward: bool = False) -> Tensor:
        self._refuse_inside("backward")
        if self._state.moved:
            raise RuntimeError("RegularizedOptimizer.backward: called inside perturbed(). Use one of them.")
        passes, perturbation, penalty = self._begin(loss_fn), self.perturbation, self.penalty
        passes.may_call_backward = may_call_backward
        passes.may_change_gradients = penalty is None and (perturbation is None or perturbation.is_one_pass)
        factor, penalty_factor = self._factors()
        self._state.is_inside = True
        try:
            if penalty_factor and self._state.choice is None:
                self.choose_estimator(loss_fn)
            penalized = None
            if penalty and penalty_factor and (chosen := self._state.choice):
                known = chosen.estimator, penalty_factor, passes.squared_norms(penalty.center)
                penalized = partial(penalty.add_gradient, passes, *known)
            acts = perturbation and factor
            is_active = bool(acts or penalized)
            with passes.undone() if is_active else nullcontext(), self._listening(is_active):
                if perturbation and acts:
                    step = perturbation.gradient(passes, factor, penalized)
                else:
                    step = penalized() if penalized else Step(passes.plain()[0])
        finally:
            self._state.is_inside = False
        if penalty and penalty_factor:
            penalty.add_norm_gradient(passes, penalty_factor)
        self._state.window.count(step, passes.share)
        return step.loss

    @contextmanager
    def _listening(self, is_active: bool) -> Iterator[None]:
        """Refuse hidden gradients, at first and after a step that left layers without a gradient anew."""
        with refusing_hidden(self.layers.tensors) if is_active and self._state.listens else nullcontext():
            yield
        silent = {id(t) for t in self.layers.tensors if t.grad is None}
        self._state.listens = not is_active or bool(silent - self._state.silent)
        self._state.silent |= silent

    def _step_with(self, closure: Any) -> Any:
        """Make all passes with a closure, and step; see ``step``."""
        self._refuse_inside("step")
        state, where = self._state, "RegularizedOptimizer.step"
        if state.moved or state.window.micro_steps:
            was_moved, before = state.moved is not None, gradient_versions(self._parameters)
            with torch.enable_grad():
                result = closure()
            is_new = are_changed(self._parameters, before)
            if was_moved and not is_new and isinstance(result, Tensor) and result.requires_grad:
                result.backward()
            elif not was_moved and (is_new or result is not None):  # Lightning's own does nothing
                rule = "none after backward() or perturbed(). Call step()"
                raise RuntimeError(f"{where}: got a closure; expected {rule}.")
            self.step()
            return result
        self._refuse_unseen_gradients("step(closure)", but_left=True)
        if state.accelerator is not None or self._scale() is not None or self.num_micro_batches > 1:
            got = "got a closure under Accelerate, a GradScaler or with several micro-batches"
            raise RuntimeError(f"{where}: {got}; expected none. Call backward(loss_fn) in each, then step().")
        if self.perturbation is None and self.penalty is None:
            return self._step_without_rule(closure)
        self.zero_grad()
        own = {id(p) for p in self._parameters}
        closure = clearing(closure, [p for p in self.model.parameters() if id(p) not in own])
        calls = 1 + round(self.extra_passes()[0])
        if calls > 1 and not state.has_warned:
            closure, state.has_warned = watched(closure, self.model, calls), True
        try:
            loss = self._regularize(closure, may_call_backward=True)
        except NothingDone:
            return self.step()
        self.step()
        return loss

    def _step_without_rule(self, closure: Any) -> Any:
        """Step as torch does: a closure's own backward may add to what is there (Lightning accumulates)."""
        before, self._state.is_inside = gradient_versions(self._parameters), True
        try:
            with torch.enable_grad():
                result = closure()
        finally:
            self._state.is_inside = False
        if not are_changed(self._parameters, before) and result is not None:
            self.zero_grad()
            as_loss(result).total.backward()
        self._state.window.count(Step(torch.zeros(())))
        self.step()
        total: Any = as_loss(result).total
        return total.detach() if isinstance(total, Tensor) else total

    def _selected(self) -> Layers:
        """Return the layers, of what trains now; ValueError for none."""
        self._state.known = [(id(p), p.requires_grad) for p in self._parameters]
        which, split_qkv = self._choice_of_layers
        estimator = (self.penalty and self.penalty.estimator) or Auto()
        layers = estimator.layers(self.model, which, split_qkv=split_qkv).only(set(map(id, self._parameters)))
        if not layers:
            text = "none of the selected tensors is in the optimizer. Is it the same model?"
            raise ValueError(f"layers: {text}")
        if sharded := [name for name, t in layers.items() if hasattr(t, "device_mesh")]:
            rule = "whole ones. Use DistributedDataParallel"
            raise ValueError(f"layers: got shards of {sharded[0]} (FSDP); expected {rule}.")
        return layers

    def _begin(self, loss_fn: LossFn) -> Passes:
        """Return what a micro-batch may do with ``loss_fn``, after a look at what changed since the last."""
        if self._world == 1 and dist.is_initialized() and dist.get_world_size() > 1:
            got = "called in one of several processes, whose weights would diverge"
            rule = "Give the DistributedDataParallel model, or call attach(accelerator, model) first"
            raise RuntimeError(f"RegularizedOptimizer.backward: {got}. {rule}.")
        window = self._state.window
        if window.micro_steps and all(p.grad is None for p in self._parameters):  # cleared by somebody else
            window = self._state.window = Window()  # the batch was skipped
        if not window.micro_steps:  # one window has one set of layers
            self._follow()
        return self._passes(loss_fn)

    def _follow(self) -> None:
        """Take what trains now as the layers."""
        now = [(id(p), p.requires_grad) for p in self._parameters]
        if self._state.known != now:
            self._state.layers, self._state.window = self._selected(), Window()
            if list(self.layers) != self._record["layers"]:
                self.param_groups[0][record.KEY] = record.moved_to(self._record, self.layers)

    def _passes(self, loss_fn: LossFn) -> Passes:
        own, state = self._record, self._state
        rank = dist.get_rank() if self._world > 1 else 0
        return Passes(
            self.model,
            self.layers,
            loss_fn,
            parameters=self._parameters,
            share=1 / self.num_micro_batches,
            key=(self.seed, own["step"], state.window.micro_steps * self._world + rank),
            draw=(self.seed, own["draws"]),
            world=self._world,
            scale=self._scale(),
            traces=self.traces(),
            is_active=own["is_active"],
            memory=own.get("memory"),
            initial=record.initial_tensors(own, self.layers),
            shared=state.window.shared,
        )

    def _scale(self) -> Tensor | None:
        """Return what the scaler multiplies losses with, without waiting for the device; None: nothing."""
        scaler, like = self._state.scaler, self.layers.tensors[0]
        if scaler is None or not scaler.is_enabled():
            return None
        return scaler.scale(precise(torch.ones((), dtype=like.dtype, device=like.device)))

    def _finish_step(self) -> None:
        """Fold in what the micro-batches found; means over processes."""
        own, window, state = self._record, self._state.window, self._state
        is_paired = bool(self.perturbation and self.perturbation.is_paired)
        window.fold(own, self._averaged, self.trace_decay, is_paired)
        own["draws"] += self._factors()[0] > 0
        own["step"] += 1
        if self._world > 1:
            for buffer in self.model.buffers():  # DDP does so before a forward, which an extra pass undoes
                dist.broadcast(buffer, src=0)
        state.last_gradient = Mark.of(self._parameters)
        state.window = Window()

    def _averaged(self, value: Tensor) -> Tensor:
        """Return the mean over processes."""
        if self._world > 1:
            dist.all_reduce(value := value.clone())
            value /= self._world
        return value

    def _refuse_inside(self, name: str) -> None:
        if self._state.is_inside:
            text = f"{name} called inside the function it was given. Call it outside"
            raise RuntimeError(f"RegularizedOptimizer: {text}.")

    def _refuse_moved(self, name: str) -> None:
        if self._state.moved:
            rule = "them at W. Call restore(), or leave perturbed(), first"
            raise RuntimeError(f"RegularizedOptimizer.{name}: got weights at W + u; expected {rule}.")

    def _refuse_unseen_gradients(self, where: str, but_left: bool = False) -> None:
        """Raise RuntimeError for gradients that no rule has made; those the last step left may be dropped."""
        rule, last = self.perturbation or self.penalty, self._state.last_gradient
        if rule is None or all(float(group["lr"]) == 0 for group in self.param_groups):
            return
        if but_left and last and last.is_untouched():
            return
        refuse_unseen(self._parameters, rule, where)


def _no_loss() -> Any:
    raise AssertionError("this pass is the user's own")
