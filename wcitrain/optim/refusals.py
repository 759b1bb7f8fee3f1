"""What the wrapper refuses, since it would be another objective than it seems, or silently wrong."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from wcitrain.curvature.estimators import Auto, name_of
from wcitrain.method import refuse
from wcitrain.optim.penalty import Penalty
from wcitrain.optim.perturbation import WeightPerturbation
from wcitrain.params import Layers, is_compiled


def default_layers(perturbation: WeightPerturbation | None, penalty: Penalty | None) -> str:
    """Return which tensors are layers where the user does not say, see ``params.select_layers``.

    ValueError for a rule for all tensors beside a penalty, which is defined on weight matrices.
    """
    if perturbation is None or perturbation.default_layers == "weights":
        return "weights"
    if penalty is not None:
        text = f"got null with {perturbation}, which is published for all tensors, and {penalty}"
        refuse("layers", f"{text}; expected the layers of both. Set layers to 'weights' or 'all'.")
    return perturbation.default_layers


def refuse_what_does_not_compose(perturbation: WeightPerturbation | None, penalty: Penalty | None) -> None:
    """Raise ValueError where a perturbation and a penalty would not be one well-defined objective.

    A curvature penalty is evaluated at W + u, so it needs a rule that takes the gradient there and nowhere
    else, and an estimator that moves no weights itself.
    """
    if perturbation is None or penalty is None or penalty.estimator is None:
        return
    estimator = penalty.estimator
    if not isinstance(estimator, Auto) and (estimator.moves_weights or not estimator.has_all_layers):
        why = "which moves the weights itself" if estimator.moves_weights else "whose only layer is the head"
        text = f"got {name_of(estimator)}, {why}, beside {perturbation}; expected gauss_newton."
        refuse("penalty.estimator", f"{text} Change it, or leave one of the two out.")
    if not perturbation.goes_with_penalties:
        mixes = "mixes gradients of several points, of which the penalty would see one"
        why = "measures the traces by itself" if perturbation.measures_traces else mixes
        text = f"got {penalty} beside {perturbation}; expected a rule that takes the gradient at W + u alone"
        text += " (SAM, ASAM, AWP, VaSSO, RWP with mixing 1)"
        refuse("penalty", f"{text}: it {why}. Leave one of the two out.")


def refuse_low_precision(layers: Layers, penalty: Penalty | None) -> None:
    """Raise ValueError where a penalty would take differences of gradients in low-precision weights."""
    low = [name for name, p in layers.items() if p.dtype.itemsize < 4]
    if low and penalty is not None and penalty.estimator is not None and penalty.estimator.moves_weights:
        raise ValueError(
            f"penalty: got {layers[low[0]].dtype} weights in {low[0]}; expected float32 or float64: "
            "differences of low-precision gradients are noise. Keep float32 weights, or use WCIPosterior."
        )


def refuse_stale_weights(weight: Tensor, has_accelerator: bool) -> None:
    """Raise RuntimeError where the passes of ``backward`` would not be what they seem."""
    if torch.is_autocast_enabled(weight.device.type):
        raise RuntimeError(
            "RegularizedOptimizer.backward: called under autocast, whose low-precision copies of the weights "
            "perturbed passes would use. Enter autocast inside loss_fn, or let Accelerate do it."
        )
    is_distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if is_distributed and not has_accelerator:
        raise RuntimeError(
            "RegularizedOptimizer.backward: called in one of several processes, whose weights would diverge. "
            "Call attach(accelerator, model) after accelerator.prepare."
        )


def check_attachable(
    accelerator: Accelerator, model: nn.Module, penalty: Penalty | None, num_micro_batches: int
) -> None:
    """Raise ValueError for what `RegularizedOptimizer.attach` cannot do right."""
    kind, precision = accelerator.distributed_type.value, accelerator.mixed_precision
    parts = accelerator.gradient_accumulation_steps
    needs_float32 = penalty is not None and penalty.estimator is not None
    if precision not in ("no", "bf16"):  # fp16's scaler skips and rescales steps
        problem = f"got mixed_precision={precision!r}; expected 'no' or 'bf16'. Use bf16."
    elif kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        problem = f"got distributed type {kind}; expected one process or DistributedDataParallel."
    elif getattr(model, "static_graph", False):
        problem = "got a DDP model with static_graph=True; expected False: extra passes change the graph."
    elif precision == "bf16" and needs_float32 and any(is_compiled(m) for m in model.modules()):
        problem = "got a compiled bf16 model and a curvature penalty, whose passes are float32; expected one "
        problem += "of the two. Use precision 'no', drop compile, or use WCIPosterior."
    elif num_micro_batches not in (1, parts):
        problem = f"got an optimizer with num_micro_batches={num_micro_batches} and an accelerator with "
        problem += f"gradient_accumulation_steps={parts}; expected the same. Set the latter only."
    else:
        return
    raise ValueError(f"attach: {problem}")
