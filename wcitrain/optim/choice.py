"""``estimator: auto``: which estimator of the traces a penalty uses with this model and loss, found by a dry run.

Not every operation can be differentiated twice (fused attention, hardsigmoid, anything compiled), and some only twice
(BatchNorm in train mode). A dry run of the penalty's own derivatives on one batch tells; ``differentiability`` then names
the modules. The run leaves weights, gradients, buffers and random state as they were.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from wcitrain.curvature.differentiability import Unsupported, explain, failing_modules
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.hvp import gradients_with_graph, hvp
from wcitrain.curvature.loss import Loss
from wcitrain.curvature.top_layer import HeadFeatures, top_layer_trace
from wcitrain.optim.passes import Passes
from wcitrain.optim.penalty import Penalty
from wcitrain.preserve import kept_random_state, undisturbed

FUSED_ATTENTION = (
    "scaled_dot_product"  # in torch's message about every fused kernel; their plain formula has all derivatives
)


class Choice(NamedTuple):
    """The estimator, why in one sentence, and whether attention must run by its plain formula for it."""

    estimator: str
    reason: str
    use_math_attention: bool = False


def choose_estimator(passes: Passes, penalty: Penalty, strength: float) -> Choice:
    """Return the estimator for this penalty; ``auto`` never fails, an explicit one that is impossible does.

    Args:
        passes: Of one micro-batch; the loss is evaluated a few times, nothing is left behind. Where fused attention is what
            stands in the way, ``passes.use_math_attention`` is set.
        penalty: Its ``estimator`` and ``gradient``.
        strength: Zero needs values only, so fewer derivatives.

    Raises:
        ValueError: The explicit estimator cannot work here: which modules refuse, and what to do.
    """
    wanted = penalty.estimator
    if wanted == "two_point":
        return Choice("two_point", "as asked")
    name = "gauss_newton" if wanted == "auto" else wanted
    with undisturbed(passes.model, training=None), kept_random_state(passes.device), passes.local():
        problem = _problem(passes, penalty, name, strength > 0)
        if problem is not None and FUSED_ATTENTION in problem:
            passes.use_math_attention = True
            problem = _problem(passes, penalty, name, strength > 0)
    if problem is None:
        reason = "as asked" if wanted != "auto" else "the loss gives its outputs and the dry run passed"
        reason += ", with attention unfused" if passes.use_math_attention else ""
        return Choice(name, reason, passes.use_math_attention)
    if wanted == "auto":
        return Choice("two_point", f"gauss_newton is not possible here: {problem}")
    raise ValueError(f"penalty.estimator: got {wanted!r}, which is not possible here: {problem}")


def _problem(passes: Passes, penalty: Penalty, name: str, needs_gradient: bool) -> str | None:
    """Try the derivatives that ``name`` needs on one batch; return what stands in the way."""
    is_third_order = name == "hutchinson" and penalty.gradient == "autograd" and needs_gradient
    loss = passes.evaluate()
    if name in ("gauss_newton", "top_layer") and not loss.outputs:
        return (
            "the loss does not say which outputs it was computed from. Return wcitrain.cross_entropy(model(x_adv), y), or use "
            "estimator='two_point'."
        )
    if name == "top_layer":
        return _head_problem(passes)
    try:
        if name == "gauss_newton":
            _try_gauss_newton(passes, loss, needs_gradient)
        else:
            _try_hutchinson(passes, loss, needs_gradient, is_third_order)
    except ValueError as error:  # a derivative that is wrong without a word, found in the graph
        return f"{error} Or use estimator='two_point'."
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        found = _failing(passes, 3 if is_third_order else 2)
        what = f"{name} needs {'third' if is_third_order else 'second'} derivatives"
        return (
            explain(found, what)
            if found
            else f"{what}, which fail: {str(error).splitlines()[0]} Use estimator='two_point'."
        )
    return None


def _failing(passes: Passes, order: Literal[2, 3]) -> list[Unsupported]:
    """Return the modules that fail; nothing where that cannot be found out (the loss calls parts of the model, ...)."""
    try:
        return failing_modules(passes.model, passes.evaluate, order=order)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return []


def _head_problem(passes: Passes) -> str | None:
    """Return why the head's closed form does not apply."""
    try:
        with HeadFeatures(passes.model) as head:
            loss = passes.evaluate()
        top_layer_trace(loss, head.features_of(loss))
    except ValueError as error:
        return str(error)
    return None


def _try_gauss_newton(passes: Passes, loss: Loss, needs_gradient: bool) -> None:
    """Take the derivatives the estimator takes, that of the loss itself after its graph was used once included."""
    samples = gauss_newton_samples(loss, passes.layers, create_graph=needs_gradient, retain_graph=True)
    passes.layer_gradients(loss.total, create_graph=samples.requires_grad)
    if samples.requires_grad:  # not so for a linear model under squared error
        _differentiate(samples.sum(), passes.model)


def _try_hutchinson(passes: Passes, loss: Loss, needs_gradient: bool, is_third_order: bool) -> None:
    """Take the derivatives the estimator takes, in the direction of all ones."""
    tensors = passes.layers.tensors
    gradients = gradients_with_graph(loss, tensors, order=3 if is_third_order else 2)
    ones = [torch.ones_like(t) for t in tensors]
    rows = _trained(passes.model) if needs_gradient else tensors
    products = hvp(gradients, tensors, ones, rows=rows, create_graph=is_third_order)
    if is_third_order:
        _differentiate(torch.stack([p.sum() for p in products]).sum(), passes.model)


def _differentiate(value: Tensor, model: nn.Module) -> None:
    """Take the gradient in everything that is trained."""
    torch.autograd.grad(value, _trained(model), allow_unused=True)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
