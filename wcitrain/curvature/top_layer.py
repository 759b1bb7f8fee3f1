"""The exact trace of the last linear layer's Hessian: a closed form, differentiable and nearly free.

Legend: N examples, C classes, h_n features entering the layer [N, D], z_n = W h_n (+ b) its logits [N, C],
p = softmax(z), w_n weight of an example; t = Tr(H) for H the Hessian of the mean cross-entropy in vec(W).

z is linear in W, so H = (1/N) Σ_n w_n (diag(p) − p pᵀ)_n ⊗ h_n h_nᵀ, whatever the targets, and

    t = (1/N) Σ_n w_n ||h_n||² (1 − ||p_n||²)                                                              (1)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wcitrain.curvature.estimator import Estimator, backward_with
from wcitrain.curvature.loss import Loss, Output, outputs_of
from wcitrain.curvature.passes import Passes, Step
from wcitrain.method import method
from wcitrain.params import Layers, unwrapped, wide

HeadCalls = list[tuple[Tensor, Tensor]]  # what entered and what left the head, a forward pass each


@method
class TopLayer(Estimator):
    """The closed form for the head's weight, exact on every batch; the head is then the only layer.

    Needs a linear head and a loss that gives its outputs, all of them cross-entropies.
    """

    label = "top layer"
    source = "the measure of Xu & Zhang, arXiv 2410.07719"
    cost = "no pass more"

    def layers(self, model: nn.Module, layers: str, *, split_qkv: bool = False) -> Layers:
        """Return the head's weight as the only layer; ValueError where others are asked for."""
        if layers != "weights" or split_qkv:
            raise ValueError(f"layers: got {layers!r}; expected none: top_layer's only layer is the head.")
        name, head = find_head(model)
        return Layers({f"{name}.weight".removeprefix("."): head.weight})

    def draw(self, passes: Passes, num_probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the trace, the same for every probe."""
        loss, trace = _evaluate(passes)
        return trace.detach().expand(num_probes, 1), loss.total

    def add_gradient(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Differentiate the closed form on features and outputs of the one pass."""
        loss, trace = _evaluate(passes)
        return backward_with(passes, loss.total, trace, shape, strength)

    def extra_passes(self, is_active: bool) -> tuple[int, int]:
        """Return none."""
        return 0, 0


def _evaluate(passes: Passes) -> tuple[Loss, Tensor]:
    """Return the loss of one pass and the head's trace [1], summed over outputs."""
    with head_calls(passes.model) as calls:
        loss = passes.evaluate()
    traces = [
        top_layer_trace(output.logits, features_of(output, calls), output.weight)
        for output in outputs_of(loss, "top_layer")
    ]
    return loss, torch.stack(traces).sum().reshape(1)


def top_layer_trace(logits: Tensor, features: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """Return the exact trace [] of the last layer's Hessian by (1), in float64.

    Differentiable in everything behind its arguments, the layer's own weights included. ``logits`` [N, C] are
    what the layer returned, unscaled, for ``features`` [N, D]; ``weight`` is one number or [N].
    """
    squares = wide(features).square().sum(-1)  # ||h_n||² [N]
    weight = weight.to(squares) if isinstance(weight, Tensor) else weight
    return (weight * squares * (1 - wide(logits).softmax(-1).square().sum(-1))).mean()


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and module of the model's last linear layer; ValueError where it is something else.

    What timm's ``get_classifier()`` returns on the model or on its ``backbone``; for other models the last
    ``nn.Linear`` in the order of registration, which need not be the last to run.
    """
    model = unwrapped(model)
    names = {module: name for name, module in model.named_modules()}
    owners: list[Any] = [model, getattr(model, "backbone", None)]
    owner = next((m for m in owners if hasattr(m, "get_classifier")), None)
    linear = (m for m in reversed(names) if isinstance(m, nn.Linear))
    head = owner.get_classifier() if owner is not None else next(linear, None)
    if not isinstance(head, nn.Linear) or head not in names:
        got = f"got {type(model).__name__} with a head of type {type(head).__name__}"
        raise ValueError(f"top_layer: {got}; expected an nn.Linear of its own. Use gauss_newton.")
    return names[head], head


@contextmanager
def head_calls(model: nn.Module) -> Iterator[HeadCalls]:
    """Collect what enters and what leaves the model's head, with graphs, in every forward pass inside."""
    calls: HeadCalls = []
    _, head = find_head(model)
    handle = head.register_forward_hook(lambda _, args, logits: calls.append((args[0], logits)))
    try:
        yield calls
    finally:
        handle.remove()


def features_of(output: Output, calls: HeadCalls) -> Tensor:
    """Return the features [N, D] from which the head computed an output, by value; ValueError else."""
    wanted = output.logits.detach().nan_to_num()  # NaN equals itself here: others report divergence
    for features, returned in reversed(calls):
        # The tensor itself first: to compare values the host waits for the device.
        same = returned is output.logits or torch.equal(returned.detach().to(wanted).nan_to_num(), wanted)
        if same and features.ndim == 2 and output.kind == "cross_entropy":
            return features
    got = f"got a {output.kind} of outputs {tuple(wanted.shape)} that the head did not return for vectors"
    rule = "cross-entropy of its own outputs, unscaled, of a model not compiled. Use gauss_newton."
    raise ValueError(f"top_layer: {got}; expected {rule}")
