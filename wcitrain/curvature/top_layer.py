"""The exact trace of the last linear layer's Hessian: a closed form, differentiable and nearly free.

Legend: N examples, C classes, h_n features entering the layer [N, D], z_n = W h_n (+ b) its logits [N, C],
p = softmax(z), w_n weight of an example; t = Tr(H) for H the Hessian of the mean cross-entropy in vec(W).

z is linear in W, so H = (1/N) Σ_n w_n (diag(p) − p pᵀ)_n ⊗ h_n h_nᵀ, whatever the targets, and

    t = (1/N) Σ_n w_n ||h_n||² (1 − ||p_n||²)                                                              (1)
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from wcitrain.curvature.estimator import Estimator, backward_with, weighted
from wcitrain.curvature.loss import Loss, Outputs, outputs_of
from wcitrain.curvature.passes import Passes, Step
from wcitrain.method import method
from wcitrain.params import Layers, unwrapped, wide

OTHERWISE = "Otherwise use estimator gauss_newton."


@method
class TopLayer(Estimator):
    """The closed form for the head's weight, exact on every batch; the head is then the only layer.

    Needs a linear head and a loss that gives its outputs, all of them cross-entropies.
    """

    label = "top layer"
    source = "the measure of Xu & Zhang, arXiv 2410.07719"
    cost = "no pass more"
    has_all_layers = False
    probe_cost = 1

    def layers(self, model: nn.Module, layers: str, *, split_qkv: bool = False) -> Layers:
        """Return the head's weight as the only layer; ValueError where others are asked for."""
        if layers != "weights" or split_qkv:
            got = f"got {layers!r}{' with split_qkv' * split_qkv} and estimator top_layer"
            text = f"layers: {got}, whose only layer is the head's weight; expected 'weights'."
            raise ValueError(f"{text} Leave it out.")
        name, head = find_head(model)
        return Layers({f"{name}.weight".removeprefix("."): head.weight})

    def draw(self, passes: Passes, num_probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the trace, the same for every probe."""
        loss, trace = _evaluate(passes)
        return trace.detach().expand(num_probes, 1), loss.total

    def add_gradient(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Differentiate the closed form on features and outputs of the one pass."""
        loss, trace = _evaluate(passes)
        added = weighted(trace, strength * shape, loss.total) if strength else None
        return Step(backward_with(passes, loss.total, added), trace.detach().to(shape))

    def extra_passes(self, is_active: bool) -> tuple[int, int]:
        """Return none."""
        return 0, 0

    def refuses(self, passes: Passes, needs_gradient: bool) -> str | None:
        """Refuse outputs that are not the head's, and heads that are not linear."""
        try:
            _evaluate(passes)
        except ValueError as error:
            return str(error)
        return None


def _evaluate(passes: Passes) -> tuple[Loss, Tensor]:
    """Return the loss of one pass and the head's trace [1]."""
    with HeadFeatures(passes.model) as head:
        loss = passes.evaluate()
    return loss, top_layer_trace(loss, head.features_of(loss)).reshape(1)


def top_layer_trace(outputs: Outputs, features: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the exact trace [] of the last layer's Hessian by (1), summed over outputs, in float64.

    Differentiable in everything behind its arguments, the layer's own weights included. Outputs must be what
    the layer returned (no temperature after it); ``features`` [N, D] entered the layer, one tensor an output,
    see ``HeadFeatures``.

    Raises:
        ValueError: Features that are not [N, D], or not one an output; a loss other than cross-entropy.
    """
    terms = outputs_of(outputs, "top_layer")
    features = [features] if isinstance(features, Tensor) else list(features)
    if len(features) != len(terms) or any(term.kind != "cross_entropy" for term in terms):
        got = f"got {len(features)} tensors of features for outputs {[term.kind for term in terms]}"
        raise ValueError(f"top_layer: {got}; expected one each, of cross-entropies. {OTHERWISE}")
    traces = []
    for term, h in zip(terms, features, strict=True):
        if h.ndim != 2 or len(h) != len(term.logits):
            got = f"got features {tuple(h.shape)} with outputs {tuple(term.logits.shape)}"
            text = f"top_layer: {got}; expected [N, D] and [N, C]. Pass what enters the last linear layer."
            raise ValueError(text)
        squares = wide(h).square().sum(-1)  # ||h_n||² [N]
        curvature = 1 - wide(term.logits).softmax(-1).square().sum(-1)
        weight = term.weight.to(squares) if isinstance(term.weight, Tensor) else term.weight
        traces.append((weight * squares * curvature).mean())
    return torch.stack(traces).sum()


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and module of the model's last linear layer.

    What timm's ``get_classifier()`` returns on the model or on its ``backbone``; for other models the last
    ``nn.Linear`` in the order of registration, which need not be the last to run. ValueError where there is
    none, or the classifier is something else (a convolution, several heads).
    """
    model = unwrapped(model)
    names = {module: name for name, module in model.named_modules()}
    owners: list[Any] = [model, getattr(model, "backbone", None)]
    owner = next((m for m in owners if hasattr(m, "get_classifier")), None)
    if owner is not None:
        head = owner.get_classifier()
    else:
        head = next((m for m in reversed(names) if isinstance(m, nn.Linear)), None)
    if not isinstance(head, nn.Linear) or head not in names:
        what = "no nn.Linear at all" if head is None else f"a classifier of type {type(head).__name__}"
        got = f"got {type(model).__name__} with {what}"
        raise ValueError(f"top_layer: {got}; expected an nn.Linear head of its own. {OTHERWISE}")
    return names[head], head


class HeadFeatures:
    """Collects what enters the model's last linear layer in every forward pass inside the context.

        with HeadFeatures(model) as head:
            loss = cross_entropy(model(x_adv), y)
        t = top_layer_trace(loss, head.features_of(loss))

    ``features`` holds a tensor [N, D] a forward pass, with its graph, in order. A compiled model does not
    call the hook: ``features_of`` raises then.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name, self.head = find_head(model)
        self.features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def __enter__(self) -> Self:
        self._handle = self.head.register_forward_hook(self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def features_of(self, outputs: Outputs) -> list[Tensor]:
        """Return the features [N, D] from which the head computed each of ``outputs``, matched by value.

        Raises:
            ValueError: An output that is not what the head returned: for it the closed form would be wrong.
        """
        return [self._features_of(term.logits) for term in outputs_of(outputs, "top_layer")]

    def _features_of(self, logits: Tensor) -> Tensor:
        wanted = logits.detach().nan_to_num()  # NaN equals itself here: others report divergence
        for features, returned in zip(reversed(self.features), reversed(self._logits), strict=True):
            if torch.equal(returned.detach().to(logits).nan_to_num(), wanted):
                return features
        raise ValueError(
            f"top_layer: got outputs {tuple(logits.shape)} that none of {len(self.features)} recorded passes "
            f"of {self.name} returned; expected its own, unscaled, of a model not compiled. {OTHERWISE}"
        )

    def _record(self, module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        if len(args) != 1 or args[0].ndim != 2:
            got = f"inputs of shapes {[tuple(x.shape) for x in args]} at {self.name}"
            raise ValueError(f"top_layer: got {got}; expected [N, D], one vector an image. {OTHERWISE}")
        self.features.append(args[0])
        self._logits.append(logits)
