"""The exact trace of the last linear layer's Hessian: a closed form of features and logits, differentiable and nearly free.

Legend: N examples, C classes, D features, h_n features entering the layer [N, D], z_n = W h_n (+ b) its logits [N, C],
p = softmax(z), q = sigmoid(z), w_n weight of an example; t = Tr(H) for H the Hessian of the mean loss in vec(W).

z is linear in W, so H = (1/N) Σ_n w_n (∂²ℓ/∂z²)_n ⊗ h_n h_nᵀ, and with the table of `loss`

    cross_entropy:   t = (1/N) Σ_n w_n ||h_n||² (1 − ||p_n||²)                                                   (1)
    bce:             t = (1/N) Σ_n w_n ||h_n||² Σ_c q_nc (1 − q_nc)                                              (2)
    mse:             t = (1/N) Σ_n w_n ||h_n||² 2 C                                                              (3)

Targets, soft or smoothed, do not enter. A bias that counts as part of the same layer is one more feature, equal to one:
||h||² becomes ||h||² + 1 and h·h' becomes h·h' + 1.

TRADES' KL(p ‖ r), p = softmax(W h) at the clean and r = softmax(W h') at the adversarial image, depends on W twice. With
a_c = log p_c − log r_c, A = 1 − ||p||², B = 1 − ||r||², example by example,

    t = mean { ||h||² [A − 2 Σ_c p_c² (a_c − KL)] + ||h'||² B − 2 (h·h') A }                                     (4)

when both branches are differentiated, as TRADES' authors do, and mean ||h'||² B when p is held constant. (4) can be negative.

Cost: none beyond the forward pass that made the logits. Sums are made in float64 where the device has it.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wcitrain.curvature.loss import Loss, Output, outputs_of
from wcitrain.params import unwrapped, wide


def top_layer_trace(
    outputs: Tensor | Output | Loss | Sequence[Output], features: Tensor | Sequence[Tensor], *, has_bias: bool = False
) -> Tensor:
    """Return the exact trace [] of the last layer's Hessian of the mean loss, equations (1) to (3) summed over outputs.

    Differentiable in everything behind ``features`` and ``outputs``, the layer's own weights included. Outputs must be what
    the layer returned (no temperature after it): ``HeadFeatures.features_of`` finds the features of given outputs and checks it.

    Args:
        outputs: A `Loss` with outputs, one or several `Output`, or bare logits [N, C] (cross-entropy).
        features: What entered the layer, one tensor [N, D] an output.
        has_bias: Count the layer's bias as part of the same layer; by default the weight alone.

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
            f"top_layer: got {len(features)} tensors of features for {len(terms)} outputs; expected one each. "
            "HeadFeatures.features_of(loss) finds them."
        )
    return torch.stack(
        [_term_trace(term, _squared_norms(h, term.logits, has_bias)) for term, h in zip(terms, features, strict=True)]
    ).sum()


def kl_top_layer_trace(
    clean_logits: Tensor,
    adv_logits: Tensor,
    clean_features: Tensor,
    adv_features: Tensor,
    *,
    detach_clean: bool = False,
    has_bias: bool = False,
) -> Tensor:
    """Return the exact trace [] of the last layer's Hessian of mean KL(p ‖ r), equation (4); differentiable.

    TRADES' whole loss, CE(clean) + β KL, has ``top_layer_trace(clean) + β kl_top_layer_trace(...)``.

    Args:
        clean_logits, adv_logits: z and z' [N, C].
        clean_features, adv_features: h and h' [N, D].
        detach_clean: Whether the loss holds p constant (some implementations do; the authors' does not).
        has_bias: Count the layer's bias as part of the same layer.

    Raises:
        ValueError: Shapes that do not fit.
    """
    outputs_of((Output(clean_logits), Output(adv_logits)), "kl_top_layer")
    if clean_logits.shape != adv_logits.shape:
        raise ValueError(
            f"kl_top_layer: got logits of shapes {tuple(clean_logits.shape)} and {tuple(adv_logits.shape)}; expected the same. "
            "Pass the clean and adversarial versions of the same images."
        )
    clean_squares = _squared_norms(clean_features, clean_logits, has_bias)
    adv_squares = _squared_norms(adv_features, adv_logits, has_bias)
    log_p, log_r = wide(clean_logits).log_softmax(-1), wide(adv_logits).log_softmax(-1)
    p = log_p.exp()
    spread_p, spread_r = 1 - p.square().sum(-1), 1 - log_r.exp().square().sum(-1)  # A, B
    if detach_clean:
        return (adv_squares * spread_r).mean()
    a = log_p - log_r
    kl = (p * a).sum(-1, keepdim=True)
    clean_curvature = spread_p - 2 * (p.square() * (a - kl)).sum(-1)
    products = (wide(clean_features) * wide(adv_features)).sum(-1) + has_bias
    return (clean_squares * clean_curvature + adv_squares * spread_r - 2 * products * spread_p).mean()


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and module of the model's last linear layer.

    What timm's ``get_classifier()`` returns on the model or on its ``backbone``; for other models the last ``nn.Linear`` in the
    order of registration, which need not be the last to run: ``HeadFeatures.features_of`` checks that.

    Raises:
        ValueError: There is none, or the classifier is another kind of module (a convolution, ``nn.Identity``, several heads).
    """
    model = unwrapped(model)
    owners: list[Any] = [model, getattr(model, "backbone", None)]
    owner = next((m for m in owners if hasattr(m, "get_classifier")), None)
    if owner is not None:
        head = owner.get_classifier()
    else:
        head = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    if not isinstance(head, nn.Linear):
        found = "no nn.Linear at all" if head is None else f"a classifier of type {type(head).__name__}"
        raise ValueError(
            f"top_layer: got {type(model).__name__} with {found}; expected an nn.Linear head, for which the trace has a closed "
            "form. Use estimator gauss_newton for this model."
        )
    name = next((name for name, m in model.named_modules() if m is head), None)
    if name is None:
        raise ValueError(
            f"top_layer: got {type(model).__name__}, whose get_classifier() returns a layer outside the model; expected one of its "
            "own. Use estimator gauss_newton for this model."
        )
    return name, head


class _Call(NamedTuple):
    """One forward pass of the head."""

    features: Tensor
    logits: Tensor


class HeadFeatures:
    """Collects what enters the model's last linear layer in every forward pass made inside the context, with its graph.

        with HeadFeatures(model) as head:
            loss = cross_entropy(model(x_adv), y)
        t = top_layer_trace(loss, head.features_of(loss))

    It holds the graphs of these passes as long as it lives: run the attack outside.

    Args:
        model: With a head that ``find_head`` finds; wrappers (DDP) are looked through. A ``torch.compile``d model does not call
            hooks that were registered later: ``features_of`` raises then.

    Attributes:
        name, head: The layer, by the user's own name.
        features: One tensor [N, D] a forward pass, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name, self.head = find_head(model)
        self._calls: list[_Call] = []

    def __enter__(self) -> "HeadFeatures":
        self._handle = self.head.register_forward_hook(self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    @property
    def features(self) -> list[Tensor]:
        """What entered the layer, one tensor [N, D] a forward pass, in order."""
        return [call.features for call in self._calls]

    def features_of(self, outputs: Tensor | Output | Loss | Sequence[Output]) -> list[Tensor]:
        """Return the features [N, D] from which the head computed each of ``outputs``.

        Found by value (the latest pass first), so that it does not matter how many passes there were and in which order.

        Raises:
            ValueError: An output that is not what the head returned: for it the closed form would be wrong.
        """
        return [self._features_of(term.logits) for term in outputs_of(outputs, "top_layer")]

    def _features_of(self, logits: Tensor) -> Tensor:
        for call in reversed(self._calls):
            returned = call.logits.detach().to(logits)
            if call.logits is logits or _same(returned, logits.detach()):
                return call.features
        raise ValueError(
            f"top_layer: got outputs {tuple(logits.shape)} that none of {len(self._calls)} recorded passes of {self.name} "
            "returned; expected the head's own outputs, unscaled, computed inside the context by a model that is not compiled. "
            "Otherwise use estimator gauss_newton."
        )

    def _record(self, module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        if len(args) != 1:
            raise ValueError(
                f"top_layer: got a call of {self.name} with {len(args)} positional arguments; expected one, the features. Call the "
                "head as head(features), or use estimator gauss_newton."
            )
        (features,) = args
        if features.ndim != 2:
            raise ValueError(
                f"top_layer: got features of shape {tuple(features.shape)} at {self.name}; expected [N, D], one vector an image. "
                "Use estimator gauss_newton for a head that runs on every token or position."
            )
        self._calls.append(_Call(features, logits))


def _same(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers, NaN counting as a number: divergence is reported elsewhere."""
    return left.shape == right.shape and torch.equal(left.nan_to_num(), right.nan_to_num())


def _squared_norms(features: Tensor, logits: Tensor, has_bias: bool) -> Tensor:
    """Return ||h_n||² [N], plus one for the bias."""
    if features.ndim != 2 or len(features) != len(logits):
        raise ValueError(
            f"top_layer: got features of shape {tuple(features.shape)} with outputs of shape {tuple(logits.shape)}; expected "
            "[N, D] and [N, C]. Pass what enters the last linear layer."
        )
    return wide(features).square().sum(-1) + has_bias


def _term_trace(term: Output, squares: Tensor) -> Tensor:
    """Return equation (1), (2) or (3) for one output, given ||h_n||² [N]."""
    z = wide(term.logits)
    if term.kind == "cross_entropy":
        curvature = 1 - z.softmax(-1).square().sum(-1)
    elif term.kind == "bce":
        curvature = (z.sigmoid() * (-z).sigmoid()).sum(-1)
    elif term.kind == "mse":
        curvature = torch.full_like(squares, 2 * z.shape[1])
    else:
        raise ValueError(f"Output.kind: got {term.kind!r}; expected cross_entropy, bce or mse. Choose one of them.")
    weight = term.weight.to(squares) if isinstance(term.weight, Tensor) else term.weight
    return (weight * squares * curvature).mean()
