"""The exact trace of the last linear layer's Hessian: a closed form, differentiable and nearly free.

Legend: N examples, C classes, D features, h_n features entering the layer [N, D], z_n = W h_n (+ b) its
logits [N, C], p = softmax(z), q = sigmoid(z), w_n weight of an example; t = Tr(H) for H the Hessian of the
mean loss in vec(W).

z is linear in W, so H = (1/N) Σ_n w_n (∂²ℓ/∂z²)_n ⊗ h_n h_nᵀ, and with the table of `loss`

    cross_entropy:   t = (1/N) Σ_n w_n ||h_n||² (1 − ||p_n||²)                                             (1)
    bce:             t = (1/N) Σ_n w_n ||h_n||² Σ_c q_nc (1 − q_nc)                                        (2)
    mse:             t = (1/N) Σ_n w_n ||h_n||² 2 C                                                        (3)

Targets, soft or smoothed, do not enter.

Cost: none beyond the forward pass that made the logits. Sums are made in float64 where the device has it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from wcitrain.curvature.estimator import Estimator, backward_with, weighted
from wcitrain.curvature.loss import Loss, Output, Outputs, outputs_of
from wcitrain.curvature.passes import Passes, Step
from wcitrain.method import method
from wcitrain.params import Layers, unwrapped, wide


@method
class TopLayer(Estimator):
    """The closed form for the head's weight, exact on every batch; the head is then the only layer.

    Needs a linear head and a loss that gives its outputs. Extra passes: none.
    """

    label: ClassVar[str] = "top layer"
    takes_differences: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = False
    has_all_layers: ClassVar[bool] = False
    probe_cost: ClassVar[int] = 1

    def layers(self, model: nn.Module, layers: str, *, split_qkv: bool = False) -> Layers:
        """Return the head's weight as the only layer.

        Raises:
            ValueError: Other layers are asked for.
        """
        if layers != "weights" or split_qkv:
            raise ValueError(
                f"layers: got {layers!r}{' with split_qkv' * split_qkv} and estimator top_layer, whose only "
                "layer is the head's weight; expected 'weights'. Leave it out."
            )
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
    """Return the exact trace [] of the last layer's Hessian: (1) to (3), summed over outputs.

    Differentiable in everything behind ``features`` and ``outputs``, the layer's own weights included.
    Outputs must be what the layer returned (no temperature after it): ``HeadFeatures.features_of`` finds the
    features of given outputs and checks it.

    Args:
        outputs: A `Loss` with outputs, one or several `Output`, or bare logits [N, C] (cross-entropy).
        features: What entered the layer, one tensor [N, D] an output.

    Returns:
        In float64 (float32 on MPS).

    Raises:
        ValueError: Features that are not [N, D], or not one an output.

    At W = 0, mean ||h||² (1 − 1/C):

    >>> float(top_layer_trace(torch.zeros(2, 4), torch.tensor([[1.0, 2.0], [3.0, -1.0]])))
    5.625
    """
    terms = outputs_of(outputs, "top_layer")
    features = [features] if isinstance(features, Tensor) else list(features)
    if len(features) != len(terms):
        raise ValueError(
            f"top_layer: got {len(features)} tensors of features for {len(terms)} outputs; expected one "
            "each. HeadFeatures.features_of(loss) finds them."
        )
    traces = [_term_trace(term, h) for term, h in zip(terms, features, strict=True)]
    return torch.stack(traces).sum()


def _term_trace(term: Output, features: Tensor) -> Tensor:
    """Return (1), (2) or (3) for one output."""
    if features.ndim != 2 or len(features) != len(term.logits):
        raise ValueError(
            f"top_layer: got features of shape {tuple(features.shape)} with outputs of shape "
            f"{tuple(term.logits.shape)}; expected [N, D] and [N, C]. Pass what enters the last linear layer."
        )
    squares = wide(features).square().sum(-1)  # ||h_n||² [N]
    z = wide(term.logits)
    if term.kind == "cross_entropy":
        curvature = 1 - z.softmax(-1).square().sum(-1)
    elif term.kind == "bce":
        curvature = (z.sigmoid() * (-z).sigmoid()).sum(-1)
    else:
        curvature = torch.full_like(squares, 2 * z.shape[1])
    weight = term.weight.to(squares) if isinstance(term.weight, Tensor) else term.weight
    return (weight * squares * curvature).mean()


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and module of the model's last linear layer.

    What timm's ``get_classifier()`` returns on the model or on its ``backbone``; for other models the last
    ``nn.Linear`` in the order of registration, which need not be the last to run:
    ``HeadFeatures.features_of`` checks that.

    Raises:
        ValueError: There is none, or the classifier is something else (a convolution, several heads).
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
        got = "no nn.Linear at all" if head is None else f"a classifier of type {type(head).__name__}"
        raise ValueError(
            f"top_layer: got {type(model).__name__} with {got}; expected an nn.Linear head of its own, for "
            "which the trace has a closed form. Use estimator gauss_newton for this model."
        )
    return names[head], head


class HeadFeatures:
    """Collects what enters the model's last linear layer in every forward pass inside the context.

        with HeadFeatures(model) as head:
            loss = cross_entropy(model(x_adv), y)
        t = top_layer_trace(loss, head.features_of(loss))

    ``features`` holds a tensor [N, D] a forward pass, with its graph, in order: run the attack outside. A
    ``torch.compile``d model does not call hooks that were registered later: ``features_of`` raises then.
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
        """Return the features [N, D] from which the head computed each of ``outputs``.

        Found by value, the latest pass first: number and order of the passes do not matter.

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
            f"of {self.name} returned; expected the head's own outputs, unscaled, computed inside the "
            "context by a model that is not compiled. Otherwise use estimator gauss_newton."
        )

    def _record(self, module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        if len(args) != 1 or args[0].ndim != 2:
            raise ValueError(
                f"top_layer: got inputs of shapes {[tuple(x.shape) for x in args]} at {self.name}; expected "
                "[N, D], one vector an image. For other heads use estimator gauss_newton."
            )
        self.features.append(args[0])
        self._logits.append(logits)
