"""What the wrapper refuses to work with, by name."""

import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from wcitrain.curvature.loss import HIDING
from wcitrain.optim.penalty import Penalty
from wcitrain.optim.perturbation import WeightPerturbation
from wcitrain.params import is_compiled

WAYS = (
    "step(closure) alone, backward(loss_fn) before step(), or `with optimizer.perturbed():` around forward "
    "and backward (rules of one pass). Or clear them by zero_grad()"
)


def refuse_base(base: Optimizer, is_wrapper: bool) -> None:
    """Raise ValueError for optimizers that cannot step on what is in ``.grad``, or would be asked twice."""
    closure = inspect.signature(base.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    rules = [
        (is_wrapper, "one wrapper. Give it perturbation and penalty together"),
        (isinstance(base, AcceleratedOptimizer), "the bare optimizer. Wrap first, then prepare the wrapper"),
        (needs_closure, "an optimizer that steps on gradients. Use SGD or AdamW"),
    ]
    for is_wrong, rule in rules:
        if is_wrong:
            raise ValueError(f"base: got {type(base).__name__}; expected {rule}.")


def refuse_scaler(scaler: Any, rule: WeightPerturbation | None, penalty: Penalty | None) -> None:
    """Raise ValueError for a GradScaler with what fp16 cannot hold."""
    draws = rule is not None and rule.measures_traces and getattr(rule, "traces", "") != "difference"
    if scaler and scaler.is_enabled() and ((penalty and penalty.estimator) or draws):
        got = f"got a GradScaler with {rule if draws else penalty}"
        raise ValueError(f"scaler: {got}; expected bf16 or float32. fp16 cannot hold its derivatives.")


def refuse_accelerator(
    accelerator: Accelerator, model: nn.Module, needs_float32: bool, num_micro_batches: int
) -> None:
    """Raise ValueError for what the passes cannot work with, see ``RegularizedOptimizer.attach``."""
    kind, precision = accelerator.distributed_type.value, accelerator.mixed_precision
    parts = accelerator.gradient_accumulation_steps
    is_compiled_bf16 = precision == "bf16" and any(map(is_compiled, model.modules()))
    is_precise = not needs_float32 or not (precision == "fp16" or is_compiled_bf16)
    low = "a compiled bf16 model" if precision == "bf16" else precision
    counted = f"num_micro_batches={num_micro_batches}"
    rules = [
        (precision in ("no", "bf16", "fp16"), f"mixed_precision={precision!r}", "no, bf16 or fp16"),
        (kind in ("NO", "MULTI_GPU", "MULTI_CPU"), kind, "one process or DistributedDataParallel"),
        (not getattr(model, "static_graph", False), "a DDP model with static_graph=True", "False"),
        (is_precise, low, "float32, for the penalty's passes"),
        (num_micro_batches in (1, parts), counted, f"{parts}, gradient_accumulation_steps"),
    ]
    for is_fine, got, rule in rules:
        if not is_fine:
            raise ValueError(f"attach: got {got}; expected {rule}.")


@contextmanager
def refusing_hidden(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Raise ValueError where activation checkpoints hid gradients of layers: torch only warns.

    Those of the reentrant kind do, where no input of theirs asks for one. Other warnings come through.
    """
    told: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.filterwarnings("always", HIDING)
            yield
        if any(HIDING in str(one.message) for one in told) and any(t.grad is None for t in tensors):
            got = "got activation checkpoints that hide the gradients of their layers"
            raise ValueError(f"model: {got}; expected none. Give them use_reentrant=False.")
    finally:
        for one in told:
            if HIDING not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def refuse_unseen(parameters: Iterable[Tensor], rule: object, where: str) -> None:
    """Raise RuntimeError for gradients in place, of which the caller knows that no rule has made them."""
    if any(p.grad is not None and float(p.grad.norm()) != 0 for p in parameters):
        got = f"got gradients that {rule} has not seen"
        raise RuntimeError(f"RegularizedOptimizer.{where}: {got}; expected {WAYS}.")
